"""The Python functions: names, recipes from objects, functions and rows as values, results."""
from __future__ import annotations

import ast
import functools
import json
import subprocess
import sys
import threading
from pathlib import Path

import pandas
import pytest
from datasets import Dataset

import frpo
from frpo.config.loader import dump_recipe, recipe_digest, to_recipe
from frpo.errors import ConfigError, DataError, RewardError
from frpo.inputs import name_of, path_of
from frpo.loading import load_function

SMOKE = {"extends": "smoke"}


def one(completions, **columns):
    return [1.0 for _ in completions]


def deep(levels):
    value = []
    for _ in range(levels):
        value = [value]
    return value


def made(length):
    return lambda completions, **columns: [float(len(text) > length) for text in completions]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipe(**values):
    return to_recipe({**SMOKE, **values}, (), frpo.Recipe)


# --- names ------------------------------------------------------------------------------------------------------------

def test_every_public_name_is_what_type_checkers_see():
    tree = ast.parse(Path(frpo.__file__).read_text(encoding="utf-8"))
    block, = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.asname or alias.name: (node.module, alias.name)
            for node in block.body for alias in node.names}
    assert seen == frpo._NAMES
    assert sorted(seen) == frpo.__all__ == dir(frpo)
    for name, (module, attribute) in seen.items():
        assert getattr(frpo, name) is getattr(sys.modules[module], attribute)


def test_importing_frpo_loads_nothing_else():
    script = "import sys, frpo; print(sorted({'torch', 'ray', 'vllm', 'pydantic', 'numpy'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'frpo' has no attribute 'GRPOO'; it has .*GRPO"):
        _ = frpo.GRPOO


# --- recipes ----------------------------------------------------------------------------------------------------------

def test_a_dictionary_a_file_and_an_object_are_the_same_recipe(place):
    (place / "mine.yaml").write_text("extends: smoke\nrun: {num_steps: 7}\nlearner: {lr: 1e-3}\n")
    from_file = to_recipe(place / "mine.yaml", ("rollout.group_size=4",), frpo.Recipe)
    from_values = recipe(run={"num_steps": 7}, learner={"lr": 1e-3}, rollout={"group_size": 4})
    from_objects = recipe(run=frpo.Run(num_steps=7), learner=frpo.Learner(lr=1e-3), rollout={"group_size": 4})
    from_object = to_recipe(to_recipe("mine.yaml", (), frpo.Recipe), ["rollout.group_size=4"], frpo.Recipe)
    assert from_file == from_values == from_objects == from_object
    assert to_recipe(from_file, (), frpo.Recipe) is from_file
    assert frpo.load_recipe("mine.yaml", "rollout.group_size=4") == from_file


def test_what_python_makes_is_a_recipe_file(place):
    mine = recipe(rewards=[one, {"name": "longer", "function": made(3), "weight": 0.5}],
                  objective=frpo.Objective(advantage=frpo.GRPO(), kl_coef=0.1),
                  data={"path": [{"prompt": "1+1=", "answer": "2"}]})
    (place / "mine.yaml").write_text(mine.to_yaml())
    assert frpo.load_recipe("mine.yaml") == mine
    assert recipe_digest(frpo.load_recipe("mine.yaml")) == recipe_digest(mine)
    assert [(reward.name, reward.weight) for reward in mine.rewards] == [("one", 1.0), ("longer", 0.5)]


@pytest.mark.parametrize("source, message", [
    (3, "a recipe is a Recipe, a dictionary, a file's path or the name of one in recipes/, given int"),
    ({"extends": 3}, "recipe: extends: should be one recipe's name or path, given 3"),
    ({"extends": "smoke", "run": {"steps": 3}}, "recipe: unknown key 'run.steps'"),
    ({"extends": "smoke", "rewards": [3]}, "rewards.0: should be a mapping of keys, given 3"),
    ({"extends": "smoke", "rewards": [{"name": "a", "function": 3}]}, "rewards.0.function: .*valid string, given 3"),
    ({"extends": "smoke", "data": {"path": [3]}}, "data.path: rows must be a list of mappings .* given list: "),
])
def test_what_is_no_recipe_is_named(source, message):
    with pytest.raises(ConfigError, match=message):
        to_recipe(source, (), frpo.Recipe)


