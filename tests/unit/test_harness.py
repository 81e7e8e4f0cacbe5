"""The adapter of lm-evaluation-harness: a task of one's own on a model made on the spot, where the harness is there."""
from __future__ import annotations

import json
import sys

import pytest
import yaml

from frpo.commands.harness import run_harness
from frpo.errors import ConfigError
from frpo.lab.network import make_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("lab") / "model", seed=0)


def test_without_the_harness_the_message_says_what_to_install(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"cannot be imported .*pip install lm_eval"):
        run_harness(model, ["any"])


def test_a_task_of_ones_own(model, tmp_path, capsys):
    pytest.importorskip("lm_eval")
    rows = [{"prompt": "BOS v1 o2 o3 n0 SEP", "choices": ["OK", "NO"], "right": index % 2} for index in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = {"task": "refuses", "dataset_path": "json", "dataset_kwargs": {"data_files": str(tmp_path / "rows.jsonl")},
            "test_split": "train", "output_type": "multiple_choice", "doc_to_text": "{{prompt}}",
            "doc_to_choice": "{{choices}}", "doc_to_target": "{{right}}",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]}
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "refuses.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    options = {"dtype": "fp32", "include": str(tmp_path / "tasks"), "output": str(tmp_path / "found.json")}
    assert run_harness(model, ["refuses"], **options) == 0
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert found["tasks"]["refuses"]["acc,none"] == 0.5  # the same prompt, whose right answer changes every time
    assert "refuses" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="unknown tasks refuse; .*--include"):
        run_harness(model, ["refuse"], **options)
