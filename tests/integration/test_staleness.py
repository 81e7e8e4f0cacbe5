"""Whole runs that sample ahead of the learner, one killed with -9 while batches wait; and a learner fed from traces."""
from __future__ import annotations

import json
from pathlib import Path

import pytest

from frpo.config.loader import load_recipe
from frpo.data.prompts import PromptStream
from frpo.run.build import check_prompts
from runs import LONG, STEPS, finish, kill_in_step, lines, metrics, overrides_of, start

UPDATES = 2
"""Optimizer updates of a step, and so the versions between two steps' policies."""


def traces(folder: Path) -> list[dict]:
    return [json.loads(line) for line in lines(folder / "traces.jsonl")]


@LONG
@pytest.mark.timeout(300)
def test_a_run_killed_while_batches_wait_loses_and_repeats_no_prompt(alone):
    k = 2
    folder, options = alone.parent / "stale", (f"rollout.max_staleness={k}",)
    process = start(folder, *options)
    kill_in_step(process, folder, 4)
    kept = folder / "checkpoints" / "step_000002" / "batches.jsonl"
    waiting = [json.loads(line) for line in lines(kept)]
    assert [row["step"] for row in waiting] == list(range(2, 2 + len(waiting)))
    finish(folder, *options)

    rows = traces(folder)
    drawn = sorted(tuple(row["group_id"]) for row in rows)
    assert len(set(drawn)) == len(drawn) and {step for step, _ in drawn} == set(range(STEPS))
    recipe = load_recipe("smoke", [*overrides_of(folder), *options])
    stream = PromptStream(check_prompts(recipe).train, recipe.run.seed, recipe.data.shuffle)
    uids = {tuple(row["group_id"]): row["prompt_uid"] for row in rows}
    assert [uids[group_id] for group_id in drawn] == [prompt.uid for prompt in stream.take(0, len(drawn))]
    for row in waiting:  # what waited in the queue was learned from as it was
        for group in row["chosen"]:
            traced = next(r for r in rows if r["group_id"] == group["group_id"])
            assert [c["logprobs"] for c in traced["completions"]] == [c["logprobs"] for c in group["completions"]]

    staleness = [row["rollout/staleness_max"] for row in metrics(folder)[1:]]
    assert staleness[0] == 0 and max(staleness) <= k * UPDATES and min(staleness[1:]) >= 1
    for row in rows:
        learned_at = UPDATES * row["group_id"][0]
        for completion in row["completions"]:
            spans = completion["version_spans"]
            assert [end for *_, end in spans][-1] == len(completion["token_ids"]) and spans[0][1] == 0
            assert all(learned_at - k * UPDATES <= version <= learned_at for version, *_ in spans)


@LONG
@pytest.mark.timeout(200)
def test_a_learner_fed_from_traces_does_again_what_it_did(alone):
    folder = alone.parent / "replayed"
    finish(folder, f"rollout.replay={alone / 'traces.jsonl'}")
    log = folder.with_suffix(".log").read_text(encoding="utf-8")
    assert "generate" not in log and "eval" not in log  # no engine was there
    assert (folder / "export/model.safetensors").read_bytes() == (alone / "export/model.safetensors").read_bytes()
    learned = [{key: value for key, value in row.items() if key.startswith(("policy/", "tilt/", "reward/mean"))}
               for row in metrics(alone)[1:]]
    again = [{key: row[key] for key in learned[0]} for row in metrics(folder)[1:]]
    assert again == learned
