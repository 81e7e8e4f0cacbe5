"""Causal language models and tokenizers from a local folder or a hub id, ready for exact training.

It does not shard: a `transformers` model built while an `HfDeepSpeedConfig` is alive comes out partitioned.
"""
from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from frpo.config.model import ModelSection
from frpo.errors import ModelError
from frpo.learner import attention as packed_attention

transformers.utils.logging.disable_progress_bar()  # ours is the only bar of a run

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ATTENTION = {"sdpa": packed_attention.NAME, "eager": "eager", "flash_attention_2": "flash_attention_2"}


def load_tokenizer(path: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model, as it was saved. Raises ModelError naming the path where there is none."""
    try:
        if _saved_as_it_is(Path(path)):
            return PreTrainedTokenizerFast.from_pretrained(path)
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(f"no tokenizer at {path!r}: {_first_line(error)}") from None


def _saved_as_it_is(folder: Path) -> bool:
    """Whether a local tokenizer.json is of no model's class.

    transformers rebuilds such a tokenizer as the class of the model beside it, with that model's splitting of text: a
    character-level one beside a Qwen2 config loses every space.
    """
    config = folder / "tokenizer_config.json"
    if not config.is_file() or not (folder / "tokenizer.json").is_file():
        return False
    saved = json.loads(config.read_text(encoding="utf-8")).get("tokenizer_class")
    return saved in ("TokenizersBackend", "PreTrainedTokenizerFast")


def check_model_path(model: ModelSection, path: str) -> None:
    """Raise ModelError if no causal language model config can be read at `path` or the window is too long for it."""
    local = path.startswith((".", "/", "~")) or path.count("/") > 1 or ("/" in path and Path(path).parent.is_dir())
    if local and not Path(path).is_dir():
        raise ModelError(f"model.path {path!r} is no folder; give a folder with config.json and weights, or a hub id "
                         "such as owner/name (~ is not expanded)")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(f"model.path {path!r} cannot be read: {_first_line(error)}") from None
    window = getattr(config, "max_position_embeddings", None)
    if window and model.max_length > window:
        raise ModelError(f"model.max_length = {model.max_length} exceeds the {window} positions of {path!r}")


def hidden_size(model: ModelSection, path: str) -> int:
    """Width D of the model at `path`."""
    config = AutoConfig.from_pretrained(path, trust_remote_code=model.trust_remote_code)
    return config.get_text_config().hidden_size


def load_model(model: ModelSection, path: str, *, gradient_checkpointing: bool = False) -> PreTrainedModel:
    """The model at `path` in the recipe's precision, dropout off: rollout and learner must be the same function.

    Raises ModelError where the weights cannot be read.
    """
    try:
        network = AutoModelForCausalLM.from_pretrained(
            path, dtype=DTYPES[model.dtype], attn_implementation=ATTENTION[model.attn_implementation],
            trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(f"model.path {path!r} cannot be loaded: {_first_line(error)}") from None
    switch_dropout_off(network)
    network.config.use_cache = False
    if gradient_checkpointing:
        network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return network


def switch_dropout_off(network: torch.nn.Module) -> None:
    """Zero every dropout, in modules and where attention reads it as a number."""
    for module in network.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
