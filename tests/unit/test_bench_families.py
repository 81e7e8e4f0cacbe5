"""The zoo of model families builds, and the table says of each result what it is."""
from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

FOLDER = Path(__file__).parents[2] / "benchmarks"


def module(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    found = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


zoo = module("family_zoo")
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
    ({"before": WRONG, "packed": RIGHT, "padded": RIGHT, "packing": RIGHT, "finetune": RIGHT, "lora": RIGHT,
      "vllm": WRONG, "train": REFUSED},
     "| x | **0.25** | 2e-06 | 2e-06 | works | works | works | **differs by 0.25** | refused [1] |"),
    ({"packed": WRONG, "padded": RIGHT, "packing": REFUSED, "finetune": RIGHT, "lora": {"failed": "KeyError: 'a'"}},
     "| x | not measured | **0.25** | 2e-06 | works | padded only [1] | no [2] | not measured | not measured |"),
    ({"packed": REFUSED, "padded": REFUSED, "packing": REFUSED, "finetune": REFUSED, "lora": REFUSED},
     "| x | not measured | refused [1] | refused [1] | refused [1] | refused [1] | refused [1] | not measured | not "
     "measured |"),
])
def test_row(cells, expected):
    notes = families.Notes()
    assert families.row("x", cells, notes) == expected
    assert notes.numbers.get("It mixes sequences") == 1


def test_what_a_job_did_not_get_to_says_how_it_ended(tmp_path, monkeypatch):
    (tmp_path / "family_jobs.py").write_text(
        "import sys, pathlib\npathlib.Path(sys.argv[3], 'learn.json').write_text('{\"packed\": {\"difference\": 1e-6}}')\n"
        "sys.exit('out of paper')")
    monkeypatch.setattr(families, "HERE", tmp_path)
    found = families.measured("learn", "llama", tmp_path / "llama", {})
    assert found["packed"] == RIGHT | {"difference": 1e-6}
    assert found["lora"] == {"failed": "the process ended with exit code 1: out of paper"}
    (tmp_path / "family_jobs.py").write_text("import time\ntime.sleep(60)")
    monkeypatch.setitem(families.TIME_LIMIT_S, "learn", 1)
    assert families.measured("learn", "llama", tmp_path / "llama", {})["packed"] == {"failed": "no answer within 1 s"}
