"""Prompts to groups of completions: seeds and order. It does not know how an engine is reached."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from frpo.errors import ConfigError
from frpo.rollout.assignment import ASSIGNMENTS, Assignment
from frpo.rollout.engine import GroupRequest, Sampling
from frpo.telemetry.progress import counted
from frpo.types import Prompt, RolloutGroup

SEED_RANGE = 2**31
"""Seeds of one purpose. Torch's CPU generator reads only the low 32 bits of a seed, so seeds may differ only there."""

TRAINING, EVALUATION = 0, 1


class Pool(Protocol):
    """The engines, as the sampler needs them."""

    def stream(self, assignment: Assignment, sampling: Sampling, version: int, or_newer: bool = False
               ) -> Iterator[RolloutGroup]: ...


def sample_seeds(run_seed: int, purpose: int, first: int, count: int) -> tuple[int, ...]:
    """Seeds of samples `first ... first + count - 1` of a run, counted over all its steps.

    Distinct within a run for 2^31 samples a purpose (training, evaluation): the count itself, rotated by the run's
    seed, with the purpose as the highest of 32 bits.
    """
    if first + count > SEED_RANGE:
        raise ConfigError(f"sample {first + count} of a run exceeds its {SEED_RANGE} distinct seeds; start a new run")
    rotation = run_seed * 2654435761 % SEED_RANGE
    return tuple(purpose * SEED_RANGE + (rotation + first + i) % SEED_RANGE for i in range(count))


class Sampler:
    """Draws whole groups from the engines, assigned to them as `assignment` says: "static" or "load"."""

    def __init__(self, pool: Pool, num_engines: int, run_seed: int, assignment: str = "static"):
        self.pool = pool
        self.num_engines = num_engines
        self.run_seed = run_seed
        self.assign = ASSIGNMENTS[assignment]

    def stream(self, prompts: Sequence[Prompt], *, step: int, first_sample: int, group_size: int, sampling: Sampling,
               version: int, or_newer: bool = False, first_draw: int = 0, purpose: int = TRAINING
               ) -> Iterator[RolloutGroup]:
        """One group a prompt, each as it finishes.

        first_sample: number of this run's (and purpose's) samples drawn before, from which seeds follow.
        first_draw: number of prompts that this step has drawn before; it goes on counting in the group ids.
        Raises EngineError if an engine dies, is late, or holds weights other than `version` (or_newer: older ones).
        """
        requests = [
            GroupRequest(group_id=(step, first_draw + i), prompt=prompt,
                         seeds=sample_seeds(self.run_seed, purpose, first_sample + i * group_size, group_size))
            for i, prompt in enumerate(prompts)]
        return self.pool.stream(self.assign(requests, self.num_engines), sampling, version, or_newer)

    def sample(self, prompts: Sequence[Prompt], **options: Any) -> list[RolloutGroup]:
        """All groups of `stream`, sorted by group id."""
        groups = []
        for done, group in enumerate(self.stream(prompts, **options), start=1):
            counted("sample", done, len(prompts))
            groups.append(group)
        return sorted(groups, key=lambda group: group.group_id)
