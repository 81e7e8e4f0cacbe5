"""TensorBoard's events and W&B's offline run, read back, of a run that ended beyond its checkpoint and went on."""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from frpo.config.loader import recipe_from_dict
from frpo.run.sinks import SAMPLES, _kept, offline_records, open_sinks

VALUES = {"model": {"path": "m"}, "rewards": [{"name": "a", "function": "b:c"}]}


def recipe(**telemetry):
    return recipe_from_dict(VALUES | {"run": {"name": "mine"}, "telemetry": telemetry})


def sample(step, text="said"):
    return {"step": step, "task": "eval", "prompt": "ask | 1", "completion": f"{text}\nthen", "reward": 0.25,
            "rewards": {"a": 0.25}}


def run_and_go_on(folder: Path, **telemetry):
    """Steps 0 to 7, ended without a word; then on from the checkpoint of step 5 to step 9."""
    for last, steps in ((None, range(8)), (5, range(6, 10))):
        sink, = open_sinks(recipe(**telemetry), folder, last)
        for step in steps:
            if step % 3 == 0:
                rows = [sample(step)]
                with (folder / SAMPLES).open("a", encoding="utf-8") as file:
                    file.writelines(json.dumps(row) + "\n" for row in rows)
                sink.samples(step, rows)
            sink.write(step, {"reward/mean": float(step)})
        sink.close()


def test_tensorboard_shows_each_step_once(tmp_path):
    run_and_go_on(tmp_path, tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"tensors": 0}).Reload()
    found = events.Scalars("reward/mean")
    assert [(event.step, event.value) for event in found] == [(step, float(step)) for step in range(10)]
    texts = events.Tensors("eval/samples/text_summary")
    assert sorted({event.step for event in texts}) == [0, 3, 6, 9]
    table = texts[0].tensor_proto.string_val[0].decode()
    assert table.splitlines()[2] == "| ask \\| 1 | said then | 0.25 |"


def history(folder: Path):
    """The offline runs in the order in which they were made, and (run id, step, values) of what they logged."""
    import wandb

    wandb.teardown()  # its process writes the last records of a finished run only with its own end
    rows, runs = [], []
    for path in sorted((folder / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime):
        for record in offline_records(path):
            if record.HasField("run"):
                runs.append(record.run)
            if record.HasField("history"):
                values = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                rows.append((runs[-1].run_id, record.history.step.num, values))
    return runs, rows


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from frpo.run.sinks import open_sinks
from frpo.telemetry.jsonl import JsonlFile
from test_sinks import recipe
folder = Path(sys.argv[1])
sink, = open_sinks(recipe(wandb=True), folder, None)
metrics = JsonlFile(folder / "metrics.jsonl")
for step in range(8):
    row = {"reward/mean": float(step), "policy/kl_ref": None}
    metrics.append({"step": step, **row})
    sink.write(step, row)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.timeout(120)
def test_what_wandb_had_not_written_when_a_run_was_killed_is_logged_once_more(tmp_path, monkeypatch):
    """A process that ends by kill -9 takes what W&B has only in memory with it; the metrics file has it."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    ended = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), str(Path(__file__).parent)], timeout=60)
    assert ended.returncode == -9
    written, = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    assert sum(record.HasField("history") for record in offline_records(written)) < 8, "or this tests nothing"
    sink, = open_sinks(recipe(wandb=True), tmp_path, 5)
    for step in range(6, 10):
        sink.write(step, {"reward/mean": float(step)})
    sink.close()
    _, rows = history(tmp_path)
    assert [(step, values["reward/mean"]) for _, step, values in rows] == [(step, float(step)) for step in range(10)]


@pytest.mark.timeout(120)
def test_wandb_goes_on_with_its_run_and_logs_each_step_once(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run_and_go_on(tmp_path, wandb=True, project="kept", group="seeds", tags=["a", "b"])
    runs, rows = history(tmp_path)
    assert len({run.run_id for run in runs}) == 1
    assert {(run.project, run.run_group, run.display_name, tuple(run.tags)) for run in runs} == {
        ("kept", "seeds", "mine", ("a", "b"))}
    assert [(step, values["reward/mean"]) for _, step, values in rows] == [(step, float(step)) for step in range(10)]
    assert [step for _, step, values in rows if any("eval/samples" in key for key in values)] == [0, 3, 6, 9]


def test_a_run_that_starts_anew_is_another_one(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for _ in range(2):
        sink, = open_sinks(recipe(wandb=True), tmp_path, None)
        sink.write(0, {"reward/mean": 0.5})
        sink.close()
    runs, rows = history(tmp_path)
    assert len({run.run_id for run in runs}) == 2 and [step for _, step, _ in rows] == [0, 0]


def test_two_runs_of_one_process_are_two(tmp_path, monkeypatch):
    """As in the quick start, whose control logs while the journal of the first run is open."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folders = [tmp_path / name for name in ("first", "second")]
    for folder in folders:
        folder.mkdir()
    sinks = [sink for folder in folders for sink in open_sinks(recipe(wandb=True), folder, None)]
    for step in range(2):
        for value, sink in enumerate(sinks):
            sink.write(step, {"reward/mean": float(value)})
    for sink in sinks:
        sink.close()
    for value, folder in enumerate(folders):
        assert [(step, values["reward/mean"]) for _, step, values in history(folder)[1]] == [(0, value), (1, value)]


def test_tensorboard_takes_back_an_earlier_run_when_one_starts_anew(tmp_path):
    for step in (3, 0):
        sink, = open_sinks(recipe(tensorboard=True), tmp_path, None)
        sink.write(step, {"reward/mean": 0.5})
        sink.close()
        for path in (tmp_path / "tensorboard").glob("events.out.tfevents.*"):  # named by the second
            path.rename(path.with_name(path.name.replace("tfevents.", "tfevents.0")))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("reward/mean")] == [0]


def test_kept_samples_are_those_up_to_the_checkpoint_without_a_torn_line(tmp_path):
    (tmp_path / SAMPLES).write_text("".join(json.dumps(sample(step)) + "\n" for step in (0, 3, 6)) + '{"step": 6, "ta')
    assert [row["step"] for row in _kept(tmp_path / SAMPLES, 6)] == [0, 3, 6]
    assert [row["step"] for row in _kept(tmp_path / SAMPLES, 5)] == [0, 3]
    assert _kept(tmp_path / SAMPLES, None) == _kept(tmp_path / "none.jsonl", 5) == []


def test_what_is_not_asked_for_is_not_opened(tmp_path):
    assert open_sinks(recipe(), tmp_path, None) == () and list(tmp_path.iterdir()) == []
