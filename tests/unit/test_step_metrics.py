"""Metrics and trace rows of a step by hand."""
import datetime
import json
import math

import numpy as np
import pytest

from frpo.run.traces import trace_rows
from frpo.telemetry.jsonl import JsonlFile
from frpo.telemetry.step import reweight_metrics, rollout_metrics, tilt_metrics
from frpo.types import AdvantagedGroup, Completion, Prompt, RolloutGroup, ScoredGroup, VersionSpan

NAN = math.nan


def completion(length, finish="stop", seed=0):
    return Completion(text="x" * length, token_ids=tuple(range(length)), logprobs=(-0.5,) * length,
                      loss_mask=(True,) * length, version_spans=(VersionSpan(policy_version=4, start=0, end=length),),
                      seed=seed, finish_reason=finish)


def group(draw, rewards, lengths, stats, finish="stop", columns=None, **terms):
    prompt = Prompt(uid=f"u{draw}", messages=({"role": "user", "content": "1+1="},), token_ids=(7, 8),
                    columns=columns or {"answer": "2"})
    completions = tuple(completion(length, finish, seed=10 * draw + i) for i, length in enumerate(lengths))
    scored = ScoredGroup(group=RolloutGroup(group_id=(3, draw), prompt=prompt, completions=completions),
                         rewards_G=np.array(rewards), terms={name: np.array(values) for name, values in terms.items()})
    return AdvantagedGroup(scored=scored, advantages_G=np.array([0.5, -0.5]), stats=stats)


GROUPS = [
    group(0, [1.0, -1.0], [2, 4], {"ess": 2.0, "lam": math.inf}, exact=[1.0, 0.0], style=[0.0, -1.0]),
    group(1, [0.75, NAN], [6, 4], {"ess": 1.0, "lam": 0.5}, finish="length", exact=[0.5, NAN], style=[NAN, NAN]),
]


def test_metrics_by_hand():
    metrics = rollout_metrics(GROUPS, seconds=8.0)
    assert metrics == pytest.approx({
        "reward/mean": 0.25, "reward/min": -1.0, "reward/max": 1.0, "reward/exact/mean": 0.5,
        "reward/style/mean": -0.5, "rollout/length": 4.0, "rollout/tokens": 16.0, "rollout/truncated": 0.5,
        "time/tokens_per_second": 2.0, "tilt/ess": 1.5, "tilt/lam": 0.5})
    assert all(type(value) is float for value in metrics.values())


def test_a_step_on_which_every_reward_abstained_is_nan_and_warns_of_nothing(recwarn):
    metrics = rollout_metrics([group(0, [NAN, NAN], [1, 1], {}, exact=[NAN, NAN])], seconds=1.0)
    assert all(math.isnan(metrics[f"reward/{name}"]) for name in ("mean", "min", "max", "exact/mean"))
    assert not list(recwarn)


def test_a_statistic_that_is_nowhere_finite_is_left_out():
    assert tilt_metrics([group(0, [0.0, 0.0], [1, 1], {"ess": NAN, "gap": 2.0})]) == {"tilt/gap": 2.0}


def test_a_trace_row_holds_all_that_happened():
    first, second = trace_rows(GROUPS)
    assert (first["group_id"], first["prompt_uid"], first["prompt_token_ids"]) == ([3, 0], "u0", [7, 8])
    assert first["messages"] == [{"role": "user", "content": "1+1="}] and first["columns"] == {"answer": "2"}
    assert first["completions"][1] == {
        "text": "xxxx", "token_ids": [0, 1, 2, 3], "logprobs": [-0.5] * 4, "loss_mask": [1] * 4,
        "version_spans": [[4, 0, 4]], "seed": 1, "finish_reason": "stop", "reward": -1.0, "advantage": -0.5,
        "terms": {"exact": 0.0, "style": -1.0}}
    assert second["completions"][1]["reward"] is None and second["completions"][0]["terms"]["style"] is None
    assert second["completions"][0]["finish_reason"] == "length" and second["stats"] == {"ess": 1.0, "lam": 0.5}


def test_trace_rows_name_every_field_of_a_completion():
    """A field added to Completion must be added to the trace, or a run can no longer be re-read."""
    row = next(iter(trace_rows(GROUPS)))
    assert set(Completion.__dataclass_fields__) <= set(row["completions"][0])


def test_trace_rows_are_json_whatever_the_columns_are(tmp_path):
    odd = group(0, [0.0, 1.0], [1, 1], {"lam": math.inf}, columns={"when": datetime.date(2024, 1, 2), "n": None})
    file = JsonlFile(tmp_path / "traces.jsonl")
    for row in trace_rows([odd, *GROUPS]):
        file.append(row)
    rows = [json.loads(line, parse_constant=pytest.fail) for line in file.path.read_text().splitlines()]
    assert rows[0]["columns"] == {"when": "2024-01-02", "n": None} and rows[0]["stats"] == {"lam": None}
    assert rows[2]["completions"][1]["reward"] is None


def test_reweight_metrics_are_sums_and_counts_of_what_the_groups_say():
    """A flat group that was never reweighted says nothing."""
    groups = [group(0, [1.0, 0.0], [1, 1], {"ratio": 1.5, "ratio_max": 2.0, "reweighted_ess": 1.25}),
              group(1, [1.0, 0.0], [1, 1], {"ratio": 0.5, "ratio_max": 0.75, "reweighted_ess": 1.75}),
              group(2, [NAN, NAN], [1, 1], {})]
    assert reweight_metrics(groups) == {
        "reweight/ratio": (2.0, 2, "mean"), "reweight/ratio_max": (2.0, 2, "max"), "reweight/ess": (3.0, 2, "mean")}
    assert reweight_metrics(groups[2:]) == {}


def test_a_trace_says_whether_the_group_was_learned_from():
    assert [row["trained"] for row in trace_rows(GROUPS)] == [True, True]
    assert [row["trained"] for row in trace_rows(GROUPS, trained=False)] == [False, False]