def test_a_recipe_of_another_kind_is_refused():
    tuned = frpo.FinetuneRecipe(model=frpo.Model(tiny=frpo.TinyModel()), data=frpo.SupervisedData(path="x.jsonl"))
    with pytest.raises(ConfigError, match=r"a Recipe \(of `frpo train`\) is needed, given a FinetuneRecipe"):
        to_recipe(tuned, (), frpo.Recipe)


MINE = """
from dataclasses import dataclass
import numpy as np
from frpo.objectives.base import GroupAdvantages


@dataclass(frozen=True, kw_only=True)
class Mine:
    scale: float = 1.0

    def advantages(self, rewards_G):
        return GroupAdvantages(advantages_G=self.scale * (rewards_G - rewards_G.mean()), stats={})


class Plain:
    def advantages(self, rewards_G):
        return None
"""


def test_an_objective_of_a_session_stands_in_a_recipe_as_an_object(place):
    """Of a file by its name, of a cell by value; both are found again where nothing of them was imported."""
    (place / "mine.py").write_text(MINE)
    of_file = load_function("mine.py:Mine")
    cell = {"__name__": "__main__"}
    exec(compile(MINE, "<cell>", "exec"), cell)
    for cls, name in ((of_file, "mine.py:Mine"), (cell["Mine"], "runs/inputs/Mine-")):
        made = recipe(objective=frpo.Objective(advantage=cls(scale=3.0)))
        assert made.objective.advantage.name.startswith(name)
        (place / "made.yaml").write_text(made.to_yaml())
        script = ("import numpy as np, frpo; a = frpo.load_recipe('made.yaml').objective.advantage; "
                  "print(a.scale, a.advantages(np.array([0.0, 1.0])).advantages_G.tolist())")
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
        assert done.stdout == "3.0 [-1.5, 1.5]\n"
    with pytest.raises(ConfigError, match="surrogate 'GRPO' must be a dataclass with a method objective"):
        recipe(objective={"surrogate": frpo.GRPO()})
    with pytest.raises(ConfigError, match=r"a mapping such as \{name: frpo, lam: 1.0\} is needed, given <"):
        recipe(objective={"advantage": cell["Plain"]()})


# --- functions --------------------------------------------------------------------------------------------------------

def called_elsewhere(name, **arguments):
    """What the function of this name gives in a new process that never saw this file."""
    script = ("import json, sys; from frpo.loading import load_function; name, given = json.load(sys.stdin); "
              "print(json.dumps(load_function(name)(**given)))")
    done = subprocess.run([sys.executable, "-c", script], input=json.dumps([name, arguments]), capture_output=True,
                          text=True, timeout=60, check=True)
    return json.loads(done.stdout)


def test_a_function_of_a_package_and_of_a_file_go_by_their_names():
    from frpo.rewards.verifiers import exact_answer

    assert name_of(exact_answer) == "frpo.rewards.verifiers:exact_answer"
    assert name_of(one) == f"{Path(__file__).resolve()}:one"
    assert name_of(json.dumps) == "json:dumps"
    assert called_elsewhere(name_of(one), completions=["a", "b"]) == [1.0, 1.0]


def test_a_path_is_relative_where_the_file_lies_below(place, monkeypatch):
    (place / "rewards.py").write_text("def half(completions): return [0.5 for _ in completions]\n")
    monkeypatch.syspath_prepend(place)
    import rewards

    monkeypatch.delitem(sys.modules, "rewards")
    sys.modules["rewards"] = rewards
    assert name_of(rewards.half) == "rewards.py:half"
    assert called_elsewhere("rewards.py:half", completions=["a"]) == [0.5]


def test_what_lives_in_no_file_is_written_by_its_content(place):
    """A closure's name depends on its code and on what it holds, not on when it was made."""
    name = name_of(made(3))
    assert name == name_of(made(3)) != name_of(made(4))
    assert Path(name).parent == Path("runs/inputs") and Path(name).suffix == ".pkl"
    assert called_elsewhere(name, completions=["abc", "abcd"]) == [0.0, 1.0]
    assert called_elsewhere(name_of(functools.partial(pow, exp=2)), base=3) == 9


def test_the_same_cell_of_two_sessions_has_one_name(place):
    code = "def cell(completions): return [len(text) for text in completions]"
    names = []
    for file in ("<cell 1>", "<cell 2>"):
        scope = {"__name__": "__main__"}
        exec(compile("\n" * len(names) + code, file, "exec"), scope)
        names.append(name_of(scope["cell"]))
    assert names[0] == names[1]


