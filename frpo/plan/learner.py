"""Compute the memory of one learner rank's GPU in each phase of its work, by formulas alone.

Legend, as in the printed arithmetic: P parameters, T of them trained, N ranks, b bytes of a parameter (2 in bf16).

Model states follow mixed-precision AdamW under ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054), with gradients added
up in fp32. Activations follow Korthikanti et al. 2022 (arXiv:2205.05198, section 4), for models without dropout, with
gated MLPs, grouped queries and flash attention. Flash attention leaves no term in the square of the length. Tensors
that transformers keeps for a layer beyond the paper's are counted: norms keep an fp32 copy. Memory that torch's
allocator loses to fragments is not counted.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from frpo.config.learner import LearnerSpec
from frpo.config.loader import AnyRecipe
from frpo.config.memory import memory_strategy
from frpo.kernels.chunks import piece_size
from frpo.plan.parts import GB, Part, counted, total
from frpo.plan.shape import Shape

RESERVE = Part(name="reserve", size=2 * GB, how="assumed: CUDA context, NCCL, cuBLAS workspace")
WIDTHS = {"fp32": 4, "bf16": 2}
MASTER, MOMENTS, GRADIENT = 4, 8, 4
"""Bytes of each trained parameter for master weights, AdamW's moments and the gradient, all in fp32."""
HOST_STATES = 20
"""Bytes of CPU memory that offloading takes for each trained parameter: states, gradients twice or with a bf16 copy."""


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """The values of a DeepSpeed JSON on which memory depends. Bucket sizes are in elements."""

    stage: int
    offload_optimizer: bool
    offload_parameters: bool
    overlap: bool
    reduce_bucket: float
    max_live: float
    sub_group: float


@dataclass(frozen=True, kw_only=True)
class Job:
    """The work of a rank. reference: "own" is a separate model, "policy" the policy without adapters, "cache" states on
    disk.

    width: bytes of a parameter. tokens: of a micro-batch. adapter_rank: 0 without LoRA. compared: whether the
    reference's logits are computed beside the policy's. bucket: bytes gathered for a push, 0 without a push. packed:
    whether the bucket is also packed on the GPU. scores: whether the model has a score in place of logits.
    """

    shape: Shape
    reference_shape: Shape
    strategy: Strategy
    ranks: int
    width: int
    tokens: int
    checkpointing: bool
    adapter_rank: int
    reference: Literal["none", "own", "policy", "cache"]
    compared: bool
    bucket: float
    packed: bool
    scores: bool = False

    @property
    def adapters(self) -> int:
        return self.adapter_rank * sum(self.shape.adapted)

    @property
    def parameters(self) -> int:
        return self.shape.parameters + self.adapters

    @property
    def trained(self) -> int:
        return self.adapters or self.shape.parameters

    @property
    def largest_trained(self) -> int:
        """Parameters of the largest tensor that has a gradient; for adapters, an upper bound."""
        return self.adapter_rank * max(self.shape.adapted) if self.adapters else self.shape.largest

    @property
    def share(self) -> int:
        """Number of ranks over which parameters are divided."""
        return self.ranks if self.strategy.stage == 3 else 1


def strategy_of(name: str) -> Strategy:
    """Return the strategy that learner.deepspeed names. Missing keys get DeepSpeed's defaults. Raises ConfigError."""
    zero = memory_strategy(name)["zero_optimization"]
    stage = zero["stage"]
    return Strategy(
        stage=stage, offload_optimizer=_on_cpu(zero, "offload_optimizer"),
        offload_parameters=_on_cpu(zero, "offload_param"), overlap=zero.get("overlap_comm", stage == 3),
        reduce_bucket=zero.get("reduce_bucket_size", 5e8), max_live=zero.get("stage3_max_live_parameters", 1e9),
        sub_group=zero.get("sub_group_size", 1e9))


def _on_cpu(zero: Mapping[str, Any], key: str) -> bool:
    return (zero.get(key) or {}).get("device") == "cpu"


