"""Run learner ranks as the processes of one launcher (`cluster.launcher`): rank 0 drives, the others follow.

Rank 0 runs the command, and every other rank waits for calls. Each call goes to all ranks, and the results return to
rank 0. One process without a launcher is a team of one.

All ranks meet at a store in rank 0 (`meet`) before rank 0 checks anything. From then on a rank may wait as long as rank
0 lives, while rank 0 reads data or engines generate. A rank that fails ends its process, and the launcher then ends the
other processes.
"""
from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore

from frpo.cluster.device import lacking_packages, settled
from frpo.cluster.launcher import INTERFACE, LAUNCHER, follows, interface_towards, launched
from frpo.cluster.rank import GRACE_S, RankHost, local_environment, local_places
from frpo.config.loader import AnyRecipe
from frpo.errors import EngineError, FrpoError
from frpo.weight_sync.addresses import is_loopback, own_address, reserved_port
from frpo.weight_sync.cpu_shm import memory_id
from frpo.weight_sync.group import served_store

LOST_S = 60.0
"""Seconds in which rank 0's store must answer; a store that does not is on a machine out of reach."""

LONGEST_NAP_S = 0.05
"""Most seconds between two looks for the next call."""

BEGIN = "begin"
"""Key of the store: rank 0 is ready to load a learner."""

_runs = count()
_meeting: tuple[TCPStore, TCPStore] | None = None
"""The store of the launcher's ranks, and a second connection to it, on which a rank sees whether rank 0 still lives."""


def in_team(recipe: AnyRecipe) -> bool:
    """Return whether the ranks are a launcher's processes or this process alone. Otherwise they are Ray actors."""
    return launched() or recipe.learner.ranks == "process"


def device_here(recipe: AnyRecipe) -> str:
    """Return "cuda" or "cpu" for this process, by run.device. The process runs on the machine that computes.

    Raises ConfigError if cuda is asked for and does not work.
    """
    lacking = lacking_packages(engines=False)
    if not lacking and not torch.cuda.is_available():
        lacking.append("torch finds no GPU on this machine (see nvidia-smi and CUDA_VISIBLE_DEVICES)")
    return settled(recipe.run.device, lacking, quiet=follows())


def meet(recipe: AnyRecipe) -> None:
    """Open the store at which the launcher's ranks meet, or connect to it. Do nothing without a launcher.

    Raises EngineError if rank 0 does not come within learner.startup_timeout_s.
    """
    global _meeting
    if not launched() or _meeting is not None:
        return
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    serves = not follows() and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        limit_s = recipe.learner.startup_timeout_s
        store = (served_store(reserved_port(host, port), host, limit_s) if serves else
                 TCPStore(host, port, is_master=False, timeout=timedelta(seconds=limit_s)))
        _meeting = store, TCPStore(host, port, is_master=False, timeout=timedelta(seconds=LOST_S))
    except (OSError, RuntimeError) as error:
        raise EngineError(f"the ranks of the launcher cannot meet at {host}:{port} (MASTER_ADDR, MASTER_PORT): "
                          f"{str(error).splitlines()[0]}") from None


class TeamRanks:
    """All ranks of the team, driven by rank 0. Construction waits until the other ranks follow."""

    def __init__(self, recipe: AnyRecipe, device: str):
        self.team = _Team(recipe, device)
        self.environments: list[dict[str, str]] = [{} for _ in range(self.team.size)]
        self.inside_a_call = False

    def call(self, phase: str, method: str, arguments: Sequence[tuple[Any, ...]], kwargs: Mapping[str, Any],
             timeout_s: float) -> list[Any]:
        """Call `method` on all ranks. A rank that hangs ends itself GRACE_S after `timeout_s`."""
        self.inside_a_call = True
        what = f"learner {phase}"
        self.team.tell((what, method, kwargs, timeout_s), arguments)
        try:
            try:
                result = self.team.do(what, method, arguments[0], kwargs, timeout_s)
            except EngineError as error:  # of an engine in a push; the other ranks have done their part
                result = error
            results = self.team.answer(result)
        except RuntimeError as error:  # torch.distributed's, when a collective fails
            raise EngineError(f"{what}: {error}") from error
        self.inside_a_call = False
        if isinstance(result, EngineError):
            raise result
        return results

    def close(self) -> None:
        """Release the other ranks. After a broken call they cannot receive this message; they end with the launcher."""
        if not self.inside_a_call:
            self.team.tell(None, [()] * self.team.size)
            self.team.leave()


def follow(recipe: AnyRecipe) -> int:
    """Run the calls of rank 0 until rank 0 is done, then return the exit code. If a call fails, end the process."""
    rank = int(os.environ["RANK"])
    try:
        team = _Team(recipe, device_here(recipe))
        while (told := team.hear()) is not None:
            (what, method, kwargs, timeout_s), given = told
            team.answer(team.do(what, method, given, kwargs, timeout_s))
    except Exception as error:
        text = f"{type(error).__name__}: {error}" if isinstance(error, FrpoError) else traceback.format_exc().rstrip()
        print(f"frpo: rank {rank}: {text}", file=sys.stderr, flush=True)
        os._exit(2)  # an orderly exit would wait for ranks that wait for this one
    team.leave()
    return 0


