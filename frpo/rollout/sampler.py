"""Sample groups of completions for prompts: set seeds and order. The calls to engines are in the pool."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from frpo.errors import ConfigError
from frpo.rollout.assignment import ASSIGNMENTS, Assignment
from frpo.rollout.engine import GroupRequest, Sampling
from frpo.telemetry.progress import counted
from frpo.types import Prompt, RolloutGroup

SEED_RANGE = 2**31
"""Number of seeds of one purpose. Seeds must differ in their low 32 bits; torch's CPU generator reads only these."""

TRAINING, EVALUATION = 0, 1


class Pool(Protocol):
    """The interface of the engines that the sampler needs."""

    def stream(self, assignment: Assignment, sampling: Sampling, version: int, or_newer: bool = False
               ) -> Iterator[RolloutGroup]: ...


def sample_seeds(run_seed: int, purpose: int, first: int, count: int) -> tuple[int, ...]:
    """Return the seeds of samples `first ... first + count - 1` of a run, counted over all its steps.

    Seeds are distinct within a run, for 2^31 samples of each purpose (training, evaluation). A seed is the sample's
    number, rotated by the run's seed, with the purpose as the highest of 32 bits.
    """
    if first + count > SEED_RANGE:
        raise ConfigError(f"sample {first + count} of a run exceeds its {SEED_RANGE} distinct seeds; start a new run")
    rotation = run_seed * 2654435761 % SEED_RANGE
    return tuple(purpose * SEED_RANGE + (rotation + first + i) % SEED_RANGE for i in range(count))


class Sampler:
    """Sample whole groups from the engines. assignment: rule that assigns groups to engines, "static" or "load"."""

    def __init__(self, pool: Pool, num_engines: int, run_seed: int, assignment: str = "static"):
        self.pool = pool
        self.num_engines = num_engines
        self.run_seed = run_seed
        self.assign = ASSIGNMENTS[assignment]

    def stream(self, prompts: Sequence[Prompt], *, step: int, first_sample: int, group_size: int, sampling: Sampling,
               version: int, or_newer: bool = False, first_draw: int = 0, purpose: int = TRAINING
               ) -> Iterator[RolloutGroup]:
        """Yield one group for each prompt, as it finishes.

        first_sample: number of samples that this run has drawn before for this purpose; the seeds depend on it.
        first_draw: number of prompts that this step has drawn before; group ids continue from this number.
        Raises EngineError if an engine dies, is late, or holds weights other than `version`. With or_newer, only
        older weights are an error.
        """
        requests = [
            GroupRequest(group_id=(step, first_draw + i), prompt=prompt,
                         seeds=sample_seeds(self.run_seed, purpose, first_sample + i * group_size, group_size))
            for i, prompt in enumerate(prompts)]
        return self.pool.stream(self.assign(requests, self.num_engines), sampling, version, or_newer)

    def sample(self, prompts: Sequence[Prompt], **options: Any) -> list[RolloutGroup]:
        """Return all groups of `stream`, sorted by group id."""
        groups = []
        for done, group in enumerate(self.stream(prompts, **options), start=1):
            counted("sample", done, len(prompts))
            groups.append(group)
        return sorted(groups, key=lambda group: group.group_id)
