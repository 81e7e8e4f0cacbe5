"""Held-out metrics by hand, pass@k by enumeration, and what is kept as the best policy and when."""
import json
import math
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from frpo.config.loader import load_recipe
from frpo.config.sections import BestSection, EvaluateSection
from frpo.errors import CheckpointError, ConfigError
from frpo.evaluation.best import BestCheckpoint
from frpo.evaluation.heldout import heldout_metrics, measures_kl
from frpo.evaluation.model import of_model, result_path, table_rows
from frpo.evaluation.passk import pass_at_k
from frpo.types import Completion, Prompt, RolloutGroup, RunState, ScoredGroup

NAN = math.nan


# --- pass@k -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_k_subsets_that_hold_a_pass(n):
    for c in range(n + 1):
        for k in range(1, n + 1):
            subsets = list(combinations([True] * c + [False] * (n - c), k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-15)


def test_pass_at_k_keeps_small_chances_of_large_samples():
    assert pass_at_k(10**6, 1, 1) == 1e-6
    assert pass_at_k(5000, 1, 2500) == 0.5
    assert pass_at_k(5000, 5000 - 9, 10) == 1.0


@pytest.mark.parametrize("n, c, k", [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)])
def test_pass_at_k_refuses_counts_that_cannot_be(n, c, k):
    with pytest.raises(ValueError, match=f"given n = {n}, c = {c}, k = {k}"):
        pass_at_k(n, c, k)


# --- metrics ----------------------------------------------------------------------------------------------------------

def group(draw, rewards, lengths, mask=None, **terms):
    completions = tuple(
        Completion(text="", token_ids=tuple(range(n)), logprobs=(-0.5,) * n, loss_mask=mask or (True,) * n,
                   version_spans=(), seed=0, finish_reason="length" if n == 4 else "stop") for n in lengths)
    rollout = RolloutGroup(group_id=(0, draw), completions=completions,
                           prompt=Prompt(uid=str(draw), messages=(), token_ids=(1,)))
    return ScoredGroup(group=rollout, rewards_G=np.array(rewards),
                       terms={name: np.array(values) for name, values in terms.items()})


SCORED = [group(0, [1.0, 0.0, 0.0, 0.0], [1, 2, 3, 4], exact=[1.0, 0.0, 0.0, 0.0]),
          group(1, [1.0, 1.0, NAN, 0.5], [2, 2, 4, 2], exact=[1.0, 1.0, NAN, NAN])]


def test_metrics_by_hand():
    """Two prompts: means m1, m2 have the half-width 12.706 |m1 - m2| / 2, by Student's t."""
    reward = (0.25 + 2.5 / 3) / 2
    pass2 = (0.5, 5 / 6)  # of 6 pairs, 3 and 5 hold a pass
    expected = {
        "eval/reward": reward, "eval/interval": 6.353 * (2.5 / 3 - 0.25), "eval/prompts": 2.0, "eval/length": 2.5,
        "eval/length_p90": 4.0, "eval/truncated": 0.25, "eval/exact/mean": 0.625, "eval/exact/interval": 6.353 * 0.75,
        "eval/pass@1": 0.375, "eval/pass@1/interval": 6.353 * 0.25,
        "eval/pass@2": sum(pass2) / 2, "eval/pass@2/interval": 6.353 * (pass2[1] - pass2[0])}
    metrics = heldout_metrics(SCORED, EvaluateSection(samples=4, pass_at=[1, 2]))
    assert metrics == pytest.approx(expected)
    assert all(type(value) is float for value in metrics.values())


def test_what_passes_is_what_reaches_the_threshold_up_to_rounding():
    weighted = group(0, [0.7 + 0.2 + 0.1, 0.999], [1, 1])
    assert weighted.rewards_G[0] < 1.0
    assert heldout_metrics([weighted], EvaluateSection(samples=2, pass_at=[1]))["eval/pass@1"] == 0.5
    half = EvaluateSection(samples=4, pass_at=[1], success=0.5)
    assert heldout_metrics(SCORED, half)["eval/pass@1"] == 0.5  # 1 of 4 and 3 of 4: NaN does not reach it


def test_a_prompt_on_which_every_reward_abstained_passes_not_and_leaves_the_mean(recwarn):
    metrics = heldout_metrics([*SCORED[:1], group(1, [NAN] * 4, [1] * 4, exact=[NAN] * 4)],
                              EvaluateSection(samples=4, pass_at=[4]))
    assert (metrics["eval/reward"], metrics["eval/pass@4"]) == (0.25, 0.5)
    assert math.isnan(metrics["eval/interval"]) and not list(recwarn)


