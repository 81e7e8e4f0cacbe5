"""The LSTM pre-experiments of the CSFT+PA paper: does preference alignment (PA) keep a policy near its reference?

    python benchmarks/lstm.py                                   both experiments, 5 seeds; minutes on one core
    python benchmarks/lstm.py --experiment 1 --seeds 1 --output pictures --json results.json

Sequences come from two Markov chains. The reference learns chain A. The policy then learns, from scratch, chain B,
whose next-token distributions are half A's and half new ones: each loss from the same weights on the same batches.

1  Policy: LSTM and one FC layer (the head). Reference: a wider LSTM, 3 residual FC layers and the head, twice the
   parameters. CE beside CE + PA and PA alone. The paper has CE against PA, and leaves open whether PA replaces CE or
   is added to it; its numbers stand beside all of these.
2  Policy: 2-layer LSTM, width-preserving FC layer, head. Reference: 3-layer LSTM, widening FC layer, head. CSFT beside
   CSFT + PA, with the paper's betas and delta. The paper shows pictures without numbers, so directions stand here.

A row is one loss on one metric, on held-out sequences of B after the last epoch: mean over tokens and seeds, change of
this mean from the first loss, and of both the 95 % percentile bootstrap over seeds (the change's is paired; with few
seeds they come out narrow). Of a token p is what the policy predicts and q what the reference does. The row "B itself"
is chain B in the policy's place, so what a perfect learner would have. The paper leaves data and sizes open; those here
are ours. Pictures show every epoch and a band from the lowest to the highest seed. Nothing here passes or fails.

Shape suffixes: M sequences, T tokens of one, N tokens of a batch, V vocabulary, S seeds, R resamples.
"""
from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import matplotlib
import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, logsigmoid

from frpo.kernels import ReferenceHead, TokenStats, linear_token_loss
from frpo.kernels.reference import stats_of_logits
from frpo.objectives.base import LossOutput
from frpo.objectives.csft import CSFT, CSFTPA
from frpo.objectives.supervised import SFT, Progress, SupervisedInputs, SupervisedLoss

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # the backend has to be chosen first

VOCABULARY, LENGTH, SHARPNESS = 50, 16, 2.0
"""SHARPNESS: standard deviation of a chain's logits."""
REFERENCE_STEPS, TRAINED, HELDOUT, BATCH, LR = 300, 1024, 512, 64, 3e-3
"""TRAINED, HELDOUT: sequences of B. The reference gets new ones of A in every step."""
RESAMPLES = 10_000
METRICS = {"kl": "KL(p || q), nats", "gap": "mean |p - q|", "cosine": "cosine", "pearson": "Pearson",
           "overlap": "sum of min(p, q)", "kl_similarity": "exp(-KL)", "agreement": "same likeliest token",
           "ce": "cross-entropy, nats"}

Curve = list[dict[str, float]]
"""Metrics after each epoch."""


@dataclass(frozen=True, kw_only=True)
class CEPA:
    """ce * cross-entropy + pa * PA, with PA as in `pa_loss`."""

    name: ClassVar[str] = "ce_pa"
    needs_reference: ClassVar[bool] = True
    ce: float
    pa: float

    def loss(self, inputs: SupervisedInputs, progress: Progress) -> LossOutput:
        pa_N = -logsigmoid(inputs.kl_N * inputs.margin_N)
        return LossOutput(loss_sum=(inputs.weight_N * (self.pa * pa_N - self.ce * inputs.logprobs_N)).sum(), metrics={})


class Network(nn.Module):
    """Hidden states of all tokens in a row, from an LSTM and further layers; the head, without bias, stands apart."""

    def __init__(self, *layers: nn.Module, lstm_width: int, lstm_layers: int, head_width: int):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 32)
        self.lstm = nn.LSTM(32, lstm_width, lstm_layers, batch_first=True)
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(head_width, VOCABULARY, bias=False)

    def forward(self, tokens_MT: Tensor) -> Tensor:
        return self.layers(self.lstm(self.embedding(tokens_MT))[0].flatten(0, 1))


class Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, hidden_ND: Tensor) -> Tensor:
        return hidden_ND + torch.relu(self.linear(hidden_ND))


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """published: metric -> what the paper has for the first loss, and for those with PA."""

    policy: Callable[[], Network]
    reference: Callable[[], Network]
    losses: Mapping[str, SupervisedLoss]
    published: Mapping[str, tuple[str, str]]


EXPERIMENTS = {
    1: Experiment(
        policy=lambda: Network(lstm_width=64, lstm_layers=1, head_width=64),
        reference=lambda: Network(*(Residual(80) for _ in range(3)), lstm_width=80, lstm_layers=1, head_width=80),
        losses={"CE": SFT(), "CE + 1.0 PA": CEPA(ce=1.0, pa=1.0), "CE + 0.3 PA": CEPA(ce=1.0, pa=0.3),
                "PA": CEPA(ce=0.0, pa=1.0)},
        published={"kl": ("1.4575", "0.2562 (-82.4%)"), "gap": ("0.0169", "0.0051 (-69.8%)")}),
    2: Experiment(
        policy=lambda: Network(nn.Linear(64, 64), nn.ReLU(), lstm_width=64, lstm_layers=2, head_width=64),
        reference=lambda: Network(nn.Linear(80, 160), nn.ReLU(), lstm_width=80, lstm_layers=3, head_width=160),
        losses={"CSFT": CSFT(), "CSFT + PA": CSFTPA()},
        published={name: ("", "lower" if name in ("kl", "gap") else "higher")
                   for name in ("kl", "gap", "cosine", "pearson", "overlap", "kl_similarity")}),
}
PERFECT = "B itself"


def main() -> None:
    given = arguments()
    torch.set_num_threads(1)
    console = Console(width=120, soft_wrap=True)
    work = [(number, given.first_seed + index, loss) for number in given.experiment for index in range(given.seeds)
            for loss in (*EXPERIMENTS[number].losses, PERFECT)]
    found: dict[int, dict[str, list[Curve]]] = {number: {} for number in given.experiment}
    for number, seed, loss in track(work, description="LSTM", console=console):
        found[number].setdefault(loss, []).append(curve(number, seed, loss, given.epochs))
    given.output.mkdir(parents=True, exist_ok=True)
    results = []
    for number, curves in found.items():
        rows = compared(number, curves)
        console.print(table(number, rows, given))
        console.print(f"Picture: {draw(curves, given.output / f'experiment{number}.png')}")
        results += rows
    (given.json or given.output / "results.json").write_text(
        json.dumps({"rows": [asdict(row) for row in results], "curves": found}, indent=1), encoding="utf-8")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", type=int, nargs="+", choices=list(EXPERIMENTS), default=list(EXPERIMENTS))
    parser.add_argument("--seeds", type=int, default=5, help="how many; one seed has no interval")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=10, help="of the policy")
    parser.add_argument("--output", type=Path, default=Path("runs/lstm"), help="folder for the pictures")
    parser.add_argument("--json", type=Path, help="file for rows and curves, default results.json in --output")
    return parser.parse_args()


@dataclass(frozen=True, kw_only=True)
class World:
    """What all losses of a seed share. random_state: where each begins, hence with the same weights and batches."""

    chain_VV: Tensor
    trained_MT: Tensor
    heldout_MT: Tensor
    reference: Network
    random_state: Tensor


@lru_cache(maxsize=1)
def world(number: int, seed: int) -> World:
    """Up to the reference both experiments of a seed are the same."""
    torch.manual_seed(seed)
    a_VV, new_VV = ((SHARPNESS * torch.randn(VOCABULARY, VOCABULARY)).softmax(-1) for _ in range(2))
    b_VV = (a_VV + new_VV) / 2
    trained_MT, heldout_MT = sampled(b_VV, TRAINED), sampled(b_VV, HELDOUT)
    examples_MT = sampled(a_VV, REFERENCE_STEPS * BATCH)
    reference = EXPERIMENTS[number].reference()
    train(reference, torch.optim.Adam(reference.parameters(), lr=LR), examples_MT, SFT())
    return World(chain_VV=b_VV, trained_MT=trained_MT, heldout_MT=heldout_MT, reference=reference,
                 random_state=torch.get_rng_state())


