"""A small retention matrix: killed with -9 in the middle of a policy, gone on with, one policy failing, then mended.

No stage is run twice and none is lost; what probes measure is checked against exact outcomes.
"""
from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml

from runs import lines

SETUP = """
from frpo.lab.data import downstream_rows, heldout_rows, policy_rows, task_b_rows, warm_start_rows, write_rows
from frpo.lab.network import make_model
from frpo.lab.world import world_of


def prepare(folder, seed):
    world = world_of(seed)
    make_model(folder / "model", seed)
    for name, rows in (("warm_start", warm_start_rows(world, 8192)), ("policy", policy_rows(world, 64)),
                       ("heldout", heldout_rows(world, 32)), ("downstream", downstream_rows(world, 100)),
                       ("task_b", task_b_rows(world, 32))):
        write_rows(rows, folder / f"{name}.jsonl")
"""
WORLD = ["data.path=$setup/policy.jsonl", "data.heldout_path=$setup/heldout.jsonl",
         "rewards=[{name: world, function: 'frpo.lab.world:reward', kwargs: {seed: $seed}}]"]
POLICY = {"recipe": "lab_policy", "start": "warm", "overrides": [
    *WORLD, "run.num_steps=6", "run.save_every=2", "rollout.prompts_per_step=8", "rollout.group_size=4"]}
IMPOSSIBLE = "checks.max_logprob_gap=1.0e-12"


def recipe(folder: Path, *broken: str) -> Path:
    values = {
        "run": {"name": "small", "dir": str(folder / "run")}, "seeds": [3], "setup": f"{folder / 'mini.py'}:prepare",
        "policies": {
            "warm": {"recipe": "lab_warm_start", "fork": False, "overrides": [
                "model.path=$setup/model", "data.path=$setup/warm_start.jsonl", "run.num_epochs=1"]},
            "kept": POLICY | {"reference": "warm"}, "broken": POLICY | {"extra": list(broken)},
            "raw": {"path": "$setup/model", "reference": "warm", "fork": False},
            "alone": {"path": "$setup/model", "fork": False}},
        "downstream": {
            "sft": {"recipe": "lab_downstream_sft", "policies": ["kept", "broken"], "overrides": [
                "data.path=$setup/downstream.jsonl", "run.num_epochs=1", "learner.lr=3.0e-3"]},
            "grpo": {"recipe": "lab_downstream_grpo", "policies": ["kept"], "overrides": [
                "data.path=$setup/downstream.jsonl", "data.heldout_path=$setup/task_b.jsonl", WORLD[2],
                "run.num_steps=2", "rollout.prompts_per_step=8"]}},
        "measure": {
            "kept": {"recipe": "lab_policy", "overrides": [*WORLD, "model.path=$setup/model", "evaluate.samples=16"]},
            "utility": {"recipe": "lab_policy", "overrides": [
                "model.path=$setup/model", "data.path=$setup/downstream.jsonl", "data.heldout_path=$setup/task_b.jsonl",
                WORLD[2]]},
            "at": [1], "exact": "frpo.lab.exact:scores", "exact_kwargs": {"seed": "$seed"}},
        "certificate": {"samples": 8}, "compare": [["kept", "broken"]]}
    path = folder / "matrix.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def begin(folder: Path, *arguments: str) -> subprocess.Popen:
    with (folder / "output.log").open("a", encoding="utf-8") as log:
        return subprocess.Popen([sys.executable, "-m", "frpo", "retention", str(folder / "matrix.yaml"), *arguments],
                                stdout=log, stderr=subprocess.STDOUT, cwd=folder, start_new_session=True)


def output(folder: Path) -> str:
    return (folder / "output.log").read_text(encoding="utf-8")


def records(folder: Path) -> dict[str, int]:
    """When each stage was finished, by its folder."""
    return {str(path.parent.relative_to(folder / "run")): path.stat().st_mtime_ns
            for path in (folder / "run").rglob("done.json")}


@pytest.fixture(scope="module")
def runs_of(tmp_path_factory):
    """Folder, and the finished stages after the kill, after going on, and after the mending."""
    folder = tmp_path_factory.mktemp("matrix")
    (folder / "mini.py").write_text(SETUP, encoding="utf-8")
    recipe(folder, IMPOSSIBLE)
    process, metrics = begin(folder), folder / "run" / "seed3" / "policies" / "kept" / "metrics.jsonl"
    while len(lines(metrics)) < 4:  # steps 0 to 3, the newest checkpoint of step 2
        assert process.poll() is None, output(folder)[-3000:]
        time.sleep(0.02)
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    psutil.wait_procs(family, timeout=20)
    found = [records(folder)]
    for code, broken in ((1, [IMPOSSIBLE]), (0, [])):
        recipe(folder, *broken)
        assert begin(folder).wait(timeout=200) == code, output(folder)[-3000:]
        found.append(records(folder))
    return folder, found


