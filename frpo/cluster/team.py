"""Run learner ranks as the processes of one launcher (`deepspeed`, `torchrun`): rank 0 drives, the others follow.

The launcher starts the same command once for each rank. Rank 0 runs the command, and every other rank waits for calls.
Each call goes to all ranks, and the results return to rank 0. One process without a launcher is a team of one. A rank
may wait for a call as long as generation takes; the call itself has a limit. A rank that fails ends its process, and
the launcher then ends the other processes.
"""
from __future__ import annotations

import os
import socket
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from frpo.cluster.device import lacking_packages, settled
from frpo.cluster.nvidia import asked
from frpo.cluster.rank import RankHost, cpu_environment
from frpo.config.loader import AnyRecipe
from frpo.errors import EngineError, FrpoError

IDLE = timedelta(days=365)
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables that a launcher sets for its processes."""
VISIBLE = "CUDA_VISIBLE_DEVICES"


def launched() -> bool:
    """Return whether a launcher has started this process as one of its ranks."""
    return all(name in os.environ for name in LAUNCHER)


@contextmanager
def outside_the_team() -> Iterator[None]:
    """Hide the launcher from processes that start within this context. They see only the GPUs that no rank has."""
    if not launched():
        yield
        return
    machine = asked("index", "uuid") if torch.cuda.is_available() else []
    spare = spare_gpus(os.environ, [(number, uuid) for number, uuid in machine])
    before = {name: os.environ.pop(name) for name in (*LAUNCHER, VISIBLE) if name in os.environ}
    os.environ[VISIBLE] = ",".join(spare)
    try:
        yield
    finally:
        del os.environ[VISIBLE]
        os.environ.update(before)


def spare_gpus(environ: Mapping[str, str], machine: Sequence[tuple[str, str]]) -> list[str]:
    """List the GPUs that a launcher's ranks on this machine leave to engines, as CUDA_VISIBLE_DEVICES names them.

    machine: (number, UUID) of each GPU. torchrun's ranks all see the same GPUs and take the first ones; GPUs that they
    do not see are not used. deepspeed shows its ranks only their own GPUs; the rest of the machine is spare.
    """
    given = [name.strip() for name in environ.get(VISIBLE, "").split(",") if name.strip()]
    visible = given if VISIBLE in environ else [number for number, _ in machine]
    ranks = int(environ.get("LOCAL_WORLD_SIZE") or environ.get("LOCAL_SIZE") or 1)
    if "TORCHELASTIC_RUN_ID" in environ or len(visible) > ranks:
        return visible[ranks:]
    return [number for number, uuid in machine if not {number, uuid} & set(visible)]


def follows() -> bool:
    """Return whether this process must `follow` rank 0."""
    return launched() and int(os.environ["RANK"]) > 0


def in_team(recipe: AnyRecipe) -> bool:
    """Return whether the ranks are a launcher's processes or this process alone. Otherwise they are Ray actors."""
    return launched() or recipe.learner.ranks == "process"


def with_launcher_ranks(recipe: AnyRecipe) -> AnyRecipe:
    """Return the recipe with the number of ranks that the launcher has started; unchanged without a launcher."""
    if not launched():
        return recipe
    learner = recipe.learner.model_copy(update={"num_ranks": int(os.environ["WORLD_SIZE"]), "ranks": "launcher"})
    return recipe.model_copy(update={"learner": learner})


def device_here(recipe: AnyRecipe) -> str:
    """Return "cuda" or "cpu" for this process, by run.device. The process runs on the machine that computes.

    Raises ConfigError if cuda is asked for and does not work.
    """
    lacking = lacking_packages(engines=False)
    if not lacking and not torch.cuda.is_available():
        lacking.append("torch finds no GPU on this machine (see nvidia-smi and CUDA_VISIBLE_DEVICES)")
    return settled(recipe.run.device, lacking, quiet=follows())


