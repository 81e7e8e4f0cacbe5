"""A small causal language model made by the run: configuration, tokenizer and a short supervised warm start.

The model exists so that the whole loop runs where no weights are available. The warm start teaches arithmetic in the
recipe's own prompt format, and never uses a held-out prompt. It stops early on purpose, at its full learning rate, so
that reinforcement learning can still improve the model.
"""
from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

from frpo.config.loader import AnyRecipe
from frpo.config.model import TinyModelSection, WarmStartSection
from frpo.config.sections import Recipe
from frpo.data.chat import render, render_text
from frpo.data.heldout import Split
from frpo.data.prompts import PromptSet, load_prompts
from frpo.data.sets.arithmetic import problems
from frpo.data.sets.tiny_tokenizer import build_tokenizer
from frpo.errors import ModelError
from frpo.telemetry.progress import counted, phase

RECORD = "tiny.json"
Example = tuple[tuple[int, ...], tuple[int, ...]]
"""(prompt token ids, completion token ids with the end of sequence)."""


def tiny_model(recipe: AnyRecipe, folder: Path) -> str:
    """Make the recipe's tiny model in `folder`, or reuse the one made there before with the same settings."""
    tiny = recipe.model.tiny
    assert tiny is not None  # called only where there is no model.path
    settings = json.loads(json.dumps({"tiny": tiny.model_dump(), "data": recipe.data.model_dump(),
                                      "max_length": recipe.model.max_length, "seed": recipe.run.seed}))
    record = folder / RECORD
    if record.is_file() and json.loads(record.read_text(encoding="utf-8")) == settings:
        return str(folder)
    tokenizer = build_tokenizer()
    network = new_network(tiny, tokenizer, recipe.model.max_length, recipe.run.seed)
    section = tiny.warm_start
    examples = _examples(recipe, section, tokenizer)
    with phase(f"making a tiny model: {sum(p.numel() for p in network.parameters()) / 1e6:.1f} M parameters, "
               f"{section.steps} steps of warm start"):
        warm_start(network, examples, section, tokenizer.pad_token_id, recipe.run.seed)
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    record.write_text(json.dumps(settings, indent=1), encoding="utf-8")
    return str(folder)


def new_network(tiny: TinyModelSection, tokenizer: PreTrainedTokenizerBase, max_length: int,
                seed: int) -> PreTrainedModel:
    """Make a Qwen2 of the section's shape with random weights."""
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=tiny.hidden_size, intermediate_size=4 * tiny.hidden_size,
        num_hidden_layers=tiny.num_layers, num_attention_heads=tiny.num_heads,
        num_key_value_heads=1, max_position_embeddings=max_length,
        tie_word_embeddings=tiny.tied, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None))


def warm_start(network: PreTrainedModel, examples: Sequence[Example], section: WarmStartSection, pad_id: int,
               seed: int) -> None:
    """Train with AdamW on the completions of `examples`, in place and in one process.

    The rate is constant after a short warm-up.
    """
    optimizer = torch.optim.AdamW(network.parameters(), lr=section.lr, betas=(0.9, 0.98), weight_decay=0.0)
    random = np.random.Generator(np.random.PCG64(seed))
    network.train()
    for step in range(section.steps):
        counted("warm start", step, section.steps)
        drawn = [examples[i] for i in random.integers(len(examples), size=section.batch_size)]
        for group in optimizer.param_groups:
            group["lr"] = section.lr * min(1.0, (step + 1) / 20)
        token_ids, labels = _padded(drawn, pad_id)
        network(input_ids=token_ids, attention_mask=(token_ids != pad_id).long(), labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def _examples(recipe: AnyRecipe, section: WarmStartSection, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """Return prompts and completions to start from, none of which the recipe holds out.

    They are generated problems, or the recipe's own prompts. A fine-tuning recipe starts from generated problems,
    whatever its own data set.
    """
    prompts: PromptSet = Split(train=(), heldout=(), digest="", skipped={})
    if isinstance(recipe, Recipe):
        prompts = load_prompts(recipe.data, tokenizer, recipe.run.seed)
    if section.source == "prompts":
        pairs = [(prompt.token_ids, prompt.columns["answer"]) for prompt in prompts.train if "answer" in prompt.columns]
    else:
        heldout = {prompt.token_ids for prompt in prompts.heldout}
        generated = problems(None, recipe.run.seed)
        rendered = [(_render(question, recipe, tokenizer), answer) for question, answer in generated]
        pairs = [(prompt, answer) for prompt, answer in rendered if prompt not in heldout]
    if not pairs:
        raise ModelError("model.tiny.warm_start.source: prompts needs training prompts with a column 'answer', "
                         "but there are none; set it to generated")
    return [(prompt, (*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id))
            for prompt, answer in pairs]


def _render(question: str, recipe: AnyRecipe, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    if recipe.data.format == "chat":
        return render([{"role": "user", "content": question}], tokenizer)
    return render_text(question, tokenizer)


def _padded(examples: Sequence[Example], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(len(prompt) + len(completion) for prompt, completion in examples)
    token_ids = torch.full((len(examples), longest), pad_id)
    labels = torch.full((len(examples), longest), -100)
    for row, (prompt, completion) in enumerate(examples):
        ids = torch.tensor(prompt + completion)
        token_ids[row, :len(ids)] = ids
        labels[row, len(prompt):len(ids)] = ids[len(prompt):]
    return token_ids, labels
