"""One update of CSFT+PA and of a reward model beside one of SFT; the reference is run, or read from a cache.

    python benchmarks/finetune_step.py [--rounds 7] [--hidden 512] [--layers 8] [--vocabulary 8192] [--threads 1]

All variants train the same model, made on the spot (a Qwen2 with random weights and a tied head), on the same batches
in one process, and take turns within a round; the reference of CSFT+PA is another such model. The reward model learns
from the same sequences, two by two as pairs. A step is everything from a packed batch to the optimizer's update;
filling the cache is not part of it and is told apart. ZeRO-1 on one rank, so that nothing but the losses differs.
Ratios are medians of the paired ratios. Nothing here passes or fails.
"""
from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import Qwen2Config, Qwen2ForCausalLM

from frpo.cluster.team import TeamRanks
from frpo.config.finetune import FinetuneRecipe
from frpo.config.loader import recipe_from_dict
from frpo.config.preference import RewardModelRecipe
from frpo.data.batcher import pack_examples, pack_pairs
from frpo.data.layout import Layout
from frpo.data.sets.tiny_tokenizer import build_tokenizer
from frpo.learner.model import cache_facts
from frpo.learner.state_cache import StateCache
from frpo.objectives.supervised import Progress
from frpo.types import Example, Pair

PAIRS = "reward model, same tokens"
TARGETS = {PAIRS: 1.05, "CSFT+PA, cached reference": 1.6, "CSFT+PA, live reference": 2.2}
VARIANTS = {"SFT": ("sft", "live"), "CSFT, live reference": ("csft", "live"),
            "CSFT+PA, cached reference": ("csft_pa", "cache"), "CSFT+PA, live reference": ("csft_pa", "live")}
PROGRESS = Progress(epochs_done=0.5, num_epochs=1)