class _Team:
    """One process of the team. It sends calls to all processes, and results to rank 0."""

    def __init__(self, recipe: AnyRecipe, device: str):
        self.host = RankHost()
        self.before = {name: os.environ.get(name) for name in (*LAUNCHER, INTERFACE)}
        if not launched():
            self._be_alone()
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        run = f"run {next(_runs)}"
        self.store, self.watched = (PrefixStore(run, store) for store in _meeting or [self._own_store()] * 2)
        self.calls = count()
        if self.rank == 0:
            self.store.set(BEGIN, "")
        self._await(BEGIN)
        if interface := interface_towards(*self._another_rank()):
            os.environ.setdefault(INTERFACE, interface)
        if device == "cuda":  # srun may show each rank its own GPU alone
            os.environ["LOCAL_RANK"] = str(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        limit = timedelta(seconds=recipe.learner.timeout_s)
        dist.init_process_group("nccl" if device == "cuda" else "gloo", store=self.store, rank=self.rank,
                                world_size=self.size, timeout=limit)
        self.objects = dist.new_group(backend="gloo", timeout=max(
            limit, timedelta(seconds=recipe.learner.startup_timeout_s)))
        if device == "cpu":
            machines: list[str] = [""] * self.size
            dist.all_gather_object(machines, memory_id(), group=self.objects)
            os.environ.update(local_environment(*local_places(machines)[self.rank], recipe))

    @staticmethod
    def _be_alone() -> None:
        """Set the variables of a team of one, but for the address of its store."""
        os.environ.update({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"})

    @staticmethod
    def _own_store() -> TCPStore:
        """Open the store of a team of one. Nobody else reaches it."""
        store = served_store(reserved_port("127.0.0.1"), "127.0.0.1", LOST_S)
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port))
        return store

    def _another_rank(self) -> tuple[str, int]:
        """Return (address, port) that lead from here to a rank on another machine, or to rank 0 if all are on this one.

        The machine of rank 0 does not find its network by its own name: that often leads to the loopback.
        """
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        own = own_address(host, port)
        self.store.set(f"address {self.rank}", own)
        if is_loopback(own):
            others = (self.store.get(f"address {rank}").decode() for rank in range(self.size))
            host = next((other for other in others if not is_loopback(other)), host)
        return host, port

    def tell(self, what: Any, arguments: Sequence[tuple[Any, ...]]) -> None:
        """Send a call to all ranks, on rank 0: `what` to each, and to each rank its own arguments. None: no more."""
        self.store.set(f"call {next(self.calls)}", "")
        dist.broadcast_object_list([what], src=0, group=self.objects)
        dist.scatter_object_list([None], list(arguments), src=0, group=self.objects)

    def hear(self) -> tuple[Any, tuple[Any, ...]] | None:
        """Receive the next call and its arguments from rank 0, on any other rank. None: no more calls follow."""
        what, given = [None], [None]
        self._await(f"call {next(self.calls)}")
        dist.broadcast_object_list(what, src=0, group=self.objects)
        dist.scatter_object_list(given, None, src=0, group=self.objects)
        return what[0] and (what[0], given[0])

    def _await(self, key: str) -> None:
        """Wait until the store has the key. Raises EngineError if rank 0 has ended or is out of reach."""
        began = time.monotonic()
        try:
            while not self.watched.check([key]):
                time.sleep(min(LONGEST_NAP_S, (time.monotonic() - began) / 10))
        except RuntimeError:
            raise EngineError("rank 0 has ended, or its machine is out of reach; see the output of rank 0") from None

    def do(self, what: str, method: str, given: tuple[Any, ...], kwargs: Mapping[str, Any], timeout_s: float) -> Any:
        with ending_after(timeout_s + GRACE_S, f"rank {self.rank}: {what}: no end within {timeout_s:g} s"):
            return getattr(self.host, method)(*given, **kwargs)

    def answer(self, result: Any) -> list[Any]:
        """Send this rank's result to rank 0. Return the list of all results on rank 0, [] on other ranks."""
        results = [None] * self.size if self.rank == 0 else None
        dist.gather_object(result, results, dst=0, group=self.objects)
        return results or []

    def leave(self) -> None:
        """Leave the process as it was, so that a later run of this process is a team of its own."""
        dist.destroy_process_group()
        for name, value in self.before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextmanager
def ending_after(limit_s: float, message: str) -> Iterator[None]:
    """End this process with the message if the context lasts longer. A hang in native code obeys no other limit.

    Native code may keep Python's threads from running. The stacks of all threads are then printed GRACE_S later, and
    the process ends.
    """
    def end() -> None:
        print(f"frpo: EngineError: {message}", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(all_threads=True)
        os._exit(2)

    timer = threading.Timer(limit_s, end)
    timer.daemon = True
    timer.start()
    faulthandler.dump_traceback_later(limit_s + GRACE_S, exit=True)
    try:
        yield
    finally:
        timer.cancel()
        faulthandler.cancel_dump_traceback_later()
