"""Token losses from hidden states and the LM head: frpo.kernels beside the plain computation, and liger-kernel's.

    python benchmarks/token_losses.py                      every loss, V = 32000 and 152064, D = 1024 and 4096
    python benchmarks/token_losses.py --vocab 32000 --hidden 1024 --tokens 4096 --json results.json

A row is one forward and backward pass of one loss with hidden states and head trained. The plain side keeps the logits
of all tokens, leaves out what its loss does not need, and in bfloat16 rounds the logits, as such code does. Time: both
sides alternate; the ratio is the median of the paired ratios. On a CPU with one thread it is CPU time, so that other
work on the machine does not count; with more threads it is wall time.
Memory: the most that is allocated during the pass, less the gradients that it returns; inputs do not count. On CUDA it
is the allocator's peak; on a CPU the running sum of the profiler's record of every allocation and release, which holds
temporaries within operators but not the work space of the BLAS library. Nothing is compared across runs.
"""
from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile

from frpo.kernels import ReferenceHead, TokenStats, linear_cross_entropy, linear_logprobs, linear_token_loss
from frpo.kernels import rows as torch_rows
from frpo.kernels.chunks import ChunkedLogits
from frpo.kernels.reference import stats_of_logits
from frpo.objectives.csft import CSFT, CSFTPA
from frpo.objectives.supervised import Progress, SupervisedInputs

Pass = Callable[[], Tensor]
LOSSES = ("log-probs + entropy", "policy + k3", "cross-entropy", "CSFT", "CSFT + PA")
MEMORY_TARGET, TIME_TARGET = 1 / 8, 1.0
NAIVE_BYTES, NAIVE_COPIES = 10 * 2**30, 8
"""On a CPU the plain side, about this many float32 [N, V], is to fit."""
CPU_FLOPS = 2e12
"""On a CPU the three products of one pass are to stay below this."""
PEAK = {torch.float32: 67e12, torch.bfloat16: 989e12, "bytes": 3.35e12}
"""FLOP/s and byte/s of one H100 SXM, for the floor on CUDA."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One size: N tokens, V vocabulary, D hidden width; the reference has the same width and its own head."""

    hidden_ND: Tensor
    head_VD: Tensor
    target_N: Tensor
    reference: ReferenceHead
    weight_N: Tensor
    noise_N: Tensor
    chunk_rows: int

    @classmethod
    def of(cls, N: int, V: int, D: int, dtype: torch.dtype, device: str, chunk_rows: int) -> Problem:
        torch.manual_seed(0)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.randn(*shape, device=device, dtype=dtype).mul_(scale)

        reference = ReferenceHead(hidden_NE=normal(N, D), head_VE=normal(V, D, scale=D**-0.5))
        return cls(hidden_ND=normal(N, D).requires_grad_(), head_VD=normal(V, D, scale=D**-0.5).requires_grad_(),
                   target_N=torch.randint(V, (N,), device=device), reference=reference, chunk_rows=chunk_rows,
                   weight_N=torch.full((N,), 1 / N, device=device), noise_N=normal(N, scale=0.1).float())

    @property
    def trained(self) -> list[Tensor]:
        return [self.hidden_ND, self.head_VD]

    def logits(self) -> Tensor:
        return (self.hidden_ND @ self.head_VD.t()).float()

    @torch.no_grad()
    def reference_logits(self) -> Tensor:
        return (self.reference.hidden_NE @ self.reference.head_VE.t()).float()

    def floor_seconds(self, with_reference: bool) -> float:
        """Three products (four with a reference) or reading operands and writing gradients, whichever is longer."""
        products, dtype = 4 if with_reference else 3, self.head_VD.dtype
        flops = 2 * products * len(self.hidden_ND) * self.head_VD.numel()
        moved = (products - 1) * sum(tensor.nbytes for tensor in self.trained)
        return max(flops / PEAK[dtype], moved / PEAK["bytes"])


def policy(problem: Problem) -> Callable[[TokenStats, slice], Tensor]:
    """Clipped surrogate with the k3 estimate of the KL to a reference; old and reference are near the policy."""
    def loss(stats: TokenStats, rows: slice) -> Tensor:
        noise_N, current_N = problem.noise_N[rows], stats.logprobs_N.detach()
        ratio_N = torch.exp(stats.logprobs_N - current_N + noise_N)
        surrogate_N = torch.minimum(ratio_N * noise_N, ratio_N.clamp(0.8, 1.2) * noise_N)
        d_N = current_N - stats.logprobs_N + noise_N
        return (problem.weight_N[rows] * (0.01 * (torch.expm1(d_N) - d_N) - surrogate_N)).sum()
    return loss


