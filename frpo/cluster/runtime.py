"""Start or join a Ray cluster, check that the cluster is large enough, and wait for calls with a time limit.

This module does not depend on the work of its actors.
"""
from __future__ import annotations

import glob
import logging
import os
import re
import secrets
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, ClassVar

import psutil
import ray
from ray._private import auto_init_hook, ray_constants
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]  # of Cython, without stubs
from ray.exceptions import (
    ActorUnschedulableError,
    AuthenticationError,
    GetTimeoutError,
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)

from frpo.cluster.actor_logs import last_lines
from frpo.cluster.device import check_slices, lacking_packages, settled
from frpo.cluster.launcher import VISIBLE, outside_the_team
from frpo.cluster.placement import known_nodes, reward_gpus
from frpo.config.loader import AnyRecipe
from frpo.config.sections import Recipe
from frpo.errors import EngineError, FrpoError, LostRankError
from frpo.learner.collective import is_of_a_collective
from frpo.telemetry.progress import phase

RAY_ENVIRONMENT = {"RAY_DEDUP_LOGS": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
                   "RAY_USAGE_STATS_ENABLED": "0"}

REACH_S = 10.0
"""Seconds that a cluster may take to answer at its address."""

GRACE_S = 5.0
"""Seconds to wait until a rank's death is known. The death fails the other ranks' collective at once."""


GONE = (RayActorError, ActorUnschedulableError, GetTimeoutError, OutOfMemoryError, NodeDiedError, WorkerCrashedError,
        LocalRayletDiedError, ObjectLostError)
"""Errors that Ray raises instead of an actor's answer if its process or node is gone or out of reach."""


class ActorDeadError(EngineError):
    """The process of an actor is gone."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """A machine of the cluster: its own name, and the address that Ray has for it."""

    name: str
    address: str

    def __str__(self) -> str:
        return f"{self.name} ({self.address})"

    def is_gone(self) -> bool:
        """Return whether the cluster has lost this node."""
        return known_nodes().get(self.address, "") is None


@dataclass(frozen=True, kw_only=True)
class NamedActor:
    """A Ray actor, its name in error messages, the path of its log, and its node, if that is known."""

    DEAD: ClassVar[type[EngineError]] = ActorDeadError
    """Error to raise if the process is gone."""
    SILENT: ClassVar[type[EngineError]] = EngineError
    """Error to raise if the actor gives no answer in time, or cannot exchange data with others."""

    name: str
    handle: Any
    log_path: str
    node: Node | None = None

    def __str__(self) -> str:
        return f"{self.name}{f' on {self.node}' if self.node else ''} (log: {self.log_path})"

    def cause_of_death(self, error: BaseException) -> str:
        """Return Ray's first line about the death and, if the log can be read here, the actor's last lines.

        If the node is gone, its loss is the cause.
        """
        if self.node and self.node.is_gone():
            return f"its node {self.node} is gone (power, network, or a Ray that has ended there)"
        lines = last_lines(self.log_path)
        quoted = "".join(f"\n    {line}" for line in lines)
        return str(error).splitlines()[0] + (f" Its last lines:{quoted}" if lines else "")


@contextmanager
def ray_session() -> Iterator[None]:
    """Join the cluster of RAY_ADDRESS, or start one on this machine that ends with the context.

    Raises EngineError if there is no such cluster or the cluster rejects this process.
    """
    for key, value in RAY_ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    if ray.is_initialized():
        yield
        return
    auto_init_hook.enable_auto_connect = False  # else a thread that is left behind would start a Ray of its own
    address = os.environ.get("RAY_ADDRESS") or "local"
    with ExitStack() as stack:
        if address == "local":
            stack.enter_context(_token_of_its_own())
            _start_local()
        else:
            _join(address)
        stack.callback(ray.shutdown)
        yield


def _start_local(attempts: int = 3) -> None:
    """Start Ray on this machine. Try again if a busy machine was too slow for Ray's own limit of 30 s."""
    before = _descendants()
    for attempt in range(1, attempts + 1):
        try:
            with phase("starting Ray"), outside_the_team(), _own_sigterm(), _closed_to_others():
                show_what_cuda_sees()
                ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
            return
        except BrokenPipeError:  # of our own output, piped into head
            raise
        except Exception as error:  # Ray raises nothing more specific
            ray.shutdown()
            _end(_descendants() - before)  # Ray ends what it has half started only with this process
            if attempt == attempts or "timed out during startup" not in str(error):
                raise EngineError(f"Ray did not start on this machine (attempt {attempt}): {error}") from error