def job_of(recipe: AnyRecipe, shape: Shape, reference_shape: Shape | None = None, backend: str | None = None) -> Job:
    """Return the job of a recipe. reference_shape: None: the policy's shape. backend: of the push, None without a push.
    """
    spec, learner, lora = recipe.learner_spec, recipe.learner, recipe.model.lora
    return Job(
        shape=shape, reference_shape=reference_shape or shape, strategy=strategy_of(learner.deepspeed),
        ranks=learner.num_ranks, width=WIDTHS[recipe.model.dtype], tokens=learner.micro_batch_tokens,
        checkpointing=learner.gradient_checkpointing, adapter_rank=lora.r if lora else 0,
        reference=_reference(spec), compared=_compares(spec), scores=spec.is_reward_model,
        packed=backend in ("nccl", "ipc"),
        bucket=max(spec.bucket_mb * 2**20, shape.largest * WIDTHS[recipe.model.dtype]) if backend else 0)


def _reference(spec: LearnerSpec) -> Literal["none", "own", "policy", "cache"]:
    if spec.reference == "cache":
        return "cache"
    if spec.policy_is_reference:
        return "policy"
    return "own" if spec.reference == "live" else "none"


def _compares(spec: LearnerSpec) -> bool:
    policy, supervised = spec.policy_loss, spec.supervised_loss
    return (policy is not None and policy.needs_states) or (supervised is not None and supervised.needs_reference)


# --- what stays -------------------------------------------------------------------------------------------------------

def weights(job: Job) -> Part:
    """Return the policy's weights, adapters included: b P, divided by N under ZeRO-3, on the CPU with offload_param."""
    if job.strategy.offload_parameters:
        return Part(name="weights", size=0, how="on the CPU (offload_param)")
    return Part(name="weights", size=job.width * job.parameters / job.share,
                how=f"{job.width} B x {counted(job.parameters)}{_over(job.share)}")


def reference(job: Job) -> Part:
    """Return the weights of the frozen reference, or of its output head alone if its states come from disk."""
    if job.reference == "cache":
        head = job.reference_shape.vocabulary * job.reference_shape.width
        return Part(name="reference head", size=job.width * head,
                    how=f"{job.width} B x {counted(head)}, states on disk")
    if job.reference != "own":
        how = "the policy without adapters" if job.reference == "policy" else "none is needed"
        return Part(name="reference", size=0, how=how)
    return _frozen_copy(job)


def _frozen_copy(job: Job) -> Part:
    if job.strategy.offload_parameters:
        return Part(name="reference", size=0, how="on the CPU (offload_param)")
    parameters = job.reference_shape.parameters
    return Part(name="reference", size=job.width * parameters / job.share,
                how=f"{job.width} B x {counted(parameters)}{_over(job.share)}")


def optimizer(job: Job) -> Part:
    """Return fp32 master weights and AdamW's two moments: 12 T / N, on the CPU with offload_optimizer."""
    if job.strategy.offload_optimizer:
        return Part(name="optimizer", size=0, how="on the CPU (offload_optimizer)")
    return Part(name="optimizer", size=(MASTER + MOMENTS) * job.trained / job.ranks,
                how=f"12 B x {counted(job.trained)} trained{_over(job.ranks)}")


def gradients(job: Job) -> Part:
    """Return the gradients, added up in fp32 over an update's micro-batches.

    Size: 4 T under ZeRO-1, where each rank holds all gradients, else 4 T / N; on the CPU with offload_optimizer.
    """
    if job.strategy.offload_optimizer:
        return Part(name="gradients", size=0, how="on the CPU (offload_optimizer)")
    share = 1 if job.strategy.stage == 1 else job.ranks
    return Part(name="gradients", size=GRADIENT * job.trained / share,
                how=f"4 B x {counted(job.trained)} trained{_over(share)}")


def model_states(job: Job) -> float:
    """Return the bytes of weights, optimizer and gradients of trained parameters, as DeepSpeed's estimators count them.
    """
    frozen = 0 if job.strategy.offload_parameters else job.width * (job.parameters - job.trained) / job.share
    return total([weights(job), optimizer(job), gradients(job)]) - frozen


