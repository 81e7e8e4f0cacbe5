"""One Ray for all integration tests, and one small loop that the tests of pushes and failures share."""
from __future__ import annotations

from dataclasses import replace

import pytest

from frpo.cluster.learner_group import LearnerGroup
from frpo.cluster.ray_ranks import ray_learner
from frpo.cluster.runtime import ray_session, wait_for
from frpo.config.loader import AnyRecipe, dump_recipe
from loop import RunningLoop, random_model, small_recipe, splitting_strategy
from runs import REWARD, finish

LONG = 384
"""Window of the shared loop: longer than two blocks of vLLM's prefix cache (128 tokens each)."""


@pytest.fixture(scope="session")
def ray_cluster():
    with ray_session():
        yield


@pytest.fixture(scope="session")
def loop(ray_cluster, tmp_path_factory):
    """A tied Qwen2 in fp32 under ZeRO-3 on two ranks, and one engine."""
    folder = tmp_path_factory.mktemp("loop")
    path = random_model(folder / "model", "qwen2", tied=True, max_length=LONG)
    running = RunningLoop(small_recipe(path, splitting_strategy(folder, 3), max_length=LONG), path)
    yield running
    running.close()


@pytest.fixture(scope="session")
def alone(tmp_path_factory):
    """Folder of a whole run that nothing disturbs, beside its reward."""
    base = tmp_path_factory.mktemp("runs")
    (base / "reward.py").write_text(REWARD, encoding="utf-8")
    finish(base / "alone")
    return base / "alone"


@pytest.fixture(scope="session")
def learner_of(ray_cluster):
    """(recipe, model) -> its learner ranks, built anew in processes that earlier recipes of as many ranks started."""
    running: dict[int, LearnerGroup] = {}

    def build(recipe: AnyRecipe, path: str) -> LearnerGroup:
        count = recipe.learner.num_ranks
        if count not in running:
            running[count] = ray_learner(recipe, path, "cpu")
            return running[count]
        learner = running[count]
        values = (type(recipe), dump_recipe(recipe), path, "cpu", {})
        calls = [(a, a.handle.build.remote(*values)) for a in learner.ranks.actors]
        wait_for("rebuild", calls, recipe.learner.startup_timeout_s)
        section, learner.recipe = recipe.learner, recipe
        learner.layout = replace(
            learner.layout, micro_batch_tokens=section.micro_batch_tokens, packed=section.packing)
        return learner

    yield build
    for learner in running.values():
        learner.close()
