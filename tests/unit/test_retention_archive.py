"""A matrix keeps copies of its recipes, so that it is told of in the same words wherever its folder lies."""
from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml

from frpo.commands.report import section
from frpo.config.loader import load_recipe
from frpo.config.retention import RetentionRecipe
from frpo.downstream.archive import read_archive, write_archive
from frpo.downstream.plan import make_plan
from frpo.errors import ConfigError


@pytest.fixture
def matrix(tmp_path, monkeypatch):
    """In tmp_path/here with recipes of its own beside it, of relative paths; everything has run."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    (here / "own.yaml").write_text("extends: lab_policy.yaml\nrun: {num_steps: 7}\nmodel: {path: base}\n",
                                   encoding="utf-8")
    (here / "sub").mkdir()
    (here / "sub" / "own.yaml").write_text("extends: lab_downstream_sft\ndata: {path: '1e-6'}\n", encoding="utf-8")
    (here / "matrix.yaml").write_text(yaml.safe_dump({
        "run": {"name": "mine", "dir": "run"}, "seeds": [0, 1], "certificate": None,
        "policies": {"given": {"path": "$run/../models/$seed"},
                     "made": {"recipe": "own.yaml", "start": "given", "overrides": ["data.path=$run/x.jsonl"]}},
        "downstream": {"sft": {"recipe": "sub/own.yaml", "overrides": ["learner.lr=1e-5"]}},
        "measure": {"kept": {"recipe": "own.yaml"}}}), encoding="utf-8")
    recipe = load_recipe("matrix.yaml", (), RetentionRecipe)
    plan = make_plan(recipe)
    write_archive(recipe)
    for stage in plan.stages:
        stage.run_dir.mkdir(parents=True)
        (stage.run_dir / "metrics.jsonl").write_text("".join(json.dumps(
            {"step": step, "kept/kl": 0.1 * step, "kept/reward": 0.5, "kept/decile": 0.25}) + "\n" for step in (0, 4)),
            encoding="utf-8")
        stage.finish(steps=4, seconds=1.0)
    return tmp_path


def test_a_matrix_that_was_moved_is_told_of_as_before(matrix, monkeypatch):
    before = section(matrix / "here" / "run", matrix)
    assert section(Path("run"), Path("run")).tables == before.tables, "from its own directory"
    os.rename(matrix / "here" / "run", matrix / "there")
    for path in (matrix / "here").glob("**/*.yaml"):
        path.unlink()
    monkeypatch.chdir("/")
    after = section(matrix / "there", matrix)
    assert after.tables == before.tables and after.title == "mine" and after.warnings == before.warnings
    assert after.tables[1].rows == (("given", "", "2/2"), ("made", "2/2", "2/2"))


def test_a_copy_needs_no_other_file_and_says_the_same(matrix):
    copies = matrix / "here" / "run" / "recipes"
    assert sorted(path.name for path in copies.iterdir()) == ["own.yaml", "own_2.yaml"]
    assert "extends" not in (copies / "own.yaml").read_text(encoding="utf-8")
    original = make_plan(load_recipe("matrix.yaml", (), RetentionRecipe))
    again = make_plan(read_archive(matrix / "here" / "run"))
    for one, other in zip(original.stages, again.stages, strict=True):
        assert (one.name, one.digest) == (other.name, other.digest)
    assert list(again.stages)[-1].recipe.data.path == "1e-6", "text remains text"


def test_what_a_stage_was_made_of_still_counts(matrix):
    (matrix / "here" / "own.yaml").write_text("extends: lab_policy.yaml\nrun: {num_steps: 8}\nmodel: {path: base}\n",
                                              encoding="utf-8")
    plan = make_plan(load_recipe("matrix.yaml", (), RetentionRecipe))
    with pytest.raises(ConfigError, match="holds the result of another recipe than made, seed 0 has now"):
        plan.check_done()


def test_a_recipe_for_each_seed_stays_where_it_is(matrix):
    values = yaml.safe_load((matrix / "here" / "matrix.yaml").read_text(encoding="utf-8"))
    values["policies"]["made"]["recipe"] = "own_$seed.yaml"
    (matrix / "here" / "own_0.yaml").write_text("extends: own.yaml\n", encoding="utf-8")
    (matrix / "here" / "own_1.yaml").write_text("extends: own.yaml\nrun: {num_steps: 9}\n", encoding="utf-8")
    (matrix / "here" / "seeded.yaml").write_text(yaml.safe_dump(values | {"run": {"dir": "other"}}), encoding="utf-8")
    recipe = load_recipe("seeded.yaml", (), RetentionRecipe)
    write_archive(recipe)
    seeds = make_plan(read_archive(matrix / "here" / "other")).seeds
    assert [seed.policies["made"].recipe.run.num_steps for seed in seeds] == [7, 9]
