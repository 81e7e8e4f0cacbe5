"""Compute the memory of one rollout engine's worker, by formulas alone.

vLLM takes gpu_memory_utilization of a GPU. Weights and workspace come first, and the KV cache is what is left.
"""
from __future__ import annotations

from dataclasses import dataclass

from frpo.config.sections import Recipe
from frpo.plan.learner import WIDTHS
from frpo.plan.parts import GB, Part, counted, total
from frpo.plan.shape import Shape

WORKSPACE = Part(name="workspace", size=4 * GB,
                 how="assumed: largest batch, sampler, CUDA graphs, NCCL, CUDA context")
ASLEEP = Part(name="sleeping engine", size=2 * GB, how="assumed: CUDA context, NCCL, CUDA graphs")


@dataclass(frozen=True, kw_only=True)
class Worker:
    """One of an engine's workers. width: bytes of a parameter. workers: number in one engine. gpu: bytes of the GPU.

    longest: tokens of the engine's window. sequence: most tokens of a sample. in_flight: tokens of one step that come
    to one engine. most: sequences that the engine may run at once, None for vLLM's choice. staged, backend: settings
    of the push. bucket: bytes of a push's bucket.
    """

    shape: Shape
    width: int
    workers: int
    gpu: float
    utilization: float
    longest: int
    sequence: int
    in_flight: float
    most: int | None
    staged: bool
    backend: str
    bucket: float


def worker_of(recipe: Recipe, shape: Shape, gpu: float, backend: str) -> Worker:
    """Return the worker of a recipe. gpu: bytes of the GPU's memory. backend: backend of the push, not auto."""
    rollout, width = recipe.rollout, WIDTHS[recipe.model.dtype]
    section = recipe.weight_sync.model_copy(update={"backend": backend})
    sequence = recipe.data.max_prompt_tokens + rollout.max_new_tokens
    return Worker(
        shape=shape, width=width, workers=rollout.tensor_parallel_size, gpu=gpu,
        utilization=rollout.gpu_memory_utilization, longest=recipe.model.max_length, sequence=sequence,
        in_flight=step_tokens(recipe) / rollout.num_engines, most=rollout.engine_kwargs.get("max_num_seqs"),
        staged=section.staged_here, backend=backend,
        bucket=max(recipe.weight_sync.bucket_mb * 2**20, shape.largest * width))


def step_tokens(recipe: Recipe) -> int:
    """Return the most tokens of one step: prompts and completions of all samples."""
    rollout = recipe.rollout
    return (rollout.prompts_per_step * rollout.group_size
            * (recipe.data.max_prompt_tokens + rollout.max_new_tokens))


def token_bytes(worker: Worker) -> float:
    """Return the bytes of a token in the cache: keys and values of every layer, 2 x layers x kv heads x head size x
    width.

    Heads are divided over the workers; each worker has at least one head.
    """
    heads = max(1.0, worker.shape.kv_heads / worker.workers)
    return 2 * len(worker.shape.layers) * heads * worker.shape.head_size * worker.width


def weights(worker: Worker) -> Part:
    return Part(name="engine's weights", size=worker.width * worker.shape.parameters / worker.workers,
                how=f"{worker.width} B x {counted(worker.shape.parameters)}"
                    f"{f' / {worker.workers} workers' if worker.workers > 1 else ''}")


def cache(worker: Worker) -> Part:
    """Return the KV cache: the rest of the engine's share of the GPU. Its size is below 0 if nothing is left."""
    size = worker.utilization * worker.gpu - total([weights(worker), WORKSPACE])
    return Part(name="KV cache", size=size, how=f"rest of {worker.utilization:g} x GPU, {token_bytes(worker):,.0f} B a "
                                                f"token: {cache_tokens(size, worker):,} tokens")


def cache_tokens(size: float, worker: Worker) -> int:
    """Return the number of tokens that fit into `size` bytes of cache."""
    return max(0, int(size // token_bytes(worker)))


def at_once(worker: Worker) -> int:
    """Return the number of sequences of full length that run together in one engine."""
    fit = cache_tokens(cache(worker).size, worker) // worker.sequence
    step = int(worker.in_flight // worker.sequence)
    return min(fit, step, worker.most or fit)


def smallest(worker: Worker) -> tuple[Part, ...]:
    """Return the parts that vLLM needs to start: weights, workspace and a cache that holds one window."""
    return weights(worker), WORKSPACE, Part(
        name="KV cache of one window", size=worker.longest * token_bytes(worker),
        how=f"{worker.longest:,} tokens (model.max_length) x {token_bytes(worker):,.0f} B")


def receiving(worker: Worker) -> Part:
    """Return the push buffers on the GPU, beside the engine's share: one arriving bucket. A staged push holds the whole
    model on each worker.

    gloo and cpu_shm send weights through the CPU's memory, ipc through the rank's own buffer.
    """
    if worker.staged and worker.backend in ("nccl", "ipc"):
        size: float = worker.width * worker.shape.parameters
        how = "a staged model (weight_sync.staged)"
    else:
        size, how = worker.bucket if worker.backend == "nccl" else 0, f"{worker.backend}, in place"
    return Part(name="push buffers", size=size, how=how)


def host(worker: Worker) -> Part:
    """Return the CPU memory of each worker: a staged model or a bucket by gloo or cpu_shm, shared memory included."""
    through = worker.backend in ("gloo", "cpu_shm")
    size = worker.width * worker.shape.parameters if worker.staged else worker.bucket
    return Part(name="staged model" if worker.staged else "bucket", size=size if through else 0,
                how=f"weight_sync.backend: {worker.backend}")


def sampling(worker: Worker) -> tuple[Part, ...]:
    """Return all parts that an awake engine takes of a GPU."""
    left = cache(worker)
    return weights(worker), WORKSPACE, Part(name=left.name, size=max(0, left.size), how=left.how)
