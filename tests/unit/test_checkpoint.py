"""Which folders count as checkpoints, which one a run goes on from, and which are dropped."""
import dataclasses
import json

import pytest

from frpo.config.loader import dump_recipe, recipe_digest, recipe_from_dict
from frpo.errors import CheckpointError
from frpo.run.checkpoint import FINISHED, MARKER, CheckpointStore, finished_steps, write_finished
from frpo.types import RunState

VALUES = {"model": {"path": "m"}, "rewards": [{"name": "a", "function": "b:c"}]}


def recipe(resume="auto", keep_last=2, **sections):
    return recipe_from_dict(VALUES | {"run": {"resume": str(resume), "keep_last": keep_last}} | sections)


def store(folder, **fields):
    return CheckpointStore(folder, recipe(**fields))


def state(step, of=None):
    return RunState(step=step, policy_version=step, data_cursor=4 * step, file_offsets={"metrics": 100 * step},
                    recipe_digest=recipe_digest(of or recipe()))


def save(checkpoints, step):
    path = checkpoints.begin(step)
    (path / "learner").mkdir()
    (path / "learner" / "weights").write_text(str(step))
    checkpoints.finish(path, state(step, checkpoints.recipe))
    return path


def steps(checkpoints):
    return [int(path.name.removeprefix("step_")) for path in checkpoints.complete()]


def error_of(checkpoints):
    with pytest.raises(CheckpointError) as caught:
        checkpoints.select()
    return str(caught.value)


def test_a_saved_state_comes_back_equal(tmp_path):
    path = save(store(tmp_path), 20)
    assert store(tmp_path).select() == (path, state(20))
    assert path == tmp_path / "checkpoints" / "step_000020" and (path / "learner" / "weights").read_text() == "20"
    assert json.loads((path / "recipe.json").read_text()) == json.loads(json.dumps(dump_recipe(recipe())))


