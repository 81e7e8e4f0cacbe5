"""`frpo rollout` with a real engine against the first step of a whole run, and `frpo rescore` of that run's traces."""
from __future__ import annotations

import json
from pathlib import Path

import pytest

from frpo.__main__ import main
from frpo.config.loader import load_recipe
from frpo.data.prompts import PromptStream
from frpo.run.build import check_prompts
from runs import lines, metrics, overrides_of

OTHER = """
def spread(completions, **columns):
    return [sum(map(ord, text)) % 2 + (0.5 if len(text) == 6 else 0.0) for text in completions]
"""
"""The run's reward, and half a point for completions of six characters."""


def command(name: str, *arguments: object) -> None:
    assert main([name, *map(str, arguments)]) == 0


def traced(path: Path) -> list[dict]:
    return [json.loads(line) for line in lines(path)]


@pytest.fixture(scope="module")
def sampled(alone, ray_cluster):
    """Folder of two steps that were only sampled, by the recipe of the run left alone."""
    folder = alone.parent / "only"
    command("rollout", "smoke", *overrides_of(folder), "--steps", 2)
    return folder


@pytest.mark.timeout(300)
def test_the_first_step_is_that_of_a_run_to_the_bit(alone, sampled):
    run, only = ([line for line in lines(path) if json.loads(line)["group_id"][0] == 0]
                 for path in (alone / "traces.jsonl", sampled / "rollouts.jsonl"))
    assert len(only) >= 8 and only == run


@pytest.mark.timeout(60)
def test_the_second_step_goes_on_in_the_stream_with_the_same_policy_and_other_seeds(sampled):
    rows = sorted(traced(sampled / "rollouts.jsonl"), key=lambda row: row["group_id"])
    assert {row["group_id"][0] for row in rows} == {0, 1}
    assert sum(row["trained"] for row in rows) == 16 < len(rows)  # dynamic sampling replaced some
    recipe = load_recipe("smoke", overrides_of(sampled))
    stream = PromptStream(check_prompts(recipe).train, recipe.run.seed, recipe.data.shuffle)
    assert [row["prompt_uid"] for row in rows] == [prompt.uid for prompt in stream.take(0, len(rows))]
    completions = [completion for row in rows for completion in row["completions"]]
    assert {version for completion in completions for version, *_ in completion["version_spans"]} == {0}
    assert len({completion["seed"] for completion in completions}) == len(completions)


@pytest.mark.timeout(120)
def test_a_learner_fed_with_it_does_what_the_run_did_in_its_first_step(alone, sampled):
    folder = alone.parent / "fed"
    command("train", "smoke", *overrides_of(folder), f"rollout.replay={sampled / 'rollouts.jsonl'}", "run.num_steps=1")
    row, expected = metrics(folder)[1], metrics(alone)[1]
    learned = {key for key in row if key.startswith(("policy/", "tilt/", "reward/"))}
    assert {"policy/loss", "policy/grad_norm", "tilt/ess", "reward/mean", "reward/spread/mean"} <= learned
    assert {key: row[key] for key in learned} == {key: expected[key] for key in learned}


@pytest.mark.timeout(60)
def test_the_runs_own_rewards_change_nothing_in_its_traces(alone, tmp_path, capsys):
    command("rescore", alone / "traces.jsonl", "smoke", *overrides_of(alone), "--output", tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_bytes() == (alone / "traces.jsonl").read_bytes()
    assert capsys.readouterr().out.count(" 0 of ") == 3  # both components and the sum


@pytest.mark.timeout(60)
def test_another_reward_changes_what_it_says_and_nothing_else(alone, tmp_path, capsys):
    (tmp_path / "other.py").write_text(OTHER, encoding="utf-8")
    command("rescore", alone / "traces.jsonl", "smoke", *overrides_of(alone), "--output", tmp_path / "again.jsonl",
            f"rewards=[{{name: spread, function: '{tmp_path / 'other.py'}:spread', weight: 2}}]",
            "objective.constraint=null")
    before, now = traced(alone / "traces.jsonl"), traced(tmp_path / "again.jsonl")
    pairs = [pair for old, new in zip(before, now, strict=True)
             for pair in zip(old["completions"], new["completions"], strict=True)]
    longer = sum(len(old["text"]) == 6 for old, _ in pairs)
    assert 0 < longer < len(pairs)
    for old, new in pairs:
        assert new["terms"] == {"spread": old["terms"]["spread"] + (0.5 if len(old["text"]) == 6 else 0.0)}
        assert new["reward"] == 2 * new["terms"]["spread"]
        assert {k: v for k, v in old.items() if k not in ("reward", "terms", "advantage")} == {
            k: v for k, v in new.items() if k not in ("reward", "terms", "advantage")}
    assert any(old["advantage"] != new["advantage"] for old, new in pairs)
    assert f" {longer} of {len(pairs)} " in capsys.readouterr().out
