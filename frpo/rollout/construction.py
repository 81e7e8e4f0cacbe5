"""Build a vLLM engine: the environment of its process, its arguments, and the errors that end the process.

CPU and GPU engines are the same except in the lines that name a difference.
"""
from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from frpo.config.model import LoraSection
from frpo.config.rollout import RolloutSection
from frpo.config.sections import Recipe
from frpo.errors import ConfigError
from frpo.weight_sync.protocol import engine_backend

logger = logging.getLogger(__name__)

ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    # Keep vLLM's core in the engine's process: the core ends with the process, leaves no orphan, and steps on request.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
CPU_ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # Without this, the first call that asks for log-probabilities compiles a kernel for many seconds.
    "TORCH_COMPILE_DISABLE": "1",
}
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks of adapters that vLLM supports (vllm.config.lora.MaxLoRARanks)."""
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def environment(rollout: RolloutSection, device: str) -> dict[str, str]:
    """Return the variables of an engine's process and of its workers. The workers share the engine's threads."""
    if device != "cpu":
        return dict(ENVIRONMENT)
    threads = max(1, rollout.threads // rollout.tensor_parallel_size)
    return ENVIRONMENT | CPU_ENVIRONMENT | {"OMP_NUM_THREADS": str(threads)}


def arguments(recipe: Recipe, model_path: str, device: str, index: int) -> dict[str, Any]:
    """Return the arguments of vLLM's `LLM` for engine `index`. weight_sync.backend must not be auto."""
    from frpo.rollout.executor import WholeExecutor

    rollout, on_cpu = recipe.rollout, device == "cpu"
    # On CPU, vLLM fails if it splits the prompt of a seeded request over two passes. So no prompt is split there.
    memory = ({"kv_cache_memory_bytes": rollout.kv_cache_mb * 2**20, "enable_chunked_prefill": False} if on_cpu
              else {"gpu_memory_utilization": rollout.gpu_memory_utilization})
    return dict(
        model=model_path, dtype=DTYPES[recipe.model.dtype], max_model_len=recipe.model.max_length,
        tensor_parallel_size=rollout.tensor_parallel_size,
        distributed_executor_backend=WholeExecutor if rollout.tensor_parallel_size > 1 else None,
        block_size=rollout.block_size, enforce_eager=on_cpu, seed=index,
        trust_remote_code=recipe.model.trust_remote_code, logprobs_mode="processed_logprobs",
        weight_transfer_config={"backend": engine_backend(recipe.weight_sync.backend)},
        worker_extension_cls="frpo.rollout.weight_receiver.WorkerExtension",
        # With async scheduling, a batch in flight during a push would report the version of the batch after it.
        async_scheduling=False if rollout.max_staleness else None,
        # The learner's logits are fp32 sums of bf16 products; so are the engine's with an fp32 head.
        hf_overrides={"head_dtype": "float32"}, enable_sleep_mode=recipe.placement.sleeps and not on_cpu, **memory,
        **adapter_arguments(recipe), **rollout.engine_kwargs)


def adapter_arguments(recipe: Recipe) -> dict[str, Any]:
    """Return the extra arguments of an engine that receives adapters alone; {} for other engines."""
    if not (recipe.weight_sync.adapters and recipe.model.lora):
        return {}
    rank = next((rank for rank in RANKS if rank >= recipe.model.lora.r), None)
    if rank is None:
        raise ConfigError(f"model.lora.r = {recipe.model.lora.r} is above {RANKS[-1]}, the largest rank of an adapter "
                          "in vLLM; lower model.lora.r, or set weight_sync.adapters to false")
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": rank}


def adapter_config(lora: LoraSection, names: Iterable[str]) -> dict[str, Any]:
    """Return the content of peft's adapter_config.json. names: the adapters' tensors, such as
    ...q_proj.lora_A.weight.
    """
    return {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": lora.r, "lora_alpha": lora.alpha, "bias": "none",
            "target_modules": sorted({name.split(".")[-3] for name in names})}


@contextmanager
def ends_if_broken() -> Iterator[None]:
    """End the process if an error in this context leaves the engine unable to work.

    A dead process is detected and restarted. An engine that answers but cannot work would not be detected.
    """
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        yield
    except (EngineDeadError, torch.AcceleratorError):
        logger.exception("this engine cannot continue; its process ends")
        os._exit(1)