@pytest.mark.timeout(400)
def test_no_stage_is_run_twice_and_none_is_lost(runs_of):
    folder, (killed, gone_on, mended) = runs_of
    assert list(killed) == ["seed3/policies/warm"]
    assert set(gone_on) == {f"seed3/{name}" for name in ("policies/warm", "policies/kept", "forks/kept/sft",
                                                         "forks/kept/grpo")}
    assert set(mended) - set(gone_on) == {"seed3/policies/broken", "seed3/forks/broken/sft"}
    assert killed.items() <= gone_on.items() <= mended.items()
    steps = [json.loads(line)["step"] for line in lines(folder / "run/seed3/policies/kept/metrics.jsonl")]
    assert steps == list(range(7))  # gone on from the checkpoint of step 2, in the same file


def test_a_failed_stage_is_told_and_what_needs_it_waits(runs_of):
    folder, _ = runs_of
    text = output(folder)
    assert "broken, seed 3: failed" in text and "! broken, seed 3 failed: InvariantError" in text
    assert "! broken, seed 3, sft failed: its start, the policy broken, is missing" in text
    dry = subprocess.run([sys.executable, "-m", "frpo", "retention", str(folder / "matrix.yaml"), "--dry-run"],
                         capture_output=True, text=True, timeout=60, cwd=folder)
    assert dry.returncode == 0 and dry.stdout.count(": done") == 6 and "to be run" not in dry.stdout


def test_probes_measure_what_outcomes_say(runs_of):
    folder, _ = runs_of
    results = json.loads((folder / "run" / "results.json").read_text(encoding="utf-8"))
    forks = {(fork["policy"], fork["regime"]): fork for fork in results["forks"]}
    assert set(forks) == {("kept", "sft"), ("kept", "grpo"), ("broken", "sft")}
    sft = forks["kept", "sft"]
    assert sft["step"] == [0, 1, 4] and forks["kept", "grpo"]["step"] == [0, 1, 2]
    assert sft["kl"][0] == 0 and 0 < sft["kl"][1] < sft["kl"][2]
    for fork in forks.values():
        sampled, exact, half = (np.array(fork["metrics"][name]) for name in
                                ("kept/reward", "exact/reward", "kept/interval"))
        assert (np.abs(sampled - exact) < half + 0.05).all()
    moved = np.ptp(sft["metrics"]["exact/reward"])
    assert moved > 0.05  # or the engines might as well have kept one policy
    assert {each["policy"]: each["points"] for each in results["certificates"]} == {"kept": 6, "broken": 3}
    page = (folder / "run" / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") >= 4 and "http" not in page.split("<body>")[1].split("<details>")[0]


def test_policies_have_their_kl_to_the_reference(runs_of):
    """A policy's own training measured the same KL on other samples of the same prompts. The model which the reference
    was trained from is not forked: what is known of it was measured of its own samples.
    """
    folder, _ = runs_of
    results = json.loads((folder / "run" / "results.json").read_text(encoding="utf-8"))
    found = {policy["policy"]: policy for policy in results["policies"]}
    trained = [row for row in map(json.loads, lines(folder / "run/seed3/policies/kept/metrics.jsonl"))
               if "eval/kl" in row][-1]
    measured = json.loads((folder / "run/seed3/policies/kept/reference_kl.json").read_text(encoding="utf-8"))
    kl, interval = measured["metrics"]["kept/kl"], measured["metrics"]["kept/kl_interval"]
    assert found["kept"]["eval/kl"] == kl != trained["eval/kl"]
    assert abs(kl - trained["eval/kl"]) < interval + trained["eval/kl_interval"]
    assert found["raw"]["eval/kl"] > 10 * kl > 0
    raw, kept = (found[name]["kept/reward"] for name in ("raw", "kept"))
    assert 0 <= raw < kept - 0.1, "a model of random weights and the trained policy"
    assert found["alone"]["kept/reward"] == raw and "eval/kl" not in found["alone"], "the same samples, no reference"