def test_what_cannot_be_sent_is_refused(place):
    lock, held = threading.Lock(), b"x" * 2**25
    with pytest.raises(ConfigError, match=r"the function .lambda. cannot be sent .* \(TypeError: "):
        name_of(lambda: lock)
    with pytest.raises(ConfigError, match="'lambda' refers to 32 MiB of objects; allowed are 16 MiB; let"):
        name_of(lambda: held)
    with pytest.raises(ConfigError, match="give a function, or its name as text; given 3"):
        name_of(3)


def test_a_pickle_that_is_gone_or_broken_is_named(place):
    with pytest.raises(RewardError, match=r"'runs/x.pkl' cannot be read: No such file .*relative paths begin at"):
        load_function("runs/x.pkl")
    (place / "x.pkl").write_bytes(b"nothing")
    with pytest.raises(RewardError, match=r"'x.pkl': importing it raised UnpicklingError"):
        load_function("x.pkl")


def test_a_script_that_starts_a_training_when_it_is_loaded_says_where_to_put_it(place):
    (place / "script.py").write_text(
        "import frpo\ndef r(completions): return [0.0 for _ in completions]\n"
        "frpo.train({'extends': 'smoke', 'rewards': [r]})\n")
    done = subprocess.run([sys.executable, "script.py"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "script.py starts a training while frpo loads one of its functions; put the code that starts it under " \
           "`if __name__ == \"__main__\":`" in done.stderr


# --- rows -------------------------------------------------------------------------------------------------------------

ROWS = [{"prompt": "1+1=", "answer": "2"}, {"prompt": "1+2=", "answer": "3"}]


def test_rows_become_a_file_under_a_name_of_their_content(place):
    assert path_of(ROWS) == path_of([dict(row) for row in ROWS]) != path_of(ROWS[:1])
    assert [json.loads(line) for line in Path(path_of(ROWS)).read_text().splitlines()] == ROWS
    assert not [*Path("runs/inputs").glob(".*")]


@pytest.mark.parametrize("kind", [Dataset.from_list, pandas.DataFrame])
def test_a_data_set_and_a_table_are_rows(place, kind):
    path = path_of(kind(ROWS))
    assert path == path_of(kind(ROWS)) and path.endswith(".parquet")
    assert pandas.read_parquet(path).to_dict("records") == ROWS


@pytest.mark.parametrize("rows, message", [
    ([], r"\(at least one\), .*; given list"), (iter(ROWS), "given list_iterator"), ([1], "given list"),
    ([{"prompt": {1, 2}}], "row 0 cannot be written as JSON: Object of type set"),
    ([{"prompt": deep(2000)}], "row 0 cannot be written as JSON: maximum recursion depth exceeded"),
    (deep(5000), "given list that is too large to show"), ([10**5000], "given list that is too large to show"),
    ([ROWS[0], {"prompt": float("nan")}], "row 1 cannot be written as JSON"),
    ({"train": Dataset.from_list(ROWS)}, "given as dict with the splits train; give one split")])
def test_what_is_no_rows_is_refused_and_leaves_nothing(place, rows, message):
    with pytest.raises(DataError, match=message):
        path_of(rows)
    assert not [*place.glob("runs/inputs/*")] and not [*place.glob("runs/inputs/.*")]


# --- results ----------------------------------------------------------------------------------------------------------

def test_a_result_reads_what_the_run_has_left(place):
    done = recipe(run={"dir": "run", "name": "mine"})
    (place / "run").mkdir()
    (place / "run" / "metrics.jsonl").write_text(
        '{"step": 0, "eval/reward": 0.25}\n{"step": 1, "reward/mean": 0.5, "eval/reward": 0.75}\n')
    result = frpo.Result(recipe=done, folder=Path("run"))
    assert result.metrics == {"step": 1, "reward/mean": 0.5, "eval/reward": 0.75}
    assert result.table().to_dict() == {"eval/reward": {0: 0.25, 1: 0.75}, "reward/mean": {0: pytest.approx(
        float("nan"), nan_ok=True), 1: 0.5}}
    assert result.samples == [] and result.export == Path("run/export")
    assert repr(result) == "<Result mine: step 1, eval/reward 0.75, reward/mean 0.5, in run>"
    assert dump_recipe(result.recipe)["run"]["dir"] == "run"
