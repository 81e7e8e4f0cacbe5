"""The guard on real ZeRO ranks: policy and reference are what plain transformers computes, before and after updates."""
from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GraniteConfig

from frpo.data.sets.tiny_tokenizer import build_tokenizer
from frpo.run.checks import SAME_FUNCTION
from frpo.types import Comparison
from learner_state import on_all, recipe_for, train
from loop import random_model

SEQUENCES = [torch.randint(7, 104, (length,), generator=torch.Generator().manual_seed(length)).tolist()
             for length in (5, 40, 13, 24)]


def granite(folder: Any) -> str:
    """Its logits are divided by 8."""
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(GraniteConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.3, logits_scaling=8.0,
        attention_dropout=0.5)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("strategy", "ranks", "packing", "model"), [
    ("zero3", 2, True, {}), ("zero3", 2, False, {}), ("zero2", 1, True, {}),
    ("zero3", 2, True, {"lora": {"r": 4, "alpha": 8}})], ids=["zero3", "padded", "zero2", "lora"])
def test_every_rank_is_the_model(learner_of, tmp_path, strategy, ranks, packing, model):
    path = granite(tmp_path / "model")
    recipe = recipe_for(tmp_path, path, strategy, ranks, kl_coef=0.1, **model)
    recipe = recipe.model_copy(update={"learner": recipe.learner.model_copy(update={"packing": packing})})
    learner = learner_of(recipe, path)
    before = learner.compare(SEQUENCES)
    train(learner, range(1))
    after = learner.compare(SEQUENCES)
    names = ["policy"] if model else ["policy", "reference"]
    for found in (*before, *after):
        assert [each.model for each in found] == names
        assert all(right(each) and each.layers_apart == (2 if packing else 0) for each in found)


def right(found: Comparison) -> bool:
    mean, largest = SAME_FUNCTION["fp32"]
    return found.repeated == (0.0, 0.0) and found.together[0] < mean and found.together[1] < largest


@pytest.mark.timeout(300)
@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_rotary_frequencies_keep_their_digits_in_bf16(learner_of, tmp_path, strategy):
    path = random_model(tmp_path / "model", "llama", tied=True)
    learner = learner_of(recipe_for(tmp_path, path, strategy, 2, dtype="bf16"), path)
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).model.rotary_emb.inv_freq
    for found in on_all(learner, frequencies):
        assert found.dtype == torch.float32 and torch.equal(found, plain)


def frequencies(actor: Any) -> torch.Tensor:
    return actor.learner.network.model.rotary_emb.inv_freq
