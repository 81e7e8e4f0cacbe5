"""Which paths of a recipe become absolute, which files are found, and which values are left alone."""
import pytest

from frpo.config.finetune import FinetuneRecipe
from frpo.config.loader import load_recipe
from frpo.errors import ConfigError
from frpo.run.relocation import resolved

REWARD = ("rewards=[{name: a, function: 'own.py:a', kwargs: {model: models/scorer, rows: rows.jsonl, word: models, "
          "deep: [models/scorer]}}]")


@pytest.fixture
def here(tmp_path):
    (tmp_path / "models" / "scorer").mkdir(parents=True)
    for name in ("own.py", "rows.jsonl"):
        (tmp_path / name).touch()
    return tmp_path


def found(recipe, here):
    files = []

    def of_file(key, path, function):
        files.append((key, path, function))
        return f"/sent/{path}"

    return resolved(recipe, here, ("auto", "never"), of_file), files


def test_folders_and_files_of_a_recipe(here):
    values, files = found(load_recipe("smoke", ["run.dir=runs/x", "data.path=rows.jsonl", REWARD]), here)
    assert values["run"]["dir"] == f"{here}/runs/x" and values["run"]["resume"] == "auto"
    assert values["data"]["path"] == "/sent/rows.jsonl" and values["rewards"][0]["function"] == "/sent/own.py:a"
    assert values["rewards"][0]["kwargs"] == {"model": f"{here}/models/scorer", "rows": "/sent/rows.jsonl",
                                              "word": "models", "deep": [f"{here}/models/scorer"]}
    assert sorted(files) == [("data.path", "rows.jsonl", False), ("rewards.0.function", "own.py", True),
                             ("rewards.0.kwargs.rows", "rows.jsonl", False)]


def test_the_folders_of_a_fine_tuning(here):
    overrides = ["run.dir=/runs/x", "run.resume=old/checkpoints", "model={path: models, tiny: null, max_length: 640}",
                 "reference={path: models/scorer, mode: live}", "data.path=/there/rows.jsonl"]
    values, files = found(load_recipe("finetune_gsm8k", overrides, FinetuneRecipe), here)
    assert values["run"]["dir"] == "/runs/x" and values["run"]["resume"] == f"{here}/old/checkpoints"
    assert values["model"]["path"] == f"{here}/models" and values["reference"]["path"] == f"{here}/models/scorer"
    assert values["data"]["path"] == "/there/rows.jsonl" and files == []


def test_a_missing_file_of_a_function_is_told(here):
    with pytest.raises(ConfigError, match=r"rewards\.0\.function: there is no file .*other\.py.*; correct the path"):
        found(load_recipe("smoke", ["rewards=[{name: a, function: 'other.py:a'}]"]), here)
