"""Tiny random networks of real families, as plain transformers makes them."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from frpo.config.model import ModelSection
from frpo.learner.model import load_model
from frpo.learner.network import TokenModel

VOCABULARY = 50
SHAPE = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3, pad_token_id=0, eos_token_id=1,
             bos_token_id=None)
EXPERTS = dict(num_local_experts=4, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
LATENT = dict(num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8,
              v_head_dim=8)
SPARSE = dict(n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, moe_intermediate_size=16,
              first_k_dense_replace=1, index_topk=4, index_head_dim=16, index_n_heads=16, **LATENT)
"""DeepSeek's sparse attention: each token meets the four that an indexer chooses."""


def config_of(family: str, **changes: Any) -> Any:
    """The family's configuration in a small shape; `family` is the config's class without `Config`."""
    return getattr(transformers, f"{family}Config")(**(SHAPE | changes))


def plain_network(family: str, **changes: Any) -> PreTrainedModel:
    """In float32 and evaluation mode, with the family's own eager attention."""
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(config_of(family, **changes), attn_implementation="eager")
    return network.eval()


def saved(network: PreTrainedModel, folder: Path) -> str:
    network.save_pretrained(folder)
    return str(folder)


def learners_model(folder: str | Path, dtype: str = "fp32", **options: Any) -> TokenModel:
    """The model in `folder` as the learner loads it."""
    section = ModelSection(path=str(folder), dtype=dtype, max_length=64, **options.pop("model", {}))
    return TokenModel(load_model(section, str(folder), **options))