def test_kl_is_measured_where_there_is_a_reference_and_samples_are_the_policys():
    lora, none = "model.lora={r: 4}", "objective.kl_coef=0"
    for overrides, expected in ([], True), ([none], False), ([none, lora], True), (["evaluate.temperature=0"], False):
        assert measures_kl(load_recipe("smoke", overrides)) is expected


def test_table_shows_an_interval_beside_what_it_belongs_to():
    metrics = {"eval/reward": 0.5, "eval/interval": 0.1, "eval/prompts": 4.0, "eval/pass@2": 0.7,
               "eval/pass@2/interval": 0.2, "eval/exact/mean": 0.3, "eval/exact/interval": 0.05, "eval/kl": 0.01,
               "eval/kl_interval": 0.002}
    assert table_rows(metrics) == [("reward", 0.5, 0.1), ("prompts", 4.0, None), ("pass@2", 0.7, 0.2),
                                   ("exact/mean", 0.3, 0.05), ("kl", 0.01, 0.002)]


# --- the best policy --------------------------------------------------------------------------------------------------

def state(step):
    return RunState(step=step, policy_version=2 * step, data_cursor=0, recipe_digest="", file_offsets={})


class Policy:
    """Stands where the learner's export is called: a folder with one file that says which call wrote it."""

    def __init__(self, fails_in=None):
        self.written, self.fails_in = 0, fails_in

    def export(self, folder):
        self.written += 1
        Path(folder).mkdir()
        (Path(folder) / "weights").write_text(str(self.written))
        if self.written == self.fails_in:
            raise OSError("no space left")


def offer(best, policy, *values, first=1, metric="eval/reward", **others):
    """Steps first, first + 1, ... with these values of the metric; the steps that were exported."""
    return [step for step, value in enumerate(values, start=first)
            if best.offer(state(step), {metric: value} | others, policy.export)]


def record(folder):
    return json.loads((folder / "best" / "best.json").read_text())


def test_a_better_value_replaces_the_folder_and_nothing_else_stays(tmp_path):
    best, policy = BestCheckpoint(BestSection(), tmp_path), Policy()
    assert offer(best, policy, 0.5, 0.5, 0.4, NAN, 0.75, 0.6) == [1, 5]
    assert record(tmp_path) == {"step": 5, "policy_version": 10, "metric": "eval/reward", "value": 0.75,
                                "metrics": {"eval/reward": 0.75}}
    assert (tmp_path / "best" / "weights").read_text() == "2"
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_smallest_can_be_best_but_nan_cannot_even_if_it_is_first(tmp_path):
    assert offer(BestCheckpoint(BestSection(largest=False), tmp_path), Policy(), NAN, 0.5, 0.7, 0.4) == [2, 4]


def test_bounds_come_before_the_metric(tmp_path):
    section = BestSection(bounds={"eval/kl": (None, 0.5), "eval/length": (2.0, None)})
    best, policy = BestCheckpoint(section, tmp_path), Policy()
    kept = [offer(best, policy, value, first=step, **{"eval/kl": kl, "eval/length": length})
            for step, value, kl, length in [(1, 0.9, 0.6, 9.0), (2, 0.8, 0.1, 1.9), (3, 0.7, NAN, 9.0),
                                            (4, 0.2, 0.5, 2.0), (5, 0.9, 0.51, 9.0), (6, 0.3, 0.0, 9.0)]]
    assert kept == [[], [], [], [4], [], [6]]


def test_an_unknown_metric_is_named_beside_those_there_are(tmp_path):
    section = BestSection(metric="eval/rewards", bounds={"eval/kl": (None, 1.0)})
    with pytest.raises(ConfigError, match=r"metric 'eval/rewards' and bounds on 'eval/kl': .* choose from eval/reward"):
        offer(BestCheckpoint(section, tmp_path), Policy(), 0.5)


def test_a_failed_export_leaves_the_earlier_best_and_is_cleared_away(tmp_path):
    best = BestCheckpoint(BestSection(), tmp_path)
    with pytest.raises(OSError, match="no space"):
        offer(best, Policy(fails_in=2), 0.5, 0.6)
    assert record(tmp_path)["step"] == 1 and (tmp_path / "best" / "weights").read_text() == "1"
    again = BestCheckpoint(BestSection(), tmp_path)
    again.restore(1)
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
    assert offer(again, Policy(), 0.5, 0.6, first=2) == [3]


@pytest.mark.parametrize("resumed, kept", [(3, []), (2, []), (1, [2])])
def test_a_resume_keeps_the_bar_unless_it_is_of_an_abandoned_continuation(tmp_path, resumed, kept):
    offer(BestCheckpoint(BestSection(), tmp_path), Policy(), 0.6, first=2)
    best = BestCheckpoint(BestSection(), tmp_path)
    best.restore(resumed)
    assert (tmp_path / "best").is_dir() is not kept
    assert offer(best, Policy(), 0.5, first=resumed + 1) == kept


