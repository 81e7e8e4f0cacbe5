"""What a run asks for when it starts again after a rank's death."""
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from frpo.config.loader import recipe_from_dict
from frpo.errors import CollectiveError, EngineError, LostNodeError
from frpo.run.restart import run_with_restarts


@pytest.mark.parametrize("resume, saved, again", [
    ("overwrite", True, "auto"), ("overwrite", False, "overwrite"), ("auto", True, "auto"), ("somewhere", True, "auto"),
    ("somewhere", False, "somewhere"), ("force", True, "force")])
def test_a_restart_goes_on_from_the_newest_checkpoint_as_the_run_was_allowed_to(resume, saved, again):
    """What `force` goes on from may still be a checkpoint of the other recipe. What saved nothing begins as before."""
    assert attempts(EngineError("a rank died"), dead=[0], resume=resume, saved=saved) == [resume, again]


@pytest.mark.parametrize("error, dead, count", [
    (EngineError("a rank died"), [0], 3), (EngineError("a push broke off"), [], 1),
    (CollectiveError("learner score: no answer within 1800 s from learner rank 1"), [], 3),
    (LostNodeError("node n2, where GPUs are reserved for engine 0, is gone"), [], 3)])
def test_only_the_loss_of_a_rank_or_of_reserved_gpus_starts_the_run_again(error, dead, count):
    assert len(attempts(error, dead, max_restarts=2)) == count


def test_a_node_that_goes_while_the_run_starts_is_done_without():
    tries = []

    @contextmanager
    def build(recipe):
        tries.append(recipe.run.resume)
        if len(tries) == 1:
            raise LostNodeError("node n2 is gone")
        yield SimpleNamespace()

    recipe = recipe_from_dict({"model": {"path": "m"}, "rewards": [{"name": "a", "function": "b:c"}],
                               "run": {"resume": "never", "max_restarts": 1}})
    assert run_with_restarts(recipe, build, lambda parts: "state") == "state"
    assert tries == ["never", "never"]


def attempts(error, dead, resume="auto", saved=True, max_restarts=1):
    """run.resume of every attempt of a run that always ends with this error."""
    asked = []

    @contextmanager
    def build(recipe):
        asked.append(recipe.run.resume)
        yield SimpleNamespace(
            learner=SimpleNamespace(dead=lambda: dead),
            journal=SimpleNamespace(checkpoints=SimpleNamespace(saved=saved)))

    def fit(parts):
        raise error

    recipe = recipe_from_dict({"model": {"path": "m"}, "rewards": [{"name": "a", "function": "b:c"}],
                               "run": {"resume": resume, "max_restarts": max_restarts}})
    with pytest.raises(type(error)):
        run_with_restarts(recipe, build, fit)
    return asked