def main() -> None:
    given, console = arguments(), Console(width=110)
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        policy, reference = (make_model(given, folder / str(seed), seed) for seed in range(2))
        recipes = {name: recipe_of(given, policy, reference, *variant) for name, variant in VARIANTS.items()}
        recipes[PAIRS] = reward_recipe_of(given, policy)
        team = TeamRanks(recipes["SFT"], "cpu")
        from frpo.learner.learner import Learner  # deepspeed reads the environment when it is imported

        learners = {name: Learner(recipe.learner_spec, policy, "cpu") for name, recipe in recipes.items()}
        layout = Layout(num_ranks=1, micro_batch_tokens=given.micro_batch_tokens, packed=True)
        made = make_batches(given)
        batches = [pack_examples(batch, layout, reduction="token-mean")[0] for batch in made]
        pairs = [pack_pairs(as_pairs(batch), layout)[0] for batch in made]
        cached = fill_cache(learners["CSFT+PA, cached reference"], recipes["SFT"], reference, given, batches, folder)
        seconds: dict[str, list[float]] = {name: [] for name in recipes}
        for round_number in track(range(given.rounds + 1), description="rounds"):
            names = list(recipes) if round_number % 2 else list(recipes)[::-1]
            for name in names:
                took = one_step(learners[name], (pairs if name == PAIRS else batches)[round_number])
                if round_number > 0:
                    seconds[name].append(took)
        team.close()
    report(console, given, seconds, cached)
    if given.json:
        given.json.write_text(json.dumps({"seconds": seconds, "filling_the_cache": cached}, indent=1), encoding="utf-8")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="after one that warms up")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--examples", type=int, default=16, help="a batch")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--response", type=int, default=128, help="mean tokens of a response")
    parser.add_argument("--micro-batch-tokens", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    return parser.parse_args()


def make_model(given: argparse.Namespace, folder: Path, seed: int) -> str:
    tokenizer = build_tokenizer()
    torch.manual_seed(seed)
    Qwen2ForCausalLM(Qwen2Config(
        vocab_size=given.vocabulary, hidden_size=given.hidden, intermediate_size=3 * given.hidden,
        num_hidden_layers=given.layers, num_attention_heads=given.hidden // 64, num_key_value_heads=given.hidden // 128,
        max_position_embeddings=4096, tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def recipe_of(given: argparse.Namespace, policy: str, reference: str, objective: str, mode: str) -> FinetuneRecipe:
    return recipe_from_dict({
        "model": {"path": policy, "dtype": "fp32", "max_length": given.micro_batch_tokens},
        "data": {"path": "made.jsonl"}, "objective": objective, "reference": {"path": reference, "mode": mode},
        "learner": {"deepspeed": "zero1", "ranks": "process", "lr": 1e-5, "threads": given.threads,
                    "micro_batch_tokens": given.micro_batch_tokens}}, FinetuneRecipe)


def reward_recipe_of(given: argparse.Namespace, policy: str) -> RewardModelRecipe:
    return recipe_from_dict({
        "model": {"path": policy, "dtype": "fp32", "max_length": given.micro_batch_tokens // 2},
        "data": {"path": "made.jsonl"}, "learner": {
            "deepspeed": "zero1", "ranks": "process", "lr": 1e-5, "threads": given.threads,
            "micro_batch_tokens": given.micro_batch_tokens}}, RewardModelRecipe)


def as_pairs(batch: Sequence[tuple[int, Example]]) -> list[tuple[int, Pair]]:
    """The sequences of a batch, two by two."""
    return [(index, Pair(uid=one.uid, origin="", first=one.token_ids, second=other.token_ids))
            for (index, one), (_, other) in zip(batch[::2], batch[1::2])]


def make_batches(given: argparse.Namespace) -> list[list[tuple[int, Example]]]:
    """Random tokens; responses of half to one and a half times the mean."""
    random = np.random.Generator(np.random.PCG64(0))
    batches = []
    for batch in range(given.rounds + 1):
        found = []
        for place in range(given.examples):
            response = int(random.integers(given.response // 2, 3 * given.response // 2 + 1))
            ids = random.integers(given.vocabulary, size=given.prompt + response).tolist()
            mask = (False,) * given.prompt + (True,) * response
            found.append((batch * given.examples + place,
                          Example(uid=f"{batch}/{place}", origin="", token_ids=tuple(ids), loss_mask=mask)))
        batches.append(found)
    return batches


def fill_cache(learner: Any, recipe: FinetuneRecipe, reference: str, given: argparse.Namespace,
               batches: Sequence[Any], folder: Path) -> float:
    """Let the learner read the reference of all batches from a cache; returns the seconds that this took a batch."""
    examples = [example for batch in make_batches(given) for _, example in batch]
    cache = folder / "cache"
    StateCache.begin(cache, cache_facts(recipe.model, reference, examples), [sum(e.loss_mask) for e in examples])
    learner.begin_cache()
    began = time.perf_counter()
    for batch in batches:
        learner.cache_reference(batch, str(cache))
    took = (time.perf_counter() - began) / len(batches)
    learner.end_cache(str(cache))
    learner.use_cache(str(cache))
    return took


def one_step(learner: Any, batch: Any) -> float:
    began = time.perf_counter()
    if learner.spec.is_reward_model:
        learner.preference_forward_backward(batch).result()
    else:
        learner.supervised_forward_backward(batch, PROGRESS).result()
    learner.optim_step(1000)
    return time.perf_counter() - began


def report(console: Console, given: argparse.Namespace, seconds: dict[str, list[float]], cached: float) -> None:
    table = Table(title=f"One update on {given.examples} examples, hidden {given.hidden}, {given.layers} layers, "
                        f"vocabulary {given.vocabulary}, {given.threads} thread(s), median of {given.rounds}")
    for column in ("variant", "s a step", "/ SFT", "target"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for name, taken in seconds.items():
        ratio = statistics.median(ours / sft for ours, sft in zip(taken, seconds["SFT"], strict=True))
        target = f"<= {TARGETS[name]:g}" if name in TARGETS else ""
        table.add_row(name, f"{statistics.median(taken):.2f}", f"{ratio:.2f}", target)
    console.print(table)
    console.print(f"Filling the cache, once: {cached:.2f} s a batch.")


if __name__ == "__main__":
    main()
