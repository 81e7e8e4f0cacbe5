"""A tokenizer comes back as it was saved, whatever model lies beside it."""
import pytest
from transformers import GPT2Config, LlamaConfig, Qwen2Config

from frpo.data.sets.tiny_tokenizer import build_tokenizer
from frpo.errors import ModelError
from frpo.learner.model import load_tokenizer

TEXT = "a b\n(1 + 2)= x"


def test_spaces_and_newlines_survive_beside_a_model_with_a_tokenizer_class_of_its_own(tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    Qwen2Config().save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.encode(TEXT) == tokenizer.encode(TEXT) and loaded.decode(loaded.encode(TEXT)) == TEXT
    assert loaded.chat_template == tokenizer.chat_template and loaded.pad_token == tokenizer.pad_token


@pytest.mark.parametrize("config", [Qwen2Config, LlamaConfig, GPT2Config])
def test_a_model_without_a_tokenizer_is_told_so(tmp_path, config):
    """transformers makes an empty one, with which every text has no tokens."""
    config().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=f"no tokenizer at '{tmp_path}'"):
        load_tokenizer(str(tmp_path))
