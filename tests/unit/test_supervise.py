"""What a run asks for when it starts again after a rank's death."""
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from frpo.cluster.launcher import LAUNCHER
from frpo.config.loader import recipe_from_dict
from frpo.errors import EngineError, LostNodeError, LostRankError, RewardError
from frpo.run import stop_request
from frpo.run.restart import run_with_restarts


@pytest.mark.parametrize("resume, saved, again", [
    ("overwrite", True, "auto"), ("overwrite", False, "overwrite"), ("auto", True, "auto"), ("somewhere", True, "auto"),
    ("somewhere", False, "somewhere"), ("force", True, "force")])
def test_a_restart_goes_on_from_the_newest_checkpoint_as_the_run_was_allowed_to(resume, saved, again):
    """What `force` goes on from may still be a checkpoint of the other recipe. What saved nothing begins as before."""
    assert attempts(LostRankError("a rank died"), resume=resume, saved=saved) == [resume, again]


@pytest.mark.parametrize("error, count", [
    (EngineError("a push broke off"), 1), (RewardError("reward 'a' raised"), 1),
    (LostRankError("learner score: no answer within 1800 s from learner rank 1"), 3),
    (LostNodeError("node n2, where GPUs are reserved for engine 0, is gone"), 3)])
def test_only_the_loss_of_a_rank_or_of_reserved_gpus_starts_the_run_again(error, count):
    assert len(attempts(error, max_restarts=2)) == count


@pytest.mark.parametrize("error", [LostNodeError("node n2 is gone"), LostRankError("learner build: no answer")])
def test_a_loss_while_the_run_starts_is_a_restart(error):
    tries = []

    @contextmanager
    def build(recipe):
        tries.append(recipe.run.resume)
        if len(tries) == 1:
            raise error
        yield SimpleNamespace()

    assert run_with_restarts(recipe_of(resume="never", max_restarts=1), build, lambda parts: "state") == "state"
    assert tries == ["never", "never"]


def attempts(error, resume="auto", saved=True, max_restarts=1):
    """run.resume of every attempt of a run that always ends with this error."""
    asked = []

    @contextmanager
    def build(recipe):
        asked.append(recipe.run.resume)
        yield SimpleNamespace(
            learner=SimpleNamespace(device="cpu"),
            journal=SimpleNamespace(checkpoints=SimpleNamespace(saved=saved)))

    def fit(parts):
        raise error

    with pytest.raises(type(error)):
        run_with_restarts(recipe_of(resume=resume, max_restarts=max_restarts), build, fit)
    return asked


def test_a_restart_stays_on_the_device_of_the_first_start():
    """With `auto`, a run that has lost a node would otherwise go on on the CPU."""
    devices = []

    @contextmanager
    def build(recipe):
        devices.append(recipe.run.device)
        yield SimpleNamespace(learner=SimpleNamespace(device="cuda"),
                              journal=SimpleNamespace(checkpoints=SimpleNamespace(saved=False)))

    def fit(parts):
        if len(devices) == 1:
            raise LostRankError("a rank died")
        return "state"

    assert run_with_restarts(recipe_of(device="auto"), build, fit) == "state"
    assert devices == ["auto", "cuda"]


def test_a_stop_that_is_asked_for_comes_before_a_restart(monkeypatch):
    monkeypatch.setattr(stop_request, "asked", lambda: True)
    with pytest.raises(stop_request.StopRequested, match="after a loss"):
        attempts(LostRankError("a rank died"))


def test_ranks_of_a_launcher_end_with_it(monkeypatch):
    for name in LAUNCHER:
        monkeypatch.setenv(name, "0")
    assert len(attempts(LostRankError("a rank died"))) == 1


def recipe_of(**run):
    return recipe_from_dict({"model": {"path": "m"}, "rewards": [{"name": "a", "function": "b:c"}], "run": run})
