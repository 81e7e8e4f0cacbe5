"""The README's first command, shortened: the tiny model, three steps, real engines."""
import html
import json
import os
import subprocess
import sys

import pytest

from frpo.report.curve import read_metrics

pytestmark = pytest.mark.timeout(600)

SHORT = ("run.num_steps=3", "rollout.prompts_per_step=16", "data.heldout=32",
         "model.tiny.warm_start.steps=100")


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart")
    command = [sys.executable, "-m", "frpo", "quickstart", "--model", "tiny", "run.dir=q", *SHORT]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=550,
                           env={**os.environ, "COLUMNS": "120"})
    return folder / "q", ended


def evaluations(folder):
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if "eval/reward" in row]
    return rows[0], rows[-1]


def test_the_verdict_and_the_exit_code_are_those_of_the_intervals(done):
    """Three steps of warm-up gain nothing, which must be said; so must the control's."""
    folder, ended = done
    gained, lured = (last["eval/reward"] - last["eval/interval"] > first["eval/reward"] + first["eval/interval"]
                     for first, last in (evaluations(folder), evaluations(folder / "control")))
    verdict = (f"Gain on held-out prompts beyond the first model's interval: {'yes' if gained else 'NO'}; "
               f"gain under shuffled rewards: {'YES' if lured else 'none'}")
    assert ended.stdout.splitlines()[-1] == verdict, ended.stdout[-2000:] + ended.stderr[-2000:]
    assert ended.returncode == (0 if gained and not lured else 1)
    assert verdict in html.unescape((folder / "report.html").read_text(encoding="utf-8"))


def test_the_control_has_the_same_rewards_and_another_gradient(done):
    folder, _ = done
    first, control = (next(row for row in read_metrics(path / "metrics.jsonl") if row["step"] == 1)
                      for path in (folder, folder / "control"))
    assert first["reward/mean"] == control["reward/mean"] > 0
    assert first["rollout/tokens"] == control["rollout/tokens"]
    assert first["policy/grad_norm"] != control["policy/grad_norm"]
    assert evaluations(folder)[0] | {"time/evaluate": 0} == evaluations(folder / "control")[0] | {"time/evaluate": 0}


def test_forks_of_all_policies_were_tuned_and_measured(done):
    folder, ended = done
    results = json.loads((folder / "retention" / "results.json").read_text(encoding="utf-8"))
    forks = {(fork["policy"], fork["regime"]) for fork in results["forks"]}
    assert forks == {(policy, "larger") for policy in ("base", "dr_grpo", "frpo")}
    assert not [*folder.rglob("checkpoints/step_*")][1:], "only the policy's own checkpoint is kept"
    for part in ("1 of 3: FRPO", "2 of 3: the control", "3 of 3: forks", "Kept through larger", "Likeliest answers"):
        assert part in ended.stdout
    assert (folder / "export" / "model.safetensors").is_file()
