"""DeepSpeed JSONs: what ships, and what a recipe's own may not decide."""
import json
from pathlib import Path

import pytest

from frpo.config.memory import memory_strategy
from frpo.errors import ConfigError

SHIPPED = sorted(path.stem for path in (Path(__file__).parents[2] / "ds_configs").glob("*.json"))


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_strategy_is_of_its_names_stage(name):
    zero = memory_strategy(name)["zero_optimization"]
    assert f"zero{zero['stage']}" == name.removesuffix("_offload")
    assert ("offload_optimizer" in zero) == name.endswith("_offload")
    assert ("offload_param" in zero) == (name == "zero3_offload")


def strategy(folder, **values):
    path = folder / "own.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}} | values))
    return str(path)


@pytest.mark.parametrize("zero", [{}, {"stage": 0}, {"stage": 4}, {"stage": "3"}])
def test_a_strategy_names_its_stage(tmp_path, zero):
    with pytest.raises(ConfigError, match=r"own.json: zero_optimization.stage = .* should be 1, 2 or 3"):
        memory_strategy(strategy(tmp_path, zero_optimization=zero))


@pytest.mark.parametrize("key", ["bf16", "data_types", "communication_data_type"])
def test_precision_is_not_a_memory_strategys_to_decide(tmp_path, key):
    assert memory_strategy(strategy(tmp_path))
    with pytest.raises(ConfigError, match=f"own.json: {key} come from the recipe"):
        memory_strategy(strategy(tmp_path, **{key: "x"}))