def csft(problem: Problem, loss: CSFT) -> Callable[[TokenStats, slice], Tensor]:
    def callback(stats: TokenStats, rows: slice) -> Tensor:
        cached_N = stats.logprobs_N.detach() + problem.noise_N[rows]
        given = SupervisedInputs(
            logprobs_N=stats.logprobs_N, ref_logprobs_N=cached_N if stats.kl_N is None else stats.ref_logprobs_N,
            weight_N=problem.weight_N[rows], position_N=torch.zeros_like(cached_N), kl_N=stats.kl_N,
            margin_N=stats.margin_N, agree_N=stats.agree_N)
        return loss.loss(given, Progress(epochs_done=0, num_epochs=1)).loss_sum
    return callback


def passes(problem: Problem) -> dict[str, tuple[Pass, Pass]]:
    """Loss -> (plain, ours), forward only."""
    p, everything = problem, slice(0, len(problem.hidden_ND))
    operands, chunk = (p.hidden_ND, p.head_VD, p.target_N), {"chunk_rows": p.chunk_rows}
    policy_loss, csft_loss = policy(p), csft(p, CSFT(beta_first=0.1))
    pa_loss = csft(p, CSFTPA(beta_first=0.1, delta_start=0.2, delta_end=0.2))

    def with_entropy(logprobs_N: Tensor, entropy_N: Tensor) -> Tensor:
        return -(p.weight_N * (logprobs_N + 0.01 * entropy_N)).sum()

    def plain_entropy() -> Tensor:
        stats = stats_of_logits(p.logits(), p.target_N)
        return with_entropy(stats.logprobs_N, stats.entropy_N)

    def plain(loss: Callable[[TokenStats, slice], Tensor]) -> Tensor:
        return loss(stats_of_logits(p.logits(), p.target_N, entropy=False), everything)

    def plain_pa() -> Tensor:
        return pa_loss(stats_of_logits(p.logits(), p.target_N, p.reference_logits(), entropy=False), everything)

    return {
        "log-probs + entropy": (plain_entropy, lambda: with_entropy(*linear_logprobs(*operands, **chunk))),
        "policy + k3": (lambda: plain(policy_loss), lambda: linear_token_loss(*operands, policy_loss, **chunk)),
        "cross-entropy": (lambda: cross_entropy(p.logits(), p.target_N),
                          lambda: linear_cross_entropy(*operands, p.weight_N, **chunk)),
        "CSFT": (lambda: plain(csft_loss), lambda: linear_token_loss(*operands, csft_loss, **chunk)),
        "CSFT + PA": (plain_pa,
                      lambda: linear_token_loss(*operands, pa_loss, reference=p.reference, **chunk)),
    }


def liger_passes(problem: Problem) -> dict[str, Pass]:
    """Loss -> what liger-kernel has nearest to it; empty without it or without CUDA.

    Its Jensen-Shannon loss stands beside PA: one full distribution against another, though another loss.
    """
    if not problem.hidden_ND.is_cuda or importlib.util.find_spec("liger_kernel") is None:
        return {}
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss, LigerFusedLinearJSD
    p, reference, V = problem, problem.reference, len(problem.head_VD)
    entropy, jsd = LigerFusedLinearCrossEntropyLoss(), LigerFusedLinearJSD()
    grpo = LigerFusedLinearGRPOLoss(beta=0.01)
    sequences = math.gcd(8, len(p.hidden_ND))  # its chunks are whole sequences

    def rows(values_N: Tensor) -> Tensor:
        return values_N.view(sequences, -1)

    near_N = p.noise_N - math.log(V)
    return {
        "cross-entropy": lambda: entropy(p.head_VD, p.hidden_ND, p.target_N),
        "CSFT + PA": lambda: jsd(p.hidden_ND, p.head_VD, reference.hidden_NE, reference.head_VE, p.target_N),
        "policy + k3": lambda: grpo(
            p.hidden_ND.view(sequences, -1, p.hidden_ND.shape[1]), p.head_VD, rows(p.target_N),
            attention_mask=torch.ones_like(rows(p.target_N)), advantages=torch.ones_like(near_N[:sequences]),
            old_per_token_logps=rows(near_N), ref_per_token_logps=rows(near_N))[0],
    }


@contextmanager
def row_operations(side: str) -> Iterator[None]:
    """The side "torch" runs on plain PyTorch rows even where Triton would be chosen."""
    chosen = ChunkedLogits.row_ops
    if side == "torch":
        ChunkedLogits.row_ops = torch_rows
    try:
        yield
    finally:
        ChunkedLogits.row_ops = chosen


def step(problem: Problem, forward: Pass) -> None:
    for tensor in problem.trained:
        tensor.grad = None
    forward().backward()


def seconds(problem: Problem, forward: Pass) -> float:
    cuda = problem.hidden_ND.is_cuda
    clock = time.process_time if not cuda and torch.get_num_threads() == 1 else time.perf_counter
    if cuda:
        torch.cuda.synchronize()
    start = clock()
    step(problem, forward)
    if cuda:
        torch.cuda.synchronize()
    return clock() - start


