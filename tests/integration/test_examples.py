"""The scripts and the notebook of examples/, run as they stand in a folder of their own."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from frpo.config.loader import load_recipe
from frpo.learner.tiny import tiny_model
from runs import LONG, metrics

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The tiny model of smoke, which all examples train."""
    return tiny_model(load_recipe("smoke"), tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def place(tmp_path, monkeypatch, tiny):
    """A working folder with a copy of the examples in it, as in a clone, and the model that each of them would make."""
    shutil.copytree(EXAMPLES, tmp_path / "examples")
    for name in ("own_reward", "steps", "own_objective", "notebook"):
        shutil.copytree(tiny, tmp_path / "runs" / name / "model")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*command):
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_the_script_and_the_recipe_are_one_run(place):
    """The recipe takes the script's run for its own, which is finished. It would not take another recipe's."""
    printed = run("examples/own_reward.py")
    assert "<Result own_reward: step 12, eval/reward" in printed
    rows = metrics(place / "runs" / "own_reward")
    assert [row["step"] for row in rows] == [*range(13)]
    assert rows[-1]["eval/reward"] > rows[0]["eval/reward"] + 0.1, "it learns"
    for again in (["examples/own_reward.py"], ["-m", "frpo", "train", "examples/own_reward.yaml"]):
        assert "runs/own_reward is finished: all 12 steps are done" in run(*again)


def test_the_loop_is_driven_by_hand(place):
    printed = run("examples/steps.py")
    taken = [line for line in printed.splitlines() if line.startswith("step ") and "->" in line]
    rows = metrics(place / "runs" / "steps")
    assert len(taken) == rows[-1]["step"] < 30, "it broke off at the reward that it waits for"
    assert rows[-1]["reward/mean"] > 0.5 >= max(row["reward/mean"] for row in rows[1:-1])
    assert (place / "runs" / "steps" / "early" / "model.safetensors").is_file()


@LONG
def test_an_objective_in_a_file_of_ones_own(place):
    run("examples/own_objective.py")
    recipe = (place / "runs" / "own_objective" / "recipe.yaml").read_text(encoding="utf-8")
    assert "name: examples/own_objective.py:Ranks" in recipe and "power: 0.5" in recipe
    assert metrics(place / "runs" / "own_objective")[-1]["step"] == 8


@LONG
def test_the_notebook(place):
    """Its cells run in a kernel of their own; functions of a cell reach the workers by value."""
    book = nbformat.read(place / "examples" / "python.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in book.cells), "the file holds no outputs"
    for name in ("JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        os.environ.setdefault(name, str(place / "jupyter"))
    NotebookClient(book, timeout=500, resources={"metadata": {"path": str(place)}}).execute()
    shown = ["".join(output.get("data", {}).get("text/plain", "") for output in cell.get("outputs", ()))
             for cell in book.cells if cell.cell_type == "code"]
    assert shown[1].startswith("<Result notebook: step 6, eval/reward")
    recipe = json.dumps((place / "runs" / "notebook" / "recipe.yaml").read_text(encoding="utf-8"))
    assert "runs/inputs/even-" in recipe
    tuned = metrics(place / "runs" / "notebook_sums")
    assert tuned[-1]["eval/nll"] < tuned[0]["eval/nll"]
    assert shown[-1].count("+") == 1