def sampled(chain_VV: Tensor, count: int) -> Tensor:
    """Sequences whose first token is any with the same probability."""
    tokens = [torch.randint(VOCABULARY, (count,))]
    while len(tokens) < LENGTH:
        tokens.append(torch.multinomial(chain_VV[tokens[-1]], 1)[:, 0])
    return torch.stack(tokens, dim=1)


def curve(number: int, seed: int, loss: str, num_epochs: int) -> Curve:
    shared = world(number, seed)
    inputs_MT, target_N = shifted(shared.heldout_MT)
    with torch.no_grad():
        u_NV = shared.reference.head(shared.reference(inputs_MT))
    if loss == PERFECT:
        return [agreement(shared.chain_VV[inputs_MT.flatten()].log(), u_NV, target_N)] * num_epochs
    torch.set_rng_state(shared.random_state)
    policy, objective, found = EXPERIMENTS[number].policy(), EXPERIMENTS[number].losses[loss], []
    optimizer = torch.optim.Adam(policy.parameters(), lr=LR)
    for epoch in range(num_epochs):
        train(policy, optimizer, shared.trained_MT, objective, shared.reference, epoch, num_epochs)
        with torch.no_grad():
            found.append(agreement(policy.head(policy(inputs_MT)), u_NV, target_N))
    return found