@contextmanager
def _token_of_its_own() -> Iterator[None]:
    """Let a Ray that starts in this context demand a token that only its processes have, unless RAY_AUTH_MODE is set.

    The token is in the environment of these processes and nowhere on a disk.
    """
    if "RAY_AUTH_MODE" in os.environ:
        yield
        return
    before = os.environ.get("RAY_AUTH_TOKEN")
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    _read_authentication()
    try:
        yield
    finally:
        del os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN"]
        if before is not None:
            os.environ["RAY_AUTH_TOKEN"] = before
        _read_authentication()


def _read_authentication() -> None:
    """Let Ray read its authentication variables again, which it has read when it was imported."""
    AuthenticationTokenLoader.instance().reset_cache()
    Config.initialize("")


@contextmanager
def _closed_to_others() -> Iterator[None]:
    """Keep the Ray that starts in this context on the loopback. Ray has this only as a setting for systems on which it
    supports no clusters.
    """
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
    before, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        del os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR]


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep this process's handler of SIGTERM: Ray's own prints the process's stack and ends it at once."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    if handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def _descendants() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


def _end(processes: set[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=GRACE_S)


def show_what_cuda_sees() -> None:
    """Make Ray count only the GPUs that CUDA finds, by shortening CUDA_VISIBLE_DEVICES.

    Ray counts "-1" or "none" as a GPU, and also counts the entries after it.
    """
    if VISIBLE in os.environ:
        given = map(str.strip, os.environ[VISIBLE].split(","))
        os.environ[VISIBLE] = ",".join(takewhile(re.compile(r"\d+|(GPU|MIG)-.+").fullmatch, given))


def _join(address: str) -> None:
    host, _, port = address.rpartition(":")
    try:
        if port.isdigit() and "/" not in host:  # Ray by itself tries for many minutes
            socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_S).close()
        show_token()
        with phase(f"joining Ray at {address}"), _own_sigterm():
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, AuthenticationError) as error:
        raise EngineError(
            f"RAY_ADDRESS = {address!r}: {str(error).partition('. ')[0]}; start Ray there, unset RAY_ADDRESS to start "
            "one here, or give this process the cluster's token (RAY_AUTH_TOKEN_PATH)") from error


def show_token() -> None:
    """Authenticate at clusters with a token from now on, if there is a token and RAY_AUTH_MODE is not set.

    `ray start` demands a token only if it found one. Without this call Ray looks for a token only if no address is
    given. Ray aborts the process if token mode is set and the token is missing. Raises ray's AuthenticationError if
    RAY_AUTH_TOKEN_PATH names no token.
    """
    if "RAY_AUTH_MODE" not in os.environ and AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True):
        os.environ["RAY_AUTH_MODE"] = "token"
        _read_authentication()


