"""Exports of models whose generation config transformers refuses to write, and what is asked before training."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from frpo.config.model import ModelSection
from frpo.data.sets.tiny_tokenizer import build_tokenizer
from frpo.errors import ConfigError, ModelError
from frpo.learner.export import check_export, write_model
from frpo.learner.model import load_model, load_tokenizer

REFUSED = '{"temperature": 0.9,  "top_p": 0.6, "do_sample": false, "eos_token_id": 1, "pad_token_id": 0}\n'
GENERATION = "generation_config.json"


@pytest.fixture
def model(tmp_path):
    """A folder with a random model and its tokenizer."""
    config = Qwen2Config(vocab_size=104, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                         num_attention_heads=1, num_key_value_heads=1, max_position_embeddings=64, eos_token_id=1)
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "model")
    build_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def section(model):
    return ModelSection(path=str(model), dtype="fp32", max_length=64)


def exported(model, folder, pieces=1):
    """The folder of an export of the model with every weight doubled, in so many files."""
    network = load_model(section(model), str(model))
    before = network.generation_config
    state = {n: 2 * t for n, t in network.state_dict().items()}
    doubled = [{n: state[n] for n in names} for names in np.array_split(list(state), pieces)]
    write_model(network, load_tokenizer(str(model)), iter(doubled), str(model), folder)
    assert network.generation_config is before and network.config.use_cache is False
    return folder


@pytest.mark.parametrize("written", [REFUSED, '{"num_beams": 0, "of_a_later_version": [1]}', None])
def test_the_generation_config_is_written_as_it_was_read(model, tmp_path, written):
    (model / GENERATION).unlink()
    if written:
        (model / GENERATION).write_text(written)
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / GENERATION).write_text("of an earlier export")
    folder = exported(model, tmp_path / "export")
    found = folder / GENERATION
    assert (found.read_text() if found.exists() else None) == written
    network, start = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (folder, model))
    assert torch.equal(network.model.norm.weight, 2 * start.model.norm.weight)
    assert network.config.use_cache is True and load_tokenizer(str(folder)).get_vocab() == build_tokenizer().get_vocab()
    if written == REFUSED:
        assert (network.generation_config.temperature, network.generation_config.do_sample) == (0.9, False)


def test_nothing_of_an_earlier_export_in_pieces_is_left(model, tmp_path):
    load_model(section(model), str(model)).save_pretrained(tmp_path / "export", max_shard_size="10KB")
    (tmp_path / "export" / "README.md").write_text("my own")
    folder = exported(model, tmp_path / "export")
    assert [file.name for file in folder.glob("model*")] == ["model.safetensors"]
    assert (folder / "README.md").read_text() == "my own"


def test_an_export_of_several_files_is_the_same_model(model, tmp_path):
    one, several = exported(model, tmp_path / "one"), exported(model, tmp_path / "several", pieces=3)
    exported(model, tmp_path / "several", pieces=3)  # over an earlier one
    names = sorted(file.name for file in several.glob("model*"))
    assert names == [*(f"model-0000{k}-of-00003.safetensors" for k in (1, 2, 3)), "model.safetensors.index.json"]
    first, second = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (one, several))
    for (name, tensor), other in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name
    index = json.loads((several / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == load_file(one / "model.safetensors").keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in load_file(one / "model.safetensors").values())


def test_generation_settings_of_an_old_config_end_no_export(model, tmp_path):
    """transformers makes a generation config of them, which it then refuses to write."""
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"temperature": 0.7, "do_sample": False}))
    (model / GENERATION).unlink()
    check_export(section(model), load_tokenizer(str(model)), tmp_path)
    assert AutoModelForCausalLM.from_pretrained(exported(model, tmp_path / "export"))


@pytest.mark.parametrize("written, message", [
    ("[1]", "TypeError"), ("{", "OSError"), ('{"max_new_tokens": -1}', "ValueError: `max_new_tokens` must be greater")])
def test_a_generation_config_that_cannot_be_read_is_refused_before_training(model, tmp_path, written, message):
    (model / GENERATION).write_text(written)
    with pytest.raises(ModelError, match=f"model'.*: reading its {GENERATION} fails: {message}"):
        check_export(section(model), build_tokenizer(), tmp_path)


def test_a_tokenizer_that_cannot_be_saved_is_refused_before_training(model, tmp_path):
    """Half a character in its template, which is read from JSON but cannot be written as a file of its own."""
    path = model / "tokenizer_config.json"
    (model / "chat_template.jinja").unlink()
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": "{{ 'a\ud800' }}"}))
    with pytest.raises(ModelError, match="saving its tokenizer fails: UnicodeEncodeError: .*; correct that file"):
        check_export(section(model), load_tokenizer(str(model)), tmp_path)


def test_the_check_writes_nothing_and_needs_a_folder_that_can_be_written(model, tmp_path, monkeypatch):
    tokenizer, before = load_tokenizer(str(model)), sorted(tmp_path.rglob("*"))
    check_export(section(model), tokenizer, tmp_path / "runs" / "a")
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "file").write_text("")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "export").write_text("")
    for run_dir, cause in ((tmp_path / "file" / "run", tmp_path / "file"), (tmp_path / "run", tmp_path / "run/export")):
        with pytest.raises(ConfigError, match=f"run.dir '{run_dir}' cannot be written: {cause} is not a folder"):
            check_export(section(model), tokenizer, run_dir)
    with pytest.raises(ConfigError, match="run.dir '/proc/frpo' cannot be written: /proc: "):
        check_export(section(model), tokenizer, Path("/proc/frpo"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(ConfigError, match=f"run.dir 'new' cannot be written: {tmp_path} is not a folder that you "
                                          "may write to"):
        check_export(section(model), tokenizer, Path("new"))
