"""Finding reward functions by name: what is accepted, and what the messages of wrong names say."""
import json

import pytest

from frpo.errors import RewardError
from frpo.rewards.loading import Parameters, load_function, parameters_of

SOURCE = '''
import dataclasses
from collections import OrderedDict

@dataclasses.dataclass
class Rubric:
    points: float = 1.0

limit = 3

def length_reward(completions, **kwargs):
    return [Rubric().points * len(text) for text in completions]

def _hidden(completions):
    return []
'''


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "my_rewards.py"
    path.write_text(SOURCE)
    return path


def test_dotted_path_gives_the_function_itself():
    assert load_function("json:dumps") is json.dumps


def test_file_gives_a_working_function(source):
    assert load_function(f"{source}:length_reward")(completions=["ab", ""]) == [2.0, 0.0]


def test_relative_file(source, monkeypatch):
    monkeypatch.chdir(source.parent)
    assert load_function("my_rewards.py:length_reward")(completions=["abc"]) == [3.0]


def test_files_of_the_same_name_stay_apart(tmp_path):
    for folder, value in (("a", 1), ("b", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "r.py").write_text(f"def f(completions): return [{value}]")
    first, second = (load_function(f"{tmp_path / folder}/r.py:f") for folder in "ab")
    assert (first(completions=[""]), second(completions=[""])) == ([1], [2])


def test_missing_function_names_the_nearest_and_the_others(source):
    with pytest.raises(RewardError) as caught:
        load_function(f"{source}:lenght_reward")
    message = str(caught.value)
    assert "no 'lenght_reward' (did you mean 'length_reward'?)" in message
    assert message.endswith("functions there: Rubric, length_reward")  # neither _hidden nor the imported OrderedDict


@pytest.mark.parametrize("given", ["json.dumps", ":f", "json:", "json:a b", "rewards.py"])
def test_wrong_form(given):
    with pytest.raises(RewardError) as caught:
        load_function(given)
    assert f"{given!r} is not of the form 'package.module:function' or 'path/file.py:function'" in str(caught.value)


def test_missing_file_names_its_path_and_the_nearest(source):
    with pytest.raises(RewardError) as caught:
        load_function(f"{source.parent}/my_reward.py:f")
    assert f"there is no file {source.parent}/my_reward.py (did you mean 'my_rewards.py'?)" in str(caught.value)


@pytest.mark.parametrize("given, missing", [("frpo_nowhere.a:f", "frpo_nowhere"), ("json.nowhere:f", "json.nowhere")])
def test_missing_module(given, missing):
    with pytest.raises(RewardError, match=f"no module '{missing}' on sys.path"):
        load_function(given)


def test_not_callable(source):
    with pytest.raises(RewardError, match="my_rewards.py:limit' is of type int, which cannot be called"):
        load_function(f"{source}:limit")


@pytest.mark.parametrize("body, said", [
    ("def f(:", "SyntaxError"), ("import frpo_nowhere", "ModuleNotFoundError: No module named 'frpo_nowhere'"),
    ("key = {}['token']", "KeyError: 'token'")])
def test_a_module_that_raises_shows_its_own_error(tmp_path, body, said):
    path = tmp_path / "broken.py"
    path.write_text(f"\n{body}\n")
    with pytest.raises(RewardError) as caught:
        load_function(f"{path}:f")
    assert f"importing it raised {said}" in str(caught.value)
    assert "line 2" in str(caught.value)  # the traceback


def test_parameters():
    def closed(completions, answer, *, tolerance=0.0): ...
    def wide(completions, **kwargs): ...
    assert parameters_of(closed) == Parameters(
        named=("completions", "answer", "tolerance"), required=("completions", "answer"), open=False)
    assert parameters_of(wide) == Parameters(named=("completions",), required=("completions",), open=True)