class TeamRanks:
    """All ranks of the team, driven by rank 0. Construction waits until the other ranks follow."""

    def __init__(self, recipe: AnyRecipe, device: str):
        self.team = _Team(recipe, device)
        self.environments = [self.team.environment(rank) for rank in range(recipe.learner.num_ranks)]
        self.inside_a_call = False

    def call(self, phase: str, method: str, arguments: Sequence[tuple[Any, ...]], kwargs: Mapping[str, Any],
             timeout_s: float) -> list[Any]:
        """Call `method` on all ranks. timeout_s: unused; a call that hangs ends by the limit of collectives,
        learner.timeout_s.
        """
        self.inside_a_call = True
        self.team.tell((method, kwargs), arguments)
        try:
            results = self.team.answer(self.team.do(method, arguments[0], kwargs))
        except RuntimeError as error:  # torch.distributed's, when a collective fails
            raise EngineError(f"learner {phase}: {error}") from error
        self.inside_a_call = False
        return results

    def dead(self) -> list[int]:
        """Return [], because the launcher ends this process too if a rank dies."""
        return []

    def close(self) -> None:
        """Release the other ranks. After a broken call they cannot receive this message; they end with the launcher."""
        if not self.inside_a_call:
            self.team.tell(None, [()] * self.team.size)
            self.team.leave()


def follow(recipe: AnyRecipe) -> int:
    """Run the calls of rank 0 until rank 0 is done, then return the exit code. If a call fails, end the process."""
    team = _Team(recipe, device_here(recipe))
    try:
        while (told := team.hear()) is not None:
            (method, kwargs), given = told
            team.answer(team.do(method, given, kwargs))
    except Exception as error:
        text = f"{type(error).__name__}: {error}" if isinstance(error, FrpoError) else traceback.format_exc().rstrip()
        print(f"frpo: rank {team.rank}: {text}", file=sys.stderr, flush=True)
        os._exit(2)  # an orderly exit would wait for ranks that wait for this one
    team.leave()
    return 0


class _Team:
    """One process of the team. It sends calls to all processes, and results to rank 0."""

    def __init__(self, recipe: AnyRecipe, device: str):
        self.host = RankHost()
        self.rank, self.size = (int(os.environ[name]) if launched() else default
                                for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
        self.device, self.recipe = device, recipe
        os.environ.update(self.environment(self.rank))
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        limit = timedelta(seconds=recipe.learner.timeout_s)
        dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=limit)
        self.calls = dist.new_group(backend="gloo", timeout=IDLE)
        self.results = dist.new_group(backend="gloo", timeout=limit)

    def environment(self, rank: int) -> dict[str, str]:
        """Return the variables that the process lacks: all in a team of one; on a CPU those that DeepSpeed needs."""
        alone = {} if launched() else {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
                                       "MASTER_PORT": str(_free_port())}
        return alone | (cpu_environment(rank, self.recipe) if self.device == "cpu" else {})

    def tell(self, what: Any, arguments: Sequence[tuple[Any, ...]]) -> None:
        """Send `what` from rank 0 to all ranks, and arguments[i] to rank i."""
        dist.broadcast_object_list([what], src=0, group=self.calls)
        dist.scatter_object_list([None], list(arguments), src=0, group=self.calls)

    def hear(self) -> tuple[Any, tuple[Any, ...]] | None:
        """Receive the next call and its arguments from rank 0, on any other rank. None: no more calls follow."""
        what, given = [None], [None]
        dist.broadcast_object_list(what, src=0, group=self.calls)
        dist.scatter_object_list(given, None, src=0, group=self.calls)
        return what[0] and (what[0], given[0])

    def do(self, method: str, given: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        return getattr(self.host, method)(*given, **kwargs)

    def answer(self, result: Any) -> list[Any]:
        """Send this rank's result to rank 0. Return the list of all results on rank 0, [] on other ranks."""
        results = [None] * self.size if self.rank == 0 else None
        dist.gather_object(result, results, dst=0, group=self.results)
        return results or []

    def leave(self) -> None:
        dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
