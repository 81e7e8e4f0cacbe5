"""DeepSpeed for one rank: process group, engine, frozen reference, and gathering of partitioned parameters.

The memory strategy comes from a ds_configs file; batch sizes, precision and clipping come from the recipe. `learner`
decides what is computed with the engine.
"""
from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import deepspeed
import torch
from transformers.integrations import HfDeepSpeedConfig

from frpo.config.learner import LearnerSection
from frpo.config.memory import memory_strategy
from frpo.config.model import ModelSection
from frpo.learner.checkpoint_names import Layout, Stored
from frpo.weight_sync.packing import as_layout, packed_size

SHARED_MEMORY_OP = "deepspeed_shm_comm"


def deepspeed_config(learner: LearnerSection, model: ModelSection, device: torch.device) -> dict[str, Any]:
    """Return the complete DeepSpeed configuration of the policy. The learner owns the accumulation boundary."""
    strategy = memory_strategy(learner.deepspeed)
    if device.type == "cpu":  # a CPU has no second stream for overlap
        strategy["zero_optimization"]["overlap_comm"] = False
    return {
        **strategy,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": learner.grad_clip,
        "bf16": {"enabled": model.dtype == "bf16"},
        # Under bf16 both would be bf16. An update of many micro-batches would then lose small gradients.
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }


def init_process_group(device: torch.device, timeout_s: float) -> None:
    """Join the ranks (RANK, WORLD_SIZE, MASTER_* are in the environment); a collective fails after `timeout_s`."""
    # DeepSpeed still calls some deprecated names of torch.distributed, which a user cannot change.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    if device.type == "cpu":
        # Do not let DeepSpeed compile an all-reduce through shared memory, which takes a minute at first use. Only
        # tensor-parallel inference calls it. Its build waits for ever for the lock of a killed build. Its buffers take
        # 67 MB of /dev/shm per rank and outlive a killed run.
        deepspeed.ops.__compatible_ops__[SHARED_MEMORY_OP] = False
    backend = "nccl" if device.type == "cuda" else "gloo"
    deepspeed.init_distributed(dist_backend=backend, timeout=timedelta(seconds=timeout_s), verbose=False)


@contextmanager
def partitioned_loading(config: dict[str, Any]) -> Iterator[None]:
    """Make `from_pretrained` build ZeRO-3 models partitioned from the start, within the context."""
    keep_alive = HfDeepSpeedConfig(config) if stage_of(config) == 3 else None
    yield
    del keep_alive


def stage_of(config: dict[str, Any]) -> int:
    return int(config["zero_optimization"]["stage"])


def offloads_optimizer(config: dict[str, Any]) -> bool:
    """Return whether the fp32 master weights are on the CPU, and so is the optimizer's work."""
    return (config["zero_optimization"].get("offload_optimizer") or {}).get("device") == "cpu"


def build_policy(build: Callable[[], torch.nn.Module], learner: LearnerSection, config: dict[str, Any],
                 device: torch.device):
    """Build the trainable engine: AdamW over all parameters with gradients, sharded as in `config`."""
    with partitioned_loading(config):
        network = build()
    trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
    # On a GPU, and where the optimizer is offloaded, torch's fused kernel works in one pass over memory and needs no
    # memory of its own. DeepSpeed's CPU Adam does the same, but its compilation at first use takes minutes and a
    # compiler.
    optimizer = torch.optim.AdamW(
        trainable, lr=learner.lr, betas=learner.betas, eps=learner.eps, weight_decay=learner.weight_decay,
        fused=device.type == "cuda" or offloads_optimizer(config) or None)
    _import_muon_uncompiled()
    engine, *_ = deepspeed.initialize(model=network, optimizer=optimizer, config=config)
    engine.train()
    return engine


def _import_muon_uncompiled() -> None:
    """Import DeepSpeed's Muon, which frpo does not use, without `torch.compile`, which would load a compiler for 2 s.

    `deepspeed.initialize` imports Muon in any case.
    """
    compiled: Any = torch.compile
    torch.compile = lambda function: function  # type: ignore[assignment]
    try:
        with suppress(ImportError):  # another version of DeepSpeed
            import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    finally:
        torch.compile = compiled


def build_reference(build: Callable[[], torch.nn.Module], config: dict[str, Any], device: torch.device):
    """Build a frozen copy for KL terms: partitioned like the policy under ZeRO-3, a plain module otherwise."""
    frozen = {**config, "managed_gradient_accumulation": True}
    with partitioned_loading(frozen):
        network = build()
    network.requires_grad_(False)
    if stage_of(config) == 3:
        engine, *_ = deepspeed.initialize(model=network, config=frozen)
        network = engine
    else:
        network.to(device)
    network.eval()
    return network


class GatheredWeights:
    """The tensors of a checkpoint, whole, in buckets of about `bucket_bytes` and in a fixed order.

    Iterating is a collective under ZeRO-3: every rank must iterate to the end, even if a rank fails, or the others
    hang. A tensor is valid until the next bucket is taken. A tied parameter appears once, under its first name. A
    parameter with an adapter appears merged, as a copy. Weights that are stored together, as all experts of a layer,
    are gathered together, however large.
    """

    def __init__(self, stored: Sequence[Stored], bucket_bytes: float):
        self.stored = stored
        self.bucket_bytes = bucket_bytes

    def metadata(self) -> list[Layout]:
        return [layout for entry in self.stored for layout in entry.layout]

    def largest_bucket(self) -> int:
        return max(packed_size(as_layout(layout for entry in bucket for layout in entry.layout))
                   for bucket in _buckets(self.stored, self.bucket_bytes))

    def __iter__(self) -> Iterator[list[tuple[str, torch.Tensor]]]:
        for bucket in _buckets(self.stored, self.bucket_bytes):
            with deepspeed.zero.GatheredParameters([p for entry in bucket for p in _parameters(entry)]):
                yield [named for entry in bucket for named in entry.tensors()]


def full_size(parameter: torch.Tensor) -> int:
    """Return the number of elements of the whole parameter, partitioned or not."""
    return getattr(parameter, "ds_numel", parameter.numel())


def learning_rate(update: int, total_updates: int, learner: LearnerSection) -> float:
    """Return the rate of optimizer update `update` (from 0).

    The rate has a linear warm-up. It is then constant, or falls along a line or a cosine.
    """
    if update < learner.warmup_steps:
        return learner.lr * (update + 1) / (learner.warmup_steps + 1)
    if learner.schedule == "constant":
        return learner.lr
    rest = max(1, total_updates - learner.warmup_steps)
    progress = min(1.0, (update - learner.warmup_steps) / rest)
    fall = progress if learner.schedule == "linear" else (1 - math.cos(math.pi * progress)) / 2
    return learner.lr * (1 - (1 - learner.min_lr_ratio) * fall)


def _parameters(entry: Stored) -> list[torch.Tensor]:
    return [parameter for weight in entry.weights for parameter in weight.parameters]


def _buckets(stored: Sequence[Stored], bucket_bytes: float) -> Iterator[Sequence[Stored]]:
    bucket: list[Stored] = []
    held = 0
    for entry in stored:
        size = sum(full_size(parameter) * parameter.element_size() for parameter in _parameters(entry))
        if bucket and held + size > bucket_bytes:
            yield bucket
            bucket, held = [], 0
        bucket.append(entry)
        held += size
    if bucket:
        yield bucket