def peak_bytes(problem: Problem, forward: Pass) -> int:
    """Peak above the inputs and the gradients that are returned."""
    returned = sum(tensor.nbytes for tensor in problem.trained)
    for tensor in problem.trained:
        tensor.grad = None
    if problem.hidden_ND.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(problem, forward)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before - returned
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step(problem, forward)
    events = [(event.start_ns(), event.nbytes()) for event in profiler.profiler.kineto_results.events()
              if event.name() == "[memory]"]
    now = peak = 0
    for _, change in sorted(events, key=lambda event: event[0]):
        now += change
        peak = max(peak, now)
    return peak - returned


@dataclass(frozen=True, kw_only=True)
class Result:
    loss: str
    side: str
    tokens: int
    vocab: int
    hidden: int
    dtype: str
    chunk_rows: int
    naive_seconds: float
    seconds: float
    time_ratio: float
    naive_bytes: int
    bytes: int
    floor_share: float | None

    @property
    def memory_ratio(self) -> float:
        return self.bytes / self.naive_bytes


def measure(problem: Problem, loss: str, side: str, naive: Pass, ours: Pass, naive_bytes: int, repeats: int) -> Result:
    with row_operations(side):
        ours_bytes = peak_bytes(problem, ours)  # and warms it
        pairs = [(seconds(problem, naive), seconds(problem, ours)) for _ in range(repeats)]
    best = min(pair[1] for pair in pairs)
    floor = problem.floor_seconds(loss == "CSFT + PA") / best if problem.hidden_ND.is_cuda else None
    return Result(
        loss=loss, side=side, tokens=len(problem.hidden_ND), vocab=len(problem.head_VD),
        hidden=problem.hidden_ND.shape[1], dtype=str(problem.head_VD.dtype).removeprefix("torch."),
        chunk_rows=problem.chunk_rows, naive_seconds=min(pair[0] for pair in pairs), seconds=best,
        time_ratio=statistics.median(ours / naive for naive, ours in pairs), naive_bytes=naive_bytes,
        bytes=ours_bytes, floor_share=floor)


def sides(problem: Problem, loss: str, ours: Pass) -> dict[str, Pass]:
    if not problem.hidden_ND.is_cuda:
        return {"torch": ours}
    liger = liger_passes(problem).get(loss)
    return {"triton": ours, "torch": ours} | ({"liger": liger} if liger else {})


def feasible_tokens(V: int, D: int) -> int:
    """What a CPU can do: the plain side fits, and a pass takes under a minute or so. At most 4096, multiples of 128."""
    fits = min(NAIVE_BYTES // (NAIVE_COPIES * 4 * V), int(CPU_FLOPS / (6 * V * D)))
    return max(128, min(4096, fits // 128 * 128))


def table(results: list[Result]) -> Table:
    """The rows of one size."""
    size = results[0]
    table = Table(
        "loss", "side", "plain s", "s", "time", "plain MiB", "MiB", "memory", "floor", title=
        f"N = {size.tokens}, V = {size.vocab}, D = {size.hidden}, {size.dtype}, chunk_rows = {size.chunk_rows}")
    for r in results:
        time_colour = "green" if r.time_ratio <= TIME_TARGET else "red"
        memory_colour = "green" if r.memory_ratio <= MEMORY_TARGET else "red"
        table.add_row(
            r.loss, r.side, f"{r.naive_seconds:.3g}", f"{r.seconds:.3g}", f"[{time_colour}]{r.time_ratio:.2f}",
            f"{r.naive_bytes / 2**20:.0f}", f"{r.bytes / 2**20:.0f}",
            f"[{memory_colour}]1/{1 / r.memory_ratio:.1f}", "" if r.floor_share is None else f"{r.floor_share:.0%}")
    return table


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, help="N; default 4096, on a CPU as many as are feasible")
    parser.add_argument("--vocab", type=int, nargs="+", default=[32000, 152064])
    parser.add_argument("--hidden", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default bfloat16, on a CPU float32")
    parser.add_argument("--loss", nargs="+", choices=LOSSES, help="default all")
    parser.add_argument("--chunk-rows", type=int, help="default 768, at most N / 5")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, given.dtype or ("float32" if device == "cpu" else "bfloat16"))
    torch.set_num_threads(given.threads)
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {given.threads} thread(s)"
    console, everything = Console(), []
    console.print(f"{name}, torch {torch.__version__}; targets: time <= {TIME_TARGET:g}, "
                  f"memory <= 1/{1 / MEMORY_TARGET:g}")
    for V, D in itertools.product(given.vocab, given.hidden):
        N = given.tokens or (4096 if device == "cuda" else feasible_tokens(V, D))
        problem = Problem.of(N, V, D, dtype, device, chunk_rows=given.chunk_rows or max(1, min(768, N // 5)))
        results = []
        for loss, (naive, ours) in passes(problem).items():
            if given.loss and loss not in given.loss:
                continue
            naive_bytes = peak_bytes(problem, naive)
            results += [measure(problem, loss, side, naive, forward, naive_bytes, given.repeats)
                        for side, forward in sides(problem, loss, ours).items()]
        console.print(table(results))
        everything += results
    if given.json:
        given.json.write_text(json.dumps([asdict(result) for result in everything], indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
