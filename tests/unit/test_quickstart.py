"""What is refused before a quick start makes or starts anything."""
import pytest

from frpo.errors import ConfigError
from frpo.quickstart import run_quickstart


@pytest.mark.parametrize("path", ["owner/name", "null"])
def test_another_model_is_refused_since_the_matrix_would_fork_its_own(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="trains the model that it makes, ./models/smollm2-135m-instruct, given"):
        run_quickstart([f"model.path={path}", *(["model.tiny={}"] if path == "null" else [])])
    assert list(tmp_path.iterdir()) == []
