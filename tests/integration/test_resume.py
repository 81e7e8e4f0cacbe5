"""A run killed with -9 in the middle of a step and resumed writes, to the byte, the files of a run left alone.

Runs are `python -m frpo train` in their own processes. What checkpoints refuse is checked on the folders they leave.
"""
from __future__ import annotations

import shutil

import psutil
import pytest

from frpo.config.loader import load_recipe
from frpo.errors import CheckpointError
from frpo.run.checkpoint import CheckpointStore
from runs import RAYS_OWN, STEPS, finish, kill_in_step, lines, metrics, overrides_of, start

KILLED_IN = 4
"""The step in which the run is killed; the newest checkpoint is of step 2."""


@pytest.fixture(scope="module")
def runs(alone):
    """(folder of the run left alone, folder of the run killed and resumed, its state in between)."""
    broken = alone.parent / "broken"
    process = start(broken)
    family = kill_in_step(process, broken, KILLED_IN)
    ours = [process for process in family if not RAYS_OWN.match(process.name())]
    _, alive = psutil.wait_procs(ours, timeout=20)
    between = {
        "steps": [row["step"] for row in metrics(broken)], "traces": len(lines(broken / "traces.jsonl")),
        "checkpoints": sorted(path.name for path in (broken / "checkpoints").iterdir()),
        "ours": len(ours), "alive": [str(process) for process in alive]}
    # What a kill in the middle of a later save would leave: everything but the marker.
    unfinished = broken / "checkpoints" / "step_000005"
    shutil.copytree(broken / "checkpoints" / "step_000002", unfinished)
    (unfinished / "COMPLETE").unlink()
    finish(broken, "run.resume=auto")
    between["alive at the end"] = [str(process) for process in psutil.wait_procs(family, timeout=60)[1]]
    return alone, broken, between


@pytest.mark.timeout(300)
def test_the_kill_came_inside_a_step_beyond_the_checkpoint(runs):
    _, _, between = runs
    assert between["steps"] == list(range(KILLED_IN))
    assert between["checkpoints"] == ["step_000002"]
    assert between["traces"] > 8 * (KILLED_IN - 1)  # there is something to cut off


def test_no_process_of_the_killed_run_remains(runs):
    _, _, between = runs
    assert between["ours"] >= 4  # an engine, two ranks, a reward worker
    assert between["alive"] == []
    assert between["alive at the end"] == []  # Ray's agents look for their parent now and then, up to a minute apart


def test_the_resumed_run_repeats_the_one_left_alone_to_the_bit(runs):
    alone, broken, _ = runs
    assert [row["step"] for row in metrics(alone)] == list(range(STEPS + 1))
    assert all(row["policy/grad_norm"] > 0 for row in metrics(alone)[1:])  # or nothing would be at stake
    assert len({row["policy/kl_coef"] for row in metrics(alone)[2:]}) == STEPS - 1  # the controller moves every step
    assert len({row["constraint/nu"] for row in metrics(alone)[1:]}) == STEPS  # so does the multiplier
    assert metrics(broken) == metrics(alone)
    for name in ("traces.jsonl", "export/model.safetensors"):
        assert (broken / name).read_bytes() == (alone / name).read_bytes(), name


def test_another_recipe_is_refused_naming_the_key(runs):
    alone, _, _ = runs
    changed = load_recipe("smoke", [*overrides_of(alone), "learner.lr=0.5"])
    with pytest.raises(CheckpointError, match="was written by another recipe:\n  learner.lr: 0.0004 -> 0.5\nUse that"):
        CheckpointStore(alone, changed).select()
    longer = load_recipe("smoke", [*overrides_of(alone), "run.num_steps=9"])
    path, state = CheckpointStore(alone, longer).select()
    assert (path.name, state.step) == ("step_000006", STEPS)


def test_a_checkpoint_without_its_marker_is_none(runs, tmp_path):
    alone, _, _ = runs
    shutil.copytree(alone / "checkpoints", tmp_path / "checkpoints")
    recipe = load_recipe("smoke", overrides_of(alone))
    (tmp_path / "checkpoints" / "step_000006" / "COMPLETE").unlink()
    assert CheckpointStore(tmp_path, recipe).select()[1].step == 4
    wished = load_recipe("smoke", [*overrides_of(alone), f"run.resume={tmp_path}/checkpoints/step_000006"])
    with pytest.raises(CheckpointError, match="is not a complete checkpoint; complete ones of this run: "
                                              ".*step_000002, "):
        CheckpointStore(tmp_path, wished).select()
