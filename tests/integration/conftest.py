"""One Ray for all integration tests, and one small loop that the tests of pushes and failures share."""
from __future__ import annotations

import pytest
from loop import RunningLoop, random_model, small_recipe, splitting_strategy

from frpo.cluster.runtime import ray_session

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