# --- what passes ------------------------------------------------------------------------------------------------------

def gathered(job: Job) -> Part:
    """Return whole parameters under ZeRO-3: stage3_max_live_parameters, at least the largest layer, at most P."""
    if job.strategy.stage < 3 or (job.ranks == 1 and not job.strategy.offload_parameters):
        return Part(name="gathered weights", size=0, how="weights are whole")
    live = min(job.parameters, max(job.strategy.max_live, max(job.shape.layers, default=0), job.shape.largest))
    return Part(name="gathered weights", size=job.width * live,
                how=f"{job.width} B x {counted(live)} (stage3_max_live_parameters)")


def layer_token(job: Job) -> int:
    """Return the bytes that one layer keeps of one token for its backward pass.

    Each of two norms takes (4 + 2 b) d + 4: an fp32 copy of its input, the normalised state and the output. Queries,
    keys, values and the attention's output take b (2 a + 2 k), and flash attention 4 for each head. The MLP takes
    4 b f, or 2 b f if it is not gated. LoRA keeps b r for every adapter and no normalised state.
    """
    shape, b = job.shape, job.width
    norms = 2 * ((4 + 2 * b) * shape.width + 4)
    attention = b * (2 * shape.queries + 2 * shape.keys) + 4 * shape.heads
    mlp = (4 if shape.gated else 2) * b * shape.inner
    if shape.head_norms:
        attention += (4 + b) * (shape.queries + shape.keys) + 4 * (shape.heads + shape.kv_heads)
    adapters = 0
    if job.adapter_rank:
        adapters = b * (job.adapter_rank * len(shape.adapted) // max(1, len(shape.layers)) - 2 * shape.width)
    return norms + attention + mlp + adapters


def activations(job: Job) -> Part:
    """Return the activations of one micro-batch: those of every layer. With gradient_checkpointing, count every layer's
    input and the activations of one layer.

    The final norm, the states at the head with their fp32 gradient, and two gradients of a layer's widest tensor are
    added.
    """
    shape, b, layers = job.shape, job.width, len(job.shape.layers)
    ends = (4 + b) * shape.width + (2 * b + 4) * shape.width + 2 * b * max(shape.inner, shape.width)
    kept, how = layers * layer_token(job), f"{layers} layers x {layer_token(job):,} B"
    if job.checkpointing:
        kept = layers * b * shape.width + layer_token(job)
        how = f"{layers} inputs x {b * shape.width:,} B + one layer {layer_token(job):,} B"
    return Part(name="activations", size=job.tokens * (kept + ends),
                how=f"{job.tokens:,} tokens x ({how} + ends {ends:,} B)")


def logits(job: Job) -> Part:
    """Return the fp32 logits of a chunk (`frpo.kernels.chunks`). If distributions are compared, add the reference's."""
    if job.scores:
        return Part(name="logits in pieces", size=0, how="a reward model has one score in their place")
    size, models = piece_size(job.tokens, job.shape.vocabulary), 2 if job.compared else 1
    return Part(name="logits in pieces", size=4 * models * size,
                how=f"4 B x {counted(size)}{' x 2, the reference too' if job.compared else ''}")


def reducing(job: Job) -> Part:
    """Return the memory to reduce gradients between ranks: buckets, the fp32 copy that is sent, the largest gradient.
    """
    strategy, largest = job.strategy, job.largest_trained
    buckets = (2 * job.width if strategy.overlap else job.width) if strategy.stage == 2 else 4
    sent = 0 if job.width == 4 else 4 * max(min(strategy.reduce_bucket, job.trained), largest)
    return Part(name="reduction", size=buckets * strategy.reduce_bucket + sent + job.width * largest,
                how=f"buckets of {counted(strategy.reduce_bucket)}, largest gradient {counted(largest)}")


def reference_head(job: Job) -> Part:
    """Return the reference's output head, gathered while the policy is compared with the reference."""
    shape, needed = job.reference_shape, job.compared and job.reference == "own" and job.strategy.stage == 3
    return Part(name="reference head", size=job.width * shape.vocabulary * shape.width if needed else 0,
                how="gathered")


def stepping(job: Job) -> Part:
    """Return the second copy of a rank's fp32 gradients: all under ZeRO-1, flattened; one sub-group under ZeRO-3."""
    stage, own = job.strategy.stage, job.trained / job.ranks
    size = {1: own, 2: 0, 3: min(own, job.strategy.sub_group)}[stage]
    return Part(name="optimizer's copy of gradients", size=0 if job.strategy.offload_optimizer else GRADIENT * size,
                how=f"4 B x {counted(size)}")


def pushing(job: Job) -> Part:
    """Return the buffers of a push: the bucket gathered (ZeRO-3) or merged (LoRA), and packed for nccl and ipc.

    Merging LoRA also needs fp32 temporaries of 8 B for each parameter of the largest tensor.
    """
    copies = (job.strategy.stage == 3 or job.adapter_rank > 0) + job.packed
    merging = 8 * job.shape.largest if job.adapter_rank else 0
    size = copies * job.bucket + merging if job.bucket else 0
    return Part(name="push buffers", size=size, how=f"{copies} x bucket of {job.bucket / 2**20:,.0f} MiB")


# --- phases -----------------------------------------------------------------------------------------------------------

def kept(job: Job, *, offloaded: bool = False) -> tuple[Part, ...]:
    """Return the parts that a rank holds while engines sample. offloaded: after placement.offload_optimizer has moved
    the optimizer and gradients to the CPU.

    Only ZeRO-3 keeps its buffer of gradients between updates.
    """
    states = [] if offloaded else [optimizer(job), *([gradients(job)] if job.strategy.stage == 3 else [])]
    return weights(job), *states, reference(job), RESERVE


def phases(job: Job) -> dict[str, tuple[Part, ...]]:
    """Return phase of the rank's work -> all parts on the GPU."""
    states = weights(job), optimizer(job), gradients(job), reference(job)
    passing = gathered(job), activations(job), logits(job), reducing(job), reference_head(job)
    found = {
        "forward, backward": (*states, *(part for part in passing if part.size), RESERVE),
        "optimizer step": (*states, stepping(job), RESERVE)}
    if job.bucket:
        found["push"] = (*kept(job), pushing(job))
    if job.reference == "cache":
        found["filling the cache"] = _filling(job)
    return found


def peak(job: Job) -> tuple[str, tuple[Part, ...]]:
    """Return the phase that needs most memory, and its parts."""
    return max(phases(job).items(), key=lambda item: total(item[1]))


def _filling(job: Job) -> tuple[Part, ...]:
    """Return the parts while the cache is filled, before the first update. AdamW has no moments yet, and the reference
    is whole or partitioned as the policy is.
    """
    size = 0 if job.strategy.offload_optimizer else MASTER * job.trained / job.ranks
    master = Part(name="master weights", size=size, how=f"4 B x {counted(job.trained)}{_over(job.ranks)}")
    layer = Part(name="one layer's activations", size=job.tokens * layer_token(job), how="nothing is kept")
    return weights(job), master, _frozen_copy(job), gathered(job), layer, RESERVE


def host(job: Job) -> Part:
    """Return the CPU memory of each rank. The b P that loading an unpartitioned model briefly takes are not counted."""
    states = HOST_STATES * job.trained / job.ranks if job.strategy.offload_optimizer else 0
    models = job.parameters + (job.reference_shape.parameters if job.reference == "own" else 0)
    moved = job.width * models / job.ranks if job.strategy.offload_parameters else 0
    return Part(name="offloaded states", size=states + moved, how=f"{HOST_STATES} B x {counted(job.trained)} trained"
                f"{' + weights' if moved else ''}{_over(job.ranks)}")


def _over(share: int) -> str:
    return f" / {share}" if share > 1 else ""
