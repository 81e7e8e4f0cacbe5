"""Loading of causal language models, reward models and tokenizers from a folder or a hub id, ready for exact training.

This module does not shard: a `transformers` model built while an `HfDeepSpeedConfig` is alive is partitioned from the
start.
"""
from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from frpo.config.model import ModelSection
from frpo.data.assistant import end_of_turn
from frpo.data.hub import unreachable
from frpo.data.source import looks_local
from frpo.errors import ModelError, here
from frpo.learner import attention
from frpo.learner.buffers import restore_buffers
from frpo.learner.logits import logit_scale
from frpo.learner.rotary import follow_own_lengths, scale_within_sequences
from frpo.types import Example

transformers.utils.logging.disable_progress_bar()  # frpo's own bar is the only bar of a run

SCORE = "score.weight"
"""Name of the head of a reward model."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load_tokenizer(path: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer beside a model, as it was saved. Raises ModelError that names the path where there is none."""
    try:
        if _saved_as_it_is(Path(path)):
            return PreTrainedTokenizerFast.from_pretrained(path)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(f"no tokenizer at {path!r}: {_first_line(error)}") from None
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # transformers makes this where files are missing
        raise ModelError(f"no tokenizer at {path!r}: it has no vocabulary; save the model's tokenizer there")
    return tokenizer


def _saved_as_it_is(folder: Path) -> bool:
    """Return whether a local tokenizer.json belongs to no model's class.

    transformers rebuilds such a tokenizer as the class of the model beside it, with that model's splitting of text. For
    example, a character-level tokenizer beside a Qwen2 config loses every space.
    """
    config = folder / "tokenizer_config.json"
    if not config.is_file() or not (folder / "tokenizer.json").is_file():
        return False
    saved = json.loads(config.read_text(encoding="utf-8")).get("tokenizer_class")
    return saved in ("TokenizersBackend", "PreTrainedTokenizerFast")


def check_model_path(model: ModelSection, path: str) -> None:
    """Raise ModelError if `path` has no readable config, or if the config contradicts the recipe's window or itself."""
    if not Path(path).is_dir():
        if looks_local(path):
            raise ModelError(f"model.path {path!r} is no folder ({here()}); give a folder with config.json and "
                             "weights, or a hub id such as owner/name (~ is not expanded)")
        if reason := unreachable(path, "model", "config.json"):
            raise ModelError(f"model.path {path!r} is no folder ({here()}), and {reason}; correct the path, or load "
                             "the model where there is a network")
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise ModelError(f"model.path {path!r} has no config.json{_what_it_is(Path(path))}")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise ModelError(f"model.path {path!r} cannot be read: {_first_line(error)}") from None
    window = getattr(config, "max_position_embeddings", None)
    if window and 0 < window < model.max_length:
        raise ModelError(f"model.max_length = {model.max_length} exceeds the {window} positions of {path!r}; "
                         f"set it to {window} or less")
    pad_id, rows = getattr(config, "pad_token_id", None), config.get_text_config().vocab_size
    if pad_id is not None and pad_id >= rows:
        raise ModelError(f"config.json of {path!r}: pad_token_id is {pad_id}, but must be below vocab_size = {rows}; "
                         "set it to the id of a token, or to null")


def _what_it_is(folder: Path) -> str:
    """Describe the content of a folder without a model, and the path to give instead."""
    if (folder / "adapter_config.json").is_file():
        merged = f", {str(folder.parent)!r}" if (folder.parent / "config.json").is_file() else ""
        return f": it is a LoRA adapter; give the merged model{merged}"
    run = next((each for each in (folder, *folder.parents[:2]) if (each / "export" / "config.json").is_file()), None)
    if run is not None:
        return f": it belongs to a run; give the run's model, {str(run / 'export')!r}"
    return "; give a folder with a Hugging Face model, such as a run's export"