def test_the_marker_is_written_after_everything_else(tmp_path, monkeypatch):
    checkpoints = store(tmp_path)
    path = checkpoints.begin(1)
    monkeypatch.setattr(dataclasses, "asdict", lambda state: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        checkpoints.finish(path, state(1))
    assert not (path / MARKER).exists() and checkpoints.complete() == []


def test_an_interrupted_save_is_ignored_begun_anew_and_cleaned_up(tmp_path):
    checkpoints = store(tmp_path)
    first = save(checkpoints, 1)
    half = checkpoints.begin(2)
    (half / "half").write_text("")
    assert store(tmp_path).select()[0] == first
    assert list(checkpoints.begin(2).iterdir()) == []
    save(checkpoints, 3)
    assert steps(checkpoints) == [1, 3] and not half.exists()


def test_keep_last_drops_the_oldest(tmp_path):
    checkpoints = store(tmp_path, keep_last=2)
    for step in (5, 10, 15, 1_000_000, 1_000_005):
        save(checkpoints, step)
    assert steps(checkpoints) == [1_000_000, 1_000_005]
    assert store(tmp_path).select()[1].step == 1_000_005


def test_an_interrupted_removal_leaves_nothing_that_looks_complete(tmp_path, monkeypatch):
    checkpoints = store(tmp_path, keep_last=1)
    save(checkpoints, 1)

    def killed(path):
        raise KeyboardInterrupt

    monkeypatch.setattr("frpo.run.checkpoint.shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        save(checkpoints, 2)
    assert steps(checkpoints) == [2]


def test_other_files_in_the_folder_are_left_alone(tmp_path):
    (tmp_path / "checkpoints" / "step_000001_mine").mkdir(parents=True)
    (tmp_path / "checkpoints" / "notes.txt").write_text("keep")
    checkpoints = store(tmp_path, keep_last=1)
    for step in (1, 2):
        save(checkpoints, step)
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"step_000001_mine", "notes.txt", "step_000002"}


def test_going_back_to_a_checkpoint_drops_what_came_after_it(tmp_path):
    """Otherwise keep_last would keep the abandoned continuation and auto would go on from it."""
    checkpoints = store(tmp_path, keep_last=3)
    for step in (20, 40, 60):
        save(checkpoints, step)
    back = store(tmp_path, resume=tmp_path / "checkpoints" / "step_000020", keep_last=3)
    assert back.select()[1] == state(20) and steps(back) == [20, 40, 60]
    save(back, 30)
    assert steps(back) == [20, 30]


# --- select -----------------------------------------------------------------------------------------------------------

def test_auto_starts_anew_without_a_checkpoint_and_creates_nothing(tmp_path):
    assert store(tmp_path / "run").select() is None and not (tmp_path / "run").exists()


def test_never_refuses_to_overwrite(tmp_path):
    assert store(tmp_path, resume="never").select() is None
    save(store(tmp_path), 1)
    message = error_of(store(tmp_path, resume="never"))
    assert "run.resume=never" in message and "holds 1 complete checkpoint(s)" in message
    assert message.endswith("choose another run.dir, or set run.resume=auto to continue (--overwrite starts over)")


def test_a_path_names_any_checkpoint_of_the_run(tmp_path):
    for step in (1, 2):
        path = save(store(tmp_path), step)
    first = path.with_name("step_000001")
    assert store(tmp_path, resume=first).select() == (first, state(1))


def test_a_path_of_another_run_starts_files_anew(tmp_path):
    """Its metrics lie in the other run's folder, so there is nothing to cut back to."""
    path = save(store(tmp_path / "a"), 1)
    fork = store(tmp_path / "b", resume=path)
    assert fork.select() == (path, dataclasses.replace(state(1), file_offsets={}))
    save(fork, 2)
    assert "choose another run.dir, or set run.resume=auto" in error_of(fork)
    assert steps(store(tmp_path / "a")) == [1]


@pytest.mark.parametrize("name", ["step_000009", "step_000002", ""])
def test_a_path_without_a_complete_checkpoint_names_the_complete_ones(tmp_path, name):
    path = save(store(tmp_path), 1)
    store(tmp_path).begin(2)
    wish = tmp_path / "checkpoints" / name
    message = error_of(store(tmp_path, resume=wish))
    assert message == (f"run.resume: {str(wish)!r} is not a complete checkpoint; complete ones of this run: {path} "
                       "(give one, or auto, force, never or overwrite)")
    assert "complete ones of this run: none" in error_of(store(tmp_path / "b", resume=wish))


def test_the_folder_of_a_run_names_the_checkpoints_inside(tmp_path):
    path = save(store(tmp_path / "a"), 1)
    assert error_of(store(tmp_path / "b", resume=tmp_path / "a")).endswith(
        f"complete ones of {tmp_path / 'a'}: {path} (give one, or auto, force, never or overwrite)")


def test_another_recipe_is_refused_naming_what_differs(tmp_path):
    path = save(store(tmp_path), 1)
    message = error_of(store(tmp_path, learner={"lr": 0.5}, shuffle_rewards=True))
    assert message == (f"{path} was written by another recipe:\n  learner.lr: 1e-06 -> 0.5\n"
                       "  shuffle_rewards: False -> True\nUse that recipe again or another run.dir; "
                       "run.resume=force continues from it with the new values, --overwrite starts over")
    assert steps(store(tmp_path)) == [1]


def test_force_goes_on_under_other_values_and_tells_them(tmp_path):
    path = save(store(tmp_path), 1)
    changed = store(tmp_path, resume="force", learner={"lr": 0.5}, objective={"kl_coef": 0.1})
    found, at = changed.select()
    assert found == path and at == dataclasses.replace(state(1), recipe_digest=recipe_digest(changed.recipe))
    assert changed.changes(path) == ["learner.lr: 1e-06 -> 0.5", "objective.kl_coef: 0.0 -> 0.1"]
    save(changed, 2)
    assert store(tmp_path, learner={"lr": 0.5}, objective={"kl_coef": 0.1}).select()[1].step == 2, "and then by itself"
    assert store(tmp_path / "new", resume="force").select() is None


def test_force_does_not_go_on_with_another_model(tmp_path):
    save(store(tmp_path), 1)
    message = error_of(store(tmp_path, resume="force", model={"path": "other"}))
    assert message.startswith("run.resume=force cannot continue from ") and "\n  model.path: m -> other\n" in message


def test_overwrite_starts_anew_and_clears_what_is_there(tmp_path):
    for step in (1, 2):
        save(store(tmp_path), step)
    over = store(tmp_path, resume="overwrite")
    assert over.select() is None and steps(over) == [1, 2], "nothing is removed before the run begins"
    over.clear()
    assert steps(over) == []


@pytest.mark.parametrize("changes, found", [
    ({}, 4), ({"run": {"resume": "force"}}, 4), ({"run": {"num_steps": 3}}, 4), ({"run": {"num_steps": 5}}, None),
    ({"learner": {"lr": 0.5}}, None), ({"run": {"resume": "overwrite"}}, None), ({"run": {"resume": "never"}}, None)])
def test_a_run_that_came_to_its_end_is_known(tmp_path, changes, found):
    def of(run=None, **more):
        return recipe_from_dict(VALUES | more | {"run": {"dir": str(tmp_path), "num_steps": 4} | (run or {})})

    assert finished_steps(of()) is None
    write_finished(of(), 4)
    assert finished_steps(of()) is None, "its export is gone and has to be made again"
    (tmp_path / "export").mkdir()
    assert finished_steps(of(**changes)) == found
    (tmp_path / FINISHED).write_text("")
    assert finished_steps(of()) is None, "the process ended while this was written"


def test_a_longer_run_with_other_limits_goes_on(tmp_path):
    path = save(store(tmp_path), 1)
    longer = CheckpointStore(tmp_path, recipe_from_dict(VALUES | {"run": {"num_steps": 999}, "evaluate": {"every": 1}}))
    assert longer.select() == (path, state(1))


@pytest.mark.parametrize("name, text", [
    ("state.json", "{"), ("state.json", '{"step": 1}'), ("recipe.json", ""), ("state.json", '{"unknown": 1}')])
def test_a_damaged_checkpoint_is_named(tmp_path, name, text):
    path = save(store(tmp_path), 1)
    (path / name).write_text(text)
    message = error_of(store(tmp_path))
    assert message.startswith(f"{path} is damaged or of another version of frpo: ") and "another run.dir" in message