def shifted(tokens_MT: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs, and of every input token the next one as target."""
    return tokens_MT[:, :-1], tokens_MT[:, 1:].flatten()


def train(network: Network, optimizer: torch.optim.Optimizer, sequences_MT: Tensor, objective: SupervisedLoss,
          reference: Network | None = None, epoch: int = 0, num_epochs: int = 1) -> None:
    """One epoch."""
    batches = torch.randperm(len(sequences_MT)).split(BATCH)
    for index, batch in enumerate(batches):
        inputs_MT, target_N = shifted(sequences_MT[batch])
        loss = mean_loss(objective, torch.arange(inputs_MT.shape[1]).repeat(len(batch)),
                         Progress(epochs_done=epoch + index / len(batches), num_epochs=num_epochs))
        optimizer.zero_grad()
        linear_token_loss(network(inputs_MT), network.head.weight, target_N, loss,
                          reference=frozen(reference, inputs_MT) if objective.needs_reference else None).backward()
        optimizer.step()


def mean_loss(objective: SupervisedLoss, position_N: Tensor, progress: Progress
              ) -> Callable[[TokenStats, slice], Tensor]:
    def loss(stats: TokenStats, rows: slice) -> Tensor:
        return objective.loss(SupervisedInputs(
            logprobs_N=stats.logprobs_N, weight_N=torch.full_like(stats.logprobs_N, 1 / len(position_N)),
            position_N=position_N[rows], ref_logprobs_N=stats.ref_logprobs_N, kl_N=stats.kl_N,
            margin_N=stats.margin_N, agree_N=stats.agree_N), progress).loss_sum
    return loss


@torch.no_grad()
def frozen(reference: Network, inputs_MT: Tensor) -> ReferenceHead:
    return ReferenceHead(hidden_NE=reference(inputs_MT), head_VE=reference.head.weight.detach())


def agreement(z_NV: Tensor, u_NV: Tensor, target_N: Tensor) -> dict[str, float]:
    """Metrics of a policy's logits z beside a reference's logits u, each a mean over tokens."""
    p_NV, q_NV = z_NV.softmax(-1), u_NV.softmax(-1)
    stats = stats_of_logits(z_NV, target_N, u_NV, entropy=False)
    uniform = 1 / p_NV.shape[-1]  # the mean of any distribution
    each_N = {
        "kl": stats.kl_N,
        "gap": (p_NV - q_NV).abs().mean(-1),
        "cosine": cosine_similarity(p_NV, q_NV),
        "pearson": cosine_similarity(p_NV - uniform, q_NV - uniform),
        "overlap": torch.minimum(p_NV, q_NV).sum(-1),
        "kl_similarity": torch.exp(-stats.kl_N),
        "agreement": stats.agree_N.to(p_NV.dtype),
        "ce": -stats.logprobs_N,
    }
    return {name: values_N.mean().item() for name, values_N in each_N.items()}


@dataclass(frozen=True, kw_only=True)
class Row:
    """Intervals are 95 %; change is relative to the experiment's first loss."""

    experiment: int
    metric: str
    loss: str
    mean: float
    interval: tuple[float, float]
    change: float
    change_interval: tuple[float, float]


def compared(number: int, curves: Mapping[str, Sequence[Curve]]) -> list[Row]:
    """After the last epoch."""
    rows = []
    for metric in METRICS:
        values = {loss: np.array([curve[-1][metric] for curve in given]) for loss, given in curves.items()}
        first_S = next(iter(values.values()))
        for loss, values_S in values.items():
            mean_R, first_R = resampled_means(values_S), resampled_means(first_S)
            rows.append(Row(experiment=number, metric=metric, loss=loss, mean=float(values_S.mean()),
                            interval=middle(mean_R), change=float(values_S.mean() / first_S.mean() - 1),
                            change_interval=middle(mean_R / first_R - 1)))
    return rows


def resampled_means(values_S: np.ndarray) -> np.ndarray:
    """Every call with as many seeds resamples them in the same way, which makes pairs."""
    picked_RS = np.random.Generator(np.random.PCG64(0)).integers(len(values_S), size=(RESAMPLES, len(values_S)))
    return values_S[picked_RS].mean(-1)


def middle(values_R: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(values_R, [2.5, 97.5])
    return float(low), float(high)


def table(number: int, rows: Sequence[Row], given: argparse.Namespace) -> Table:
    experiment, (first, *_) = EXPERIMENTS[number], rows
    sizes = [sum(parameter.numel() for parameter in network().parameters())
             for network in (experiment.policy, experiment.reference)]
    table = Table(title=f"Experiment {number}: policy of {sizes[0]:,} parameters, reference of {sizes[1]:,}; "
                        f"{given.epochs} epochs, {given.seeds} seed(s)")
    for column in ("metric", "loss", "mean", "95 %", f"from {first.loss}", "95 %", "paper"):
        table.add_column(column, justify="left" if column in ("metric", "loss") else "right")
    for row in rows:
        is_first, several = row.loss == first.loss, given.seeds > 1
        paper = ("", "") if row.loss == PERFECT else experiment.published.get(row.metric, ("", ""))
        table.add_row(
            METRICS[row.metric] if is_first else "", row.loss, f"{row.mean:.4f}",
            "{:.4f} to {:.4f}".format(*row.interval) if several else "",
            "" if is_first else f"{row.change:+.1%}",
            "{:+.1%} to {:+.1%}".format(*row.change_interval) if several and not is_first else "",
            paper[not is_first], end_section=row.loss == rows[-1].loss)
    return table


def draw(curves: Mapping[str, Sequence[Curve]], picture: Path) -> Path:
    figure, axes = plt.subplots(2, 4, figsize=(15, 6.5), layout="constrained", sharex=True)
    colors = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    for axis, (metric, label) in zip(axes.flat, METRICS.items()):
        for color, (loss, given) in zip(colors, curves.items()):
            values_ST = np.array([[epoch[metric] for epoch in curve] for curve in given])
            epochs, perfect = range(1, values_ST.shape[1] + 1), loss == PERFECT
            color = "grey" if perfect else color
            axis.plot(epochs, values_ST.mean(0), color=color, linestyle="--" if perfect else "-", label=loss)
            axis.fill_between(epochs, values_ST.min(0), values_ST.max(0), color=color, alpha=0.2, linewidth=0)
        axis.set(ylabel=label)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[-1]:
        axis.set(xlabel="epoch")
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.savefig(picture, dpi=130)
    plt.close(figure)
    return picture


if __name__ == "__main__":
    main()
