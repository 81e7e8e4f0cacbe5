"""The LSTM benchmark's metrics, losses and comparison on numbers derived by hand, and a whole run of a tiny size."""
from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch

from frpo.objectives.csft import CSFT, pa_loss
from frpo.objectives.supervised import Progress, SupervisedInputs

PATH = Path(__file__).parents[2] / "benchmarks" / "lstm.py"
SPEC = importlib.util.spec_from_file_location("bench_lstm", PATH)
bench = sys.modules[SPEC.name] = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(bench)

LOG2 = math.log(2)
P, Q = [1 / 2, 1 / 4, 1 / 4], [1 / 4, 1 / 2, 1 / 4]


def logits(*distributions):
    return torch.tensor(distributions, dtype=torch.float64).log() + 3  # which a softmax takes away


@pytest.fixture
def tiny(monkeypatch):
    for name, value in {"REFERENCE_STEPS": 2, "TRAINED": 128, "HELDOUT": 16}.items():
        monkeypatch.setattr(bench, name, value)
    bench.world.cache_clear()
    yield
    bench.world.cache_clear()


def test_metrics_of_two_distributions():
    found = bench.agreement(logits(P), logits(Q), torch.tensor([0]))
    assert found == pytest.approx({
        "kl": LOG2 / 4,               # 1/2 log 2 - 1/4 log 2
        "gap": 1 / 6,                 # (1/4 + 1/4 + 0) / 3
        "cosine": 5 / 6,              # (1/8 + 1/8 + 1/16) / (1/4 + 1/16 + 1/16)
        "pearson": -1 / 2,            # deviations (2, -1, -1) / 12 and (-1, 2, -1) / 12
        "overlap": 3 / 4,
        "kl_similarity": 2 ** -0.25,
        "agreement": 0.0,
        "ce": LOG2,
    }, abs=1e-12)
    assert list(found) == list(bench.METRICS)


def test_metrics_are_means_over_tokens():
    """The second token's distributions are equal; exp(-KL) is averaged, not taken of the mean KL."""
    found = bench.agreement(logits(P, Q), logits(Q, Q), torch.tensor([0, 2]))
    assert found == pytest.approx({
        "kl": LOG2 / 8, "gap": 1 / 12, "cosine": 11 / 12, "pearson": 1 / 4, "overlap": 7 / 8,
        "kl_similarity": (2 ** -0.25 + 1) / 2, "agreement": 1 / 2, "ce": 3 / 2 * LOG2}, abs=1e-12)


@pytest.mark.parametrize("ce, pa", [(1.0, 0.3), (0.0, 1.0)])
def test_ce_and_pa_are_the_parts_of_the_project_loss(ce, pa):
    """CSFT at the reference has weight 1 and is cross-entropy."""
    generator = torch.Generator().manual_seed(0)
    logprobs_N, kl_N, margin_N = (-torch.rand(6, generator=generator, dtype=torch.float64) for _ in range(3))
    kl_N = -kl_N
    weight_N, agree_N = torch.full_like(kl_N, 1 / 6), torch.zeros(6, dtype=torch.bool)
    given = SupervisedInputs(logprobs_N=logprobs_N, ref_logprobs_N=logprobs_N, weight_N=weight_N, kl_N=kl_N,
                             position_N=torch.arange(6), margin_N=margin_N, agree_N=agree_N)
    entropy = CSFT().loss(given, Progress(epochs_done=0.0, num_epochs=1)).loss_sum
    alignment = pa_loss(given).loss_sum
    assert entropy.item() == pytest.approx(-logprobs_N.mean().item(), rel=1e-12)
    found = bench.CEPA(ce=ce, pa=pa).loss(
        SupervisedInputs(logprobs_N=logprobs_N, weight_N=weight_N, position_N=torch.arange(6), kl_N=kl_N,
                         margin_N=margin_N), Progress(epochs_done=0.0, num_epochs=1)).loss_sum
    assert found.item() == pytest.approx((ce * entropy + pa * alignment).item(), rel=1e-12)


def test_change_is_paired():
    """Twice the first loss on every seed: the change is 100 % whatever the seeds are, the mean is not as certain."""
    def curve(value):
        return [dict.fromkeys(bench.METRICS, 7.0), dict.fromkeys(bench.METRICS, value)]

    first, second = bench.compared(1, {"a": [curve(1.0), curve(3.0)], "b": [curve(2.0), curve(6.0)]})[:2]
    assert (first.loss, first.mean, first.change, first.change_interval) == ("a", 2.0, 0.0, (0.0, 0.0))
    assert (second.loss, second.mean, second.change, second.change_interval) == ("b", 4.0, 1.0, (1.0, 1.0))
    assert first.interval == (1.0, 3.0) and second.interval == (2.0, 6.0)


def test_losses_start_alike(tiny, monkeypatch):
    """CE and CE + 0 PA are the same training, to rounding; another seed is another."""
    monkeypatch.setitem(bench.EXPERIMENTS[1].losses, "CE + 0 PA", bench.CEPA(ce=1.0, pa=0.0))
    plain, nothing, other = (bench.curve(1, seed, loss, 2)[-1]
                             for seed, loss in ((0, "CE"), (0, "CE + 0 PA"), (1, "CE")))
    assert nothing == pytest.approx(plain, rel=1e-4)
    assert other["ce"] != pytest.approx(plain["ce"], rel=1e-4)


@pytest.mark.filterwarnings("ignore:(invalid value|divide by zero)")  # nothing agrees after four steps: x / 0
def test_whole_run(tiny, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["lstm.py", "--seeds", "2", "--epochs", "2", "--output", str(tmp_path)])
    bench.main()
    written = json.loads((tmp_path / "results.json").read_text())
    assert {name: list(losses) for name, losses in written["curves"].items()} == {
        "1": ["CE", "CE + 1.0 PA", "CE + 0.3 PA", "PA", "B itself"], "2": ["CSFT", "CSFT + PA", "B itself"]}
    assert len(written["curves"]["2"]["CSFT"]) == len(written["curves"]["2"]["CSFT"][1]) == 2
    assert len(written["rows"]) == 8 * len(bench.METRICS)
    assert all(math.isfinite(row["mean"]) for row in written["rows"])
    assert all((tmp_path / f"experiment{number}.png").stat().st_size > 0 for number in (1, 2))
    assert "0.2562 (-82.4%)" in capsys.readouterr().out
