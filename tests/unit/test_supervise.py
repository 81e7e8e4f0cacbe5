"""What a run asks for when it starts again after a rank's death."""
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from frpo.config.loader import recipe_from_dict
from frpo.errors import EngineError
from frpo.run.restart import run_with_restarts


@pytest.mark.parametrize("resume, saved, again", [
    ("overwrite", True, "auto"), ("overwrite", False, "overwrite"), ("auto", True, "auto"), ("somewhere", True, "auto"),
    ("somewhere", False, "somewhere"), ("force", True, "force")])
def test_a_restart_goes_on_from_the_newest_checkpoint_as_the_run_was_allowed_to(resume, saved, again):
    """What `force` goes on from may still be a checkpoint of the other recipe. What saved nothing begins as before."""
    asked = []

    @contextmanager
    def build(recipe):
        asked.append(recipe.run.resume)
        yield SimpleNamespace(
            learner=SimpleNamespace(dead=lambda: [0]),
            journal=SimpleNamespace(checkpoints=SimpleNamespace(saved=saved)))

    def fit(parts):
        raise EngineError("a rank died")

    recipe = recipe_from_dict({"model": {"path": "m"}, "rewards": [{"name": "a", "function": "b:c"}],
                               "run": {"resume": resume, "max_restarts": 1}})
    with pytest.raises(EngineError):
        run_with_restarts(recipe, build, fit)
    assert asked == [resume, again]
