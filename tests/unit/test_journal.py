"""What becomes of the files of an earlier run in the same folder."""
import json

from frpo.config.loader import load_recipe, recipe_digest, recipe_from_dict
from frpo.run.checkpoint import FINISHED, CheckpointStore, write_finished
from frpo.run.journal import open_journal
from frpo.run.manifest import write_manifest
from frpo.types import RunState

VALUES = {"model": {"path": "m"}, "rewards": [{"name": "a", "function": "b:c"}]}


def recipe(folder, resume="auto"):
    return recipe_from_dict(VALUES | {"run": {"dir": str(folder), "resume": resume}})


def test_a_run_that_starts_over_moves_aside_what_an_earlier_one_wrote(tmp_path):
    for name in ("metrics", "changes", "traces"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"of": name}) + "\n")
    over = recipe(tmp_path, "overwrite")
    write_finished(over, 3)
    with open_journal(over, CheckpointStore(tmp_path, over), None, ("metrics", "samples")):
        pass
    assert (tmp_path / "metrics.jsonl").read_text() == (tmp_path / "samples.jsonl").read_text() == ""
    for name in ("metrics", "changes"):
        assert json.loads((tmp_path / f"{name}.earlier-1.jsonl").read_text()) == {"of": name}
    assert not (tmp_path / "changes.jsonl").exists() and not (tmp_path / FINISHED).exists()
    assert (tmp_path / "traces.jsonl").read_text() != "", "the run writes none"


def test_the_recipe_of_a_run_that_started_over_does_not_start_over_again(tmp_path):
    for resume, written in (("overwrite", "auto"), ("never", "never"), ("force", "force")):
        write_manifest(tmp_path, recipe(tmp_path, resume), data_digest="d", device="cpu")
        assert load_recipe(tmp_path / "recipe.yaml").run.resume == written


def test_values_changed_by_force_are_said_and_kept_beside_the_metrics(tmp_path, capsys):
    first = recipe(tmp_path)
    store = CheckpointStore(tmp_path, first)
    state = RunState(step=4, policy_version=4, data_cursor=0, recipe_digest=recipe_digest(first), file_offsets={})
    store.finish(store.begin(4), state)
    forced = recipe_from_dict(VALUES | {"run": {"dir": str(tmp_path), "resume": "force"}, "learner": {"lr": 0.5}})
    store = CheckpointStore(tmp_path, forced)
    with open_journal(forced, store, store.select(), ("metrics",)):
        pass
    changed = f"learner.lr: {first.learner.lr} -> 0.5"
    assert json.loads((tmp_path / "changes.jsonl").read_text()) == {"step": 4, "changes": [changed]}
    assert capsys.readouterr().out == f"continuing from step 4 with changed values (run.resume: force): {changed}\n"
