"""Finding reward functions by name: what is accepted, and what the messages of wrong names say."""
import json
import sys

import pytest

from frpo import loading
from frpo.errors import RewardError
from frpo.loading import Parameters, load_function, parameters_of

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


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Two folders, each with a reward file, a module and a package of the same names; nothing stays on sys.path."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(loading, "_folders", [])
    for folder, value in (("a", 1), ("b", 2)):
        (tmp_path / folder / "frpo_tools").mkdir(parents=True)
        (tmp_path / folder / "frpo_helpers.py").write_text(f"from frpo_tools.deep import value\none = {value}")
        (tmp_path / folder / "frpo_tools" / "__init__.py").touch()
        (tmp_path / folder / "frpo_tools" / "deep.py").write_text(f"value = {value * 10}")
        (tmp_path / folder / "r.py").write_text(
            "from frpo_helpers import one, value\nimport frpo_tools.deep\n"
            "def f(completions): return [one, value, frpo_tools.deep.value]")
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith(("frpo_helpers", "frpo_tools"))]:
        del sys.modules[name]


def test_a_file_imports_what_lies_beside_it_and_not_what_lies_beside_another(folders):
    first, second, again = (load_function(f"{folders / folder}/r.py:f") for folder in "aba")
    assert first([]) == again([]) == [1, 10, 10] and second([]) == [2, 20, 20]
    assert sys.path[-2:] == [str(folders / "a"), str(folders / "b")]  # the latest first, none twice
    assert not {str(folders / "a"), str(folders / "b")} & {*loading.path_without_siblings()}


def test_what_can_be_imported_anyway_comes_before_what_lies_beside_a_file(folders):
    """Else a file called json.py would replace a library for all that run in the process."""
    (folders / "installed").mkdir()
    (folders / "installed" / "frpo_helpers.py").write_text("one = value = 0")
    sys.path.append(str(folders / "installed"))
    assert load_function(f"{folders / 'a'}/r.py:f")([]) == [0, 0, 10]
    assert load_function(f"{folders / 'b'}/r.py:f")([]) == [0, 0, 20]


def test_a_module_that_is_not_the_one_beside_the_file_is_told(folders, caplog):
    load_function(f"{folders / 'a'}/r.py:f")
    assert not caplog.records
    (folders / "run").mkdir()
    (folders / "run" / "frpo_helpers.py").write_text("one = value = 0")
    sys.path.insert(0, str(folders / "run"))
    load_function(f"{folders / 'b'}/r.py:f")
    (record,) = caplog.records
    assert f"its module 'frpo_helpers' is {folders / 'run' / 'frpo_helpers.py'}, not the file" in record.getMessage()


def test_a_folder_that_is_on_the_path_keeps_its_place(folders):
    sys.path.insert(0, str(folders / "b"))
    before = [*sys.path]
    assert load_function(f"{folders / 'b'}/r.py:f")([]) == [2, 20, 20]
    assert sys.path == before == loading.path_without_siblings()


def test_missing_function_names_the_nearest_and_the_others(source):
    with pytest.raises(RewardError) as caught:
        load_function(f"{source}:lenght_reward")
    message = str(caught.value)
    assert "no 'lenght_reward' (did you mean 'length_reward'?)" in message
    assert message.endswith("it defines Rubric, length_reward")  # neither _hidden nor the imported OrderedDict


@pytest.mark.parametrize("given", ["json.dumps", ":f", "json:", "json:a b", "rewards.py", ".a:b", "a..b:c", "json.:f"])
def test_wrong_form(given):
    with pytest.raises(RewardError) as caught:
        load_function(given)
    assert f"{given!r} is not of the form 'package.module:function' or 'path/file.py:function'" in str(caught.value)


@pytest.mark.parametrize("given, why", [
    ("a\0.py:f", "no file can be found there: embedded null byte"), ("~no-such-user/a.py:f",
    "no file can be found there: Could"),
    (f"{'x' * 300}.py:f", "no file can be found there: File name too long"), ("\ud800.py:f", "surrogates not allowed"),
    ("a\0.pkl", "cannot be read: embedded null byte"), (f"{'x' * 300}.pkl", "cannot be read: File name too long")])
def test_a_path_that_no_file_can_have_is_told_of_without_a_traceback(given, why):
    with pytest.raises(RewardError) as caught:
        load_function(given)
    assert why in str(caught.value) and "Traceback" not in str(caught.value) and len(str(caught.value)) < 500


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
    ("key = {}['token']", "KeyError: 'token'"),
    ("from .helpers import one", r"ImportError: attempted relative import with no known parent package (the file is")])
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


def test_parameters_without_a_name():
    def before(completions, /, **kwargs): ...
    def default(completions, extra=None, /): ...
    def star(*args): ...
    def wide(*args, **kwargs): ...
    def after(completions, *args): ...
    found = [parameters_of(function).nameless for function in (before, default, star, wide, after)]
    assert found == [("completions",), ("completions",), ("*args",), (), ()]
