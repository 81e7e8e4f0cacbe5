"""Causal language models and tokenizers from a local folder or a hub id, ready for exact training.

It does not shard: a `transformers` model built while an `HfDeepSpeedConfig` is alive comes out partitioned.
"""
from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
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
from frpo.data.source import looks_local
from frpo.errors import ModelError
from frpo.learner import attention as packed_attention
from frpo.types import Example

transformers.utils.logging.disable_progress_bar()  # ours is the only bar of a run

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ATTENTION = {"sdpa": packed_attention.NAME, "eager": "eager", "flash_attention_2": "flash_attention_2"}


def load_tokenizer(path: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model, as it was saved. Raises ModelError naming the path where there is none."""
    try:
        if _saved_as_it_is(Path(path)):
            return PreTrainedTokenizerFast.from_pretrained(path)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(f"no tokenizer at {path!r}: {_first_line(error)}") from None
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # what transformers makes where there are no files of one
        raise ModelError(f"no tokenizer at {path!r}: it would have no vocabulary; save the model's own beside it")
    return tokenizer


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
    if looks_local(path) and not Path(path).is_dir():
        raise ModelError(f"model.path {path!r} is no folder; give a folder with config.json and weights, or a hub id "
                         "such as owner/name (~ is not expanded)")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(f"model.path {path!r} cannot be read: {_first_line(error)}") from None
    window = getattr(config, "max_position_embeddings", None)
    if window and model.max_length > window:
        raise ModelError(f"model.max_length = {model.max_length} exceeds the {window} positions of {path!r}")


def check_reference(model: ModelSection, path: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ModelError unless the model at `path` can be read and speaks in the same tokens as the policy."""
    check_model_path(model, path)
    differing = vocabulary_difference(tokenizer, load_tokenizer(path, model.trust_remote_code))
    if differing:
        raise ModelError(f"reference.path {path!r} has another tokenizer than the policy ({differing}); policy and "
                         "reference must share one vocabulary, since their distributions are compared token by token")
    sizes = [AutoConfig.from_pretrained(each, trust_remote_code=model.trust_remote_code).get_text_config().vocab_size
             for each in (model.path, path) if each is not None]
    if len(set(sizes)) > 1:
        raise ModelError(f"reference.path {path!r} has {sizes[1]} rows of logits, the policy {sizes[0]}; resize one of "
                         "the models to the other's")


def vocabulary_difference(ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase) -> str | None:
    """In words, how the tokens of two tokenizers differ; None where they are the same."""
    known, others = ours.get_vocab(), theirs.get_vocab()
    if known == others:
        return None
    differing = min(known.items() ^ others.items(), key=lambda item: (item[1], item[0]))
    return f"{len(others)} tokens against {len(known)}; the first that differs: {differing[0]!r}"


def cache_facts(model: ModelSection, path: str, examples: Sequence[Example]) -> dict[str, Any]:
    """What a cache of the states of the model at `path` depends on; see `StateCache`."""
    config = AutoConfig.from_pretrained(path, trust_remote_code=model.trust_remote_code).get_text_config()
    content = hashlib.sha256()
    for example in examples:
        content.update(np.array([len(example.token_ids), *example.token_ids, *example.loss_mask], dtype=np.int64))
    return {"model": model_digest(path), "data": content.hexdigest()[:16], "dtype": model.dtype,
            "width": config.hidden_size, "softcap": getattr(config, "final_logit_softcapping", None)}


def model_digest(path: str) -> str:
    """Hash of a local model's configuration and weights; of a hub id, the id and the commit that is cached."""
    folder = Path(path)
    if not folder.is_dir():
        return f"{path}@{AutoConfig.from_pretrained(path)._commit_hash}"
    digest = hashlib.sha256()
    for file in sorted(f for pattern in ("config.json", "*.safetensors", "*.bin") for f in folder.glob(pattern)):
        with file.open("rb") as stream:
            digest.update(file.name.encode())
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]


def hidden_size(model: ModelSection, path: str) -> int:
    """Width D of the model at `path`."""
    config = AutoConfig.from_pretrained(path, trust_remote_code=model.trust_remote_code)
    return config.get_text_config().hidden_size


def embedding_count(model: ModelSection) -> int | None:
    """How many tokens the model has embeddings of; None for one made on the spot, whose tokenizer is of its size.

    Raises ModelError where its own padding token is none of them, which no such model can be built with.
    """
    if model.path is None:
        return None
    config = AutoConfig.from_pretrained(model.path, trust_remote_code=model.trust_remote_code).get_text_config()
    pad_id = getattr(config, "pad_token_id", None)
    if pad_id is not None and pad_id >= config.vocab_size:
        raise ModelError(f"config.json of {model.path!r}: pad_token_id is {pad_id}, vocab_size {config.vocab_size}; "
                         "set pad_token_id to the id of a token below, or to null")
    return config.vocab_size


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