def test_a_resume_may_ask_for_another_metric_or_bound(tmp_path):
    offer(BestCheckpoint(BestSection(), tmp_path), Policy(), 0.6, **{"eval/kl": 0.5})
    best = BestCheckpoint(BestSection(metric="eval/kl", largest=False), tmp_path)
    best.restore(1)
    assert offer(best, Policy(), 0.6, 0.4, first=2, metric="eval/kl", **{"eval/reward": 0.0}) == [3]
    bounded = BestCheckpoint(BestSection(bounds={"eval/kl": (None, 0.3)}), tmp_path)
    bounded.restore(3)
    assert offer(bounded, Policy(), 0.0, first=4, **{"eval/kl": 0.2}) == [4]


def test_a_run_that_starts_anew_moves_the_best_of_another_aside(tmp_path):
    offer(BestCheckpoint(BestSection(), tmp_path), Policy(), 0.6)
    best = BestCheckpoint(BestSection(), tmp_path)
    best.restore(None)
    assert offer(best, Policy(), 0.5) == [1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "best.earlier-1"]


@pytest.mark.parametrize("finished", [True, False])
def test_a_process_that_ended_between_two_renames_leaves_a_whole_best(tmp_path, finished):
    offer(BestCheckpoint(BestSection(), tmp_path), Policy(), 0.6)
    if finished:
        (tmp_path / "best.replaced").mkdir()
    else:
        (tmp_path / "best").rename(tmp_path / "best.replaced")
        (tmp_path / "best.unfinished").mkdir()
    best = BestCheckpoint(BestSection(), tmp_path)
    best.restore(1)
    assert [path.name for path in tmp_path.iterdir()] == ["best"] and record(tmp_path)["value"] == 0.6
    assert offer(best, Policy(), 0.6, first=2) == []


def test_a_damaged_record_is_an_error_that_names_it(tmp_path):
    offer(BestCheckpoint(BestSection(), tmp_path), Policy(), 0.6)
    (tmp_path / "best" / "best.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"best.json is damaged: .*; move .*best away"):
        BestCheckpoint(BestSection(), tmp_path).restore(1)


# --- recipe and command line ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("overrides, message", [
    (["evaluate.pass_at=[1, 8]"], "evaluate: pass_at = [1, 8]: pass@8 needs at least 8 completions a prompt, given "
                                  "evaluate.samples = 4; raise samples or lower pass_at"),
    (["evaluate.pass_at=[0]"], "evaluate.pass_at.0: should be greater than or equal to 1, given 0"),
    (["evaluate.best.bounds={eval/kl: [1, 0]}"], "evaluate.best.bounds: eval/kl: [low, high] needs low <= high, given"),
    (["evaluate.best.bounds={eval/kl: 1}"], "evaluate.best.bounds.eval/kl: should be a list, given 1"),
    (["evaluate.best.bounds={eval/kl: [1]}"], "key 'evaluate.best.bounds.eval/kl.1' is required"),
    (["evaluate.best.bounds={eval/kl: [.inf, 1]}"], "eval/kl.0: should be a finite number, given inf"),
    (["evaluate.best.metrik=eval/kl"], "unknown key 'evaluate.best.metrik'; did you mean 'metric'?"),
    (["evaluate.best={}", "data.heldout=0"], "evaluate.best needs held-out prompts to choose by; raise data.heldout")])
def test_a_recipe_that_cannot_be_evaluated_is_refused(overrides, message):
    with pytest.raises(ConfigError) as caught:
        load_recipe("smoke", overrides)
    assert message in str(caught.value)


def test_another_model_takes_the_place_of_the_recipes_own():
    model = of_model(load_recipe("smoke", ["model.lora={r: 4}"]), "some/folder").model
    assert (model.path, model.tiny, model.lora, model.dtype) == ("some/folder", None, None, "fp32")


def test_metrics_go_beside_the_model_or_where_told(tmp_path):
    assert result_path(str(tmp_path), None) == tmp_path / "evaluation.json"
    assert result_path("owner/name", str(tmp_path / "x.json")) == tmp_path / "x.json"
    for model, result in [("owner/name", None), (str(tmp_path), str(tmp_path / "none" / "x.json")),
                          (str(tmp_path), str(tmp_path))]:
        with pytest.raises(ConfigError, match="give --json PATH"):
            result_path(model, result)
    assert not list(tmp_path.iterdir())