def choose_device(recipe: AnyRecipe, *, learner: bool = True, engines: bool = True) -> str:
    """Return "cuda" or "cpu" for this cluster, by run.device. learner, engines: False if none of them is started.

    auto means cuda if packages and GPUs suffice. Otherwise auto means cpu, and a warning gives the reasons.
    Raises ConfigError if cuda is asked for and does not work.
    """
    if recipe.run.device == "cpu":
        return "cpu"
    present = int(ray.cluster_resources().get("GPU", 0))
    sampling, ranks = 0, recipe.learner.num_ranks if learner else 0
    if engines and isinstance(recipe, Recipe) and not (learner and recipe.placement.mode == "colocate"):
        sampling = recipe.rollout.num_engines * recipe.rollout.tensor_parallel_size  # beside the ranks' GPUs
    lacking, scoring = lacking_packages(engines), reward_gpus(recipe)
    if sampling + ranks + scoring > present:
        shown = f", or list more of them in {VISIBLE}, now {os.environ[VISIBLE]!r}" if VISIBLE in os.environ else ""
        lacking.append(
            f"the recipe needs {sampling + ranks + scoring} GPUs (rollout.num_engines x tensor_parallel_size = "
            f"{sampling}, learner.num_ranks = {ranks}{f', rewards[].actor.gpus = {scoring}' if scoring else ''}), but "
            f"the cluster has {present} (lower them or add nodes{shown})")
    device = settled(recipe.run.device, lacking)
    if device == "cuda":
        check_slices(recipe, os.environ.get(VISIBLE, ""))
    return device


def log_path(pid: int) -> str:
    """Return the path of the file with the standard error of an actor's process, on the actor's node."""
    node: Any = ray._private.worker._global_node
    logs = f"{node.get_session_dir_path()}/logs"
    found = glob.glob(f"{logs}/worker-*-{pid}.err")
    return found[0] if found else f"{logs}/worker-*-{pid}.err on the actor's node"


def node_here() -> Node:
    """Return the node of this process."""
    return Node(name=socket.gethostname(), address=ray.util.get_node_ip_address())


def wait_for(phase: str, calls: Sequence[tuple[NamedActor, Any]], timeout_s: float, grace_s: float = 0.0
             ) -> list[Any]:
    """Wait for one call on each actor and return the results in order.

    grace_s: seconds beyond the limit in which an actor may still tell why it did not keep the limit.

    Raises the actor's `DEAD` or `SILENT`, naming phase and actors, if an actor dies, the limit passes, or a collective
    fails. Re-raises frpo's own errors from inside an actor. The first failure ends the wait, because other actors may
    wait long for the failed actor.
    """
    actors = {reference: actor for actor, reference in calls}
    results, waiting, deadline = {}, list(actors), time.monotonic() + timeout_s + grace_s
    while waiting:
        done, waiting = ray.wait(waiting, timeout=max(0.0, deadline - time.monotonic()), fetch_local=False)
        if not done:
            names = ", ".join(str(actors[reference]) for reference in waiting)
            raise actors[waiting[0]].SILENT(f"{phase}: no answer within {timeout_s:g} s from {names}")
        try:
            results[done[0]] = result_of(phase, actors[done[0]], done[0])
        except FrpoError as error:
            raise _cause_of(phase, error, actors, waiting) from error.__cause__
    return [results[reference] for _, reference in calls]


def _cause_of(phase: str, error: FrpoError, actors: Mapping[Any, NamedActor], others: Sequence[Any]) -> FrpoError:
    """Return the error to raise: the death of another actor if `error` only follows from that death, else `error`."""
    if isinstance(error, ActorDeadError):
        return error
    done, silent = ray.wait(list(others), num_returns=len(others), timeout=GRACE_S) if others else ([], [])
    for reference in done:
        try:
            result_of(phase, actors[reference], reference)
        except ActorDeadError as death:
            return death
        except FrpoError:
            continue
    if isinstance(error, LostRankError) and silent:
        return LostRankError(f"{error}; no answer from {', '.join(str(actors[reference]) for reference in silent)}")
    return error


def result_of(phase: str, actor: NamedActor, reference: Any) -> Any:
    """Return the value of one finished reference. See `wait_for` for the errors."""
    try:
        return ray.get(reference, timeout=60)
    except RayTaskError as error:
        if isinstance(error.cause, FrpoError):
            raise error.cause from None
        kind = actor.SILENT if is_of_a_collective(error.cause) else EngineError
        raise kind(f"{phase}: {actor} raised {error.cause!r}") from error
    except GONE as error:
        raise actor.DEAD(f"{phase}: {actor} died: {actor.cause_of_death(error)}") from None
