"""The zoo of model families builds, and the table says of each result what it is."""
from __future__ import annotations

import importlib.util
import sys
from contextlib import closing
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from frpo.errors import EngineError, ModelError

FOLDER = Path(__file__).parents[2] / "benchmarks"


def module(name):
    """A file of the benchmarks, under the name by which they import each other."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    found = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


zoo = module("family_zoo")
checks = module("family_checks")
families = module("families")


def test_every_family_can_be_made():
    found = set()
    for name, make in zoo.ZOO.items():
        config = make()
        with torch.device("meta"):
            network = AutoModelForCausalLM.from_config(config)
        assert network.get_input_embeddings().weight.shape[0] == 104, name
        assert sum(parameter.numel() for parameter in network.parameters()) < 1e6, name
        found.add(type(network))
    assert len(found) >= 25


RIGHT, WRONG, REFUSED = {"difference": 2e-6}, {"difference": 0.25}, {"refused": "It mixes sequences. Set packing."}


@pytest.mark.parametrize(("cells", "expected"), [
    ({"before": WRONG, "packed": RIGHT, "padded": RIGHT, "packing": RIGHT, "padding": RIGHT, "lora": RIGHT,
      "vllm": WRONG, "train": REFUSED},
     "| x | **0.25** | 2e-06 | 2e-06 | works | works | works | **differs by 0.25** | refused [1] |"),
    ({"packed": WRONG, "padded": RIGHT, "packing": REFUSED, "padding": RIGHT, "lora": {"failed": "KeyError: 'a'"}},
     "| x | not measured | **0.25** | 2e-06 | works | padded only [1] | no [2] | not measured | not measured |"),
    ({"packed": REFUSED, "padded": REFUSED, "packing": REFUSED, "padding": REFUSED, "lora": REFUSED},
     "| x | not measured | refused [1] | refused [1] | refused [1] | refused [1] | refused [1] | not measured | not "
     "measured |"),
    ({"packing": WRONG, "padding": WRONG},
     "| x | not measured | not measured | not measured | **differs by 0.25** | **differs by 0.25** | not measured | "
     "not measured | not measured |"),
])
def test_row(cells, expected):
    notes = families.Notes()
    assert families.row("x", cells, notes) == expected
    assert set(notes.numbers) <= {"It mixes sequences", "KeyError: 'a'"}


@pytest.mark.parametrize(("error", "cell"), [
    (ModelError("It has no head."), {"refused": "It has no head."}),
    (EngineError("load: rollout engine 0 (log: /tmp/1.err) raised ValueError('no kernel')"),
     {"failed": "ValueError('no kernel')"}),
    (KeyError("a"), {"failed": "KeyError: 'a'"}),
])
def test_what_is_raised_becomes_the_cells_that_are_missing(tmp_path, error, cell):
    cells = {"packed": WRONG, "packing": WRONG, "lora": WRONG}
    with closing(checks.Processes(tmp_path)) as processes, processes.recorded(cells, "packed", "packing"):
        cells["packed"] = RIGHT
        raise error
    assert cells == {"packed": RIGHT, "packing": cell, "lora": WRONG}