def lacking_weights(model: ModelSection) -> str | None:
    """Return a message if the folder of a local model has no weights. None where it has some, or is no folder."""
    folder = Path(model.path or "")
    if model.path is None or not folder.is_dir() or any(
            [*folder.glob(pattern)] for pattern in ("*.safetensors", "*.bin", "*.pt", SAFE_WEIGHTS_INDEX_NAME)):
        return None
    return (f"model.path {model.path!r} has no weights (model.safetensors, or several with their index); save the "
            "whole model there")


def check_weights(path: str) -> None:
    """Raise ModelError where a safetensors file of a local model is missing or cut short."""
    folder = Path(path)
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file():
        files = sorted({folder / name for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    else:
        files = sorted(folder.glob("*.safetensors"))
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise ModelError(f"model.path: {file} cannot be read ({_first_line(error)}); copy or download it "
                             "again") from None


def unstopped_turn(model: ModelSection, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return a message if sampling goes on after the token with which the chat template ends a turn; None otherwise.

    Sampling stops at the tokenizer's end of sequence and at `eos_token_id` of generation_config.json, else of
    config.json. A tiny model's template and tokenizer fit together.
    """
    if model.path is None:
        return None
    try:
        generation = GenerationConfig.from_pretrained(model.path)
    except OSError:
        generation = GenerationConfig.from_model_config(
            AutoConfig.from_pretrained(model.path, trust_remote_code=model.trust_remote_code))
    stops, end = generation.eos_token_id, end_of_turn(tokenizer)
    stops = {tokenizer.eos_token_id, *(stops if isinstance(stops, list) else [stops])} - {None}
    if end is None or end in stops:
        return None
    token, known = (tokenizer.convert_ids_to_tokens(ids) for ids in (end, sorted(stops)))
    return (f"the chat template of {model.path!r} ends a turn with {token!r} (id {end}), but sampling stops at {known} "
            "only; add the id to eos_token_id in generation_config.json beside the model")


def check_reference(model: ModelSection, path: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ModelError unless the model at `path` can be read and has the same tokens as the policy."""
    check_model_path(model, path)
    differing = vocabulary_difference(tokenizer, load_tokenizer(path, model.trust_remote_code))
    if differing:
        raise ModelError(f"reference.path {path!r} has another tokenizer than the policy ({differing}), but their "
                         "distributions are compared token by token; give a reference with the policy's vocabulary")
    sizes = [AutoConfig.from_pretrained(each, trust_remote_code=model.trust_remote_code).get_text_config().vocab_size
             for each in (model.path, path) if each is not None]
    if len(set(sizes)) > 1:
        raise ModelError(f"reference.path {path!r} has {sizes[1]} rows of logits, the policy {sizes[0]}; resize one of "
                         "the models, so that both have the same number")


def vocabulary_difference(ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase) -> str | None:
    """Describe how the tokens of two tokenizers differ; None where they are the same."""
    known, others = ours.get_vocab(), theirs.get_vocab()
    if known == others:
        return None
    differing = min(known.items() ^ others.items(), key=lambda item: (item[1], item[0]))
    return f"{len(others)} tokens against {len(known)}; the first that differs: {differing[0]!r}"


def cache_facts(model: ModelSection, path: str, examples: Sequence[Example]) -> dict[str, Any]:
    """Return all facts on which a cache of the states of the model at `path` depends; see `StateCache`."""
    network = hollow_network(model, path)
    content = hashlib.sha256()
    for example in examples:
        numbers = np.array([len(example.token_ids), *example.token_ids, *example.loss_mask], dtype=np.int64)
        content.update(numbers.tobytes())
    return {"model": model_digest(path), "data": content.hexdigest()[:16], "dtype": model.dtype,
            "width": network.config.get_text_config().hidden_size, "scale": asdict(logit_scale(network))}


def model_digest(path: str) -> str:
    """Return a hash of a local model's configuration and weights. For a hub id, return the id and the cached commit."""
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
    """Return the width D of the model at `path`."""
    config = AutoConfig.from_pretrained(path, trust_remote_code=model.trust_remote_code)
    return config.get_text_config().hidden_size


def embedding_count(model: ModelSection) -> int | None:
    """Return the number of tokens for which the model has embeddings.

    None for a tiny model made by the run, whose tokenizer has the model's size.
    """
    if model.path is None:
        return None
    config = AutoConfig.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)
    return config.get_text_config().vocab_size


def load_model(model: ModelSection, path: str, *, packed: bool = False, gradient_checkpointing: bool = False,
               score_seed: int | None = None) -> PreTrainedModel:
    """Load the model at `path` in the recipe's precision, with attention that keeps the sequences of a pack apart.

    packed: sequences of at most `model.max_length` tokens will share a row.
    gradient_checkpointing: recompute every layer in the backward pass.
    score_seed: None for a causal language model. A number for a reward model, with one score in place of logits; its
    head is drawn from this seed if `path` has none.
    Raises ModelError where the weights cannot be read, where some are missing, or where the family has no layers to
    recompute or no class with a score.
    """
    partly = "; or try learner.deepspeed: zero2, which loads weights whole" if is_deepspeed_zero3_enabled() else ""
    kind, options = (AutoModelForCausalLM, {}) if score_seed is None else (
        AutoModelForSequenceClassification, {"num_labels": 1})
    try:
        with _loaded_weights_kept(), _quiet() if score_seed is not None else nullcontext():
            loaded = kind.from_pretrained(
                path, dtype=DTYPES[model.dtype], attn_implementation=_attention_of(model, path, kind),
                trust_remote_code=model.trust_remote_code, output_loading_info=True, **options)
    except (OSError, ValueError, ImportError, RuntimeError) as error:  # RuntimeError: shapes differ from the config
        raise ModelError(f"model.path {path!r} cannot be loaded: {_first_line(error)}{partly}") from None
    except (AttributeError, IndexError, KeyError, TypeError) as error:  # a family's code fails on weights in parts
        raise ModelError(f"model.path {path!r} cannot be loaded: {type(error).__name__}: {_first_line(error)}"
                         f"{partly}") from error
    network, found = cast("tuple[PreTrainedModel, dict[str, Any]]", loaded)
    missing = sorted(found["missing_keys"])
    if score_seed is not None:
        _check_score(network, path)
        if SCORE in missing:
            missing.remove(SCORE)
            _draw_score(network, score_seed)
    if missing:
        raise ModelError(f"model.path {path!r} cannot be loaded: {len(missing)} of its weights are not found and would "
                         f"be random: {', '.join(missing[:3])}{', ...' if missing[3:] else ''}; save the whole model"
                         f"{partly}")
    restore_buffers(network)
    follow_own_lengths(network)
    if packed:
        scale_within_sequences(network, model.max_length)
    network.config.use_cache = False
    if gradient_checkpointing:
        checkpoint_layers(network)
    return network


def _check_score(network: PreTrainedModel, path: str) -> None:
    head = getattr(network, "score", None)
    if type(head) is not nn.Linear or head.bias is not None or head.out_features != 1:
        raise ModelError(f"model.path {path!r}: {type(network).__name__} does not score by one weight named 'score'; "
                         "give a causal language model, such as Llama or Qwen, or a reward model made from one")


def _draw_score(network: PreTrainedModel, seed: int) -> None:
    """Draw the head of a new reward model from N(0, 1 / (D + 1)^2), the same on every rank (arXiv:2009.01325)."""
    from deepspeed.runtime.zero import GatheredParameters

    weight = cast(nn.Linear, network.score).weight
    with GatheredParameters([weight], modifier_rank=0):
        if weight.numel():  # under ZeRO-3 other ranks may hold nothing here
            drawn = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
            weight.data.copy_(drawn / (weight.shape[1] + 1))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from reporting a missing head of a reward model, which is drawn anew, within the context."""
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(level)


@contextmanager
def _loaded_weights_kept() -> Iterator[None]:
    """Under ZeRO-3, stop transformers from drawing weights of modules that a checkpoint has filled, within the context.

    transformers would not keep the drawn weights, but some families fail over weights in parts. The buffers of these
    modules have been computed already; without ZeRO-3 they have not.
    """
    family: Any = PreTrainedModel  # Any, since mypy lets no method of the class be replaced
    own = family._initialize_weights

    def missing_only(network: PreTrainedModel, module: nn.Module, *args: Any) -> None:
        loaded = [getattr(parameter, "_is_hf_initialized", False) for parameter in module.parameters(recurse=False)]
        if not (is_deepspeed_zero3_enabled() and loaded and all(loaded)):
            own(network, module, *args)

    family._initialize_weights = missing_only
    try:
        yield
    finally:
        family._initialize_weights = own


def hollow_network(model: ModelSection, path: str, *, scores: bool = False) -> PreTrainedModel:
    """Build the model at `path` without its weights, for inspection. scores: as a reward model.

    Raises ModelError where transformers has no code for the model.
    """
    config = AutoConfig.from_pretrained(path, trust_remote_code=model.trust_remote_code)
    try:
        with torch.device("meta"):
            if scores:
                config.num_labels = 1
                return AutoModelForSequenceClassification.from_config(config, trust_remote_code=model.trust_remote_code)
            return AutoModelForCausalLM.from_config(config, trust_remote_code=model.trust_remote_code)
    except (ValueError, ImportError) as error:
        raise ModelError(f"model.path {path!r}: transformers cannot make a causal language model of it: "
                         f"{_first_line(error)}") from None


def check_family(model: ModelSection, path: str) -> None:
    """Raise ModelError where frpo cannot compute the logits of the model at `path`. Reads only its config and code."""
    logit_scale(hollow_network(model, path))


def _attention_of(model: ModelSection, path: str, kind: Any = AutoModelForCausalLM) -> str:
    """Choose the attention to request from transformers: one of frpo's functions, or the family's own classes."""
    family = _family(model, path, kind)
    if model.attn_implementation == "flash_attention_2":
        return attention.FLASH
    by_sdpa = model.attn_implementation == "sdpa" and family._supports_sdpa
    if not family._can_set_attn_implementation():
        return "sdpa" if by_sdpa else "eager"
    if _asks_for_sdpa(family):
        return "eager"
    return attention.SDPA if by_sdpa else attention.EAGER


def _asks_for_sdpa(family: type[PreTrainedModel]) -> bool:
    """Return whether the family's code does some work only under attention named "sdpa" (or "eager").

    Sparse attention is an example. Under a name of frpo the family would leave this work out.
    """
    file = sys.modules[family.__module__].__file__
    assert file is not None  # a family is defined in a file
    code = Path(file).read_text(encoding="utf-8")
    return re.search(r"_attn_implementation\b[^\n:]*[\"']sdpa[\"']", code) is not None


def _family(model: ModelSection, path: str, kind: Any = AutoModelForCausalLM) -> type[PreTrainedModel]:
    """Return the class of the model at `path`. kind: a class of transformers that finds a model's class by its config.
    """
    config = AutoConfig.from_pretrained(path, trust_remote_code=model.trust_remote_code)
    if type(config) in kind._model_mapping:
        return cast("type[PreTrainedModel]", kind._model_mapping[type(config)])
    remote = getattr(config, "auto_map", None) or {}
    if kind.__name__ not in remote:
        what = "causal language model" if kind is AutoModelForCausalLM else "reward model (sequence classification)"
        raise ModelError(f"model.path {path!r} is of type {config.model_type!r}, but transformers has no {what} of "
                         "this type; give another model")
    return get_class_from_dynamic_module(remote[kind.__name__], path)


def check_scores(model: ModelSection, path: str) -> None:
    """Raise ModelError where transformers has no class with a score for the model at `path`."""
    _family(model, path, AutoModelForSequenceClassification)


def checkpoint_layers(network: PreTrainedModel) -> None:
    """Recompute each layer in the backward pass. transformers' own way would need training mode, and so its noise."""
    layers = [module for module in network.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ModelError(f"{type(network).__name__} has no layers that transformers can recompute; set "
                         "learner.gradient_checkpointing to false")
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
