"""One Ray for all integration tests, and one small loop that the tests of pushes and failures share."""
from __future__ import annotations

import pytest

from frpo.cluster.learner_group import LearnerGroup
from frpo.cluster.ray_ranks import RayRanks
from frpo.cluster.runtime import ray_session
from frpo.config.loader import AnyRecipe
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
def ranks_of(ray_cluster):
    """recipe -> the processes of its learner ranks, which all recipes of as many ranks share."""
    running: dict[int, RayRanks] = {}

    def started(recipe: AnyRecipe) -> RayRanks:
        count = recipe.learner.num_ranks
        if count not in running:
            running[count] = RayRanks(recipe, "cpu")
        return running[count]

    yield started
    for ranks in running.values():
        ranks.close()


@pytest.fixture(scope="session")
def learner_of(ranks_of):
    """(recipe, model) -> its learner, built anew in the shared ranks."""
    return lambda recipe, path: LearnerGroup(recipe, path, "cpu", ranks_of(recipe))
