"""What `families.py` measures of one family, each job in a process of its own: by frpo's real code, on a tiny model.

    python benchmarks/family_jobs.py {learn,serve} FAMILY FOLDER [--padded]

learn  policy against plain transformers, packed and padded; a fine-tuning of three updates; another with LoRA
serve  the export of the fine-tuning in vLLM against plain transformers; then two steps of reinforcement learning from
       it, on real engines and ranks (--padded: without packing)

Every result is a cell, written to FOLDER/JOB.json as soon as it is known: {"difference": nats}, or {"refused": why}
where frpo says no before it starts, or {"failed": why}. Plain transformers is eager attention, fp32, one sequence at a
time. Nothing here passes or fails.
"""
from __future__ import annotations

import argparse
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from family_zoo import make_model
from transformers import AutoModelForCausalLM

from frpo.builder import build_stack, check, learner_ranks, parts_on, reward_suite
from frpo.cluster.engine_pool import EnginePool
from frpo.cluster.rank import Ranks
from frpo.config.finetune import FinetuneRecipe
from frpo.config.loader import recipe_from_dict
from frpo.config.model import ModelSection
from frpo.config.sections import Recipe
from frpo.errors import ModelError
from frpo.finetune import FineTuner
from frpo.finetune_parts import check_finetune, finetune_on
from frpo.learner.collate import collate
from frpo.learner.guard import compare
from frpo.learner.model import check_family, load_model
from frpo.learner.network import TokenModel
from frpo.trainer import Trainer
from frpo.types import Example

Cell = dict[str, Any]
MAX_LENGTH = 64
LENGTHS = (5, 40, 13, 100, 24)
"""Tokens of the sequences that are compared. The longest exceeds MAX_LENGTH, up to which a model is trained: factors of
rotary positions may change there."""
EXAMPLES, HELDOUT, BATCH, MOST_OPERANDS = 32, 8, 8, 17
REWARD = """
def spread(completions, **columns):
    return [sum(map(ord, completion)) % 2 for completion in completions]
"""
"""A random model earns something of it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("job", choices=JOBS)
    parser.add_argument("family")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--padded", action="store_true")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    found: dict[str, Cell] = {}
    for name, cell in JOBS[given.job](given):
        found[name] = cell
        (given.folder / f"{given.job}.json").write_text(json.dumps(found), encoding="utf-8")


def attempt(measure: Callable[[], float]) -> Cell:
    """A cell of what `measure` returns. Whatever a family raises is its result, and the next cell is still wanted."""
    try:
        return {"difference": measure()}
    except ModelError as error:
        return {"refused": str(error)}
    except Exception as error:
        # An actor's own error stands at the end of what Ray says of its death.
        said = str(error.__context__ or error).strip().splitlines() or [""]
        return {"failed": f"{type(error).__name__}: {said[-1]}"}


# --- learn ------------------------------------------------------------------------------------------------------------


def learn(given: argparse.Namespace) -> Iterator[tuple[str, Cell]]:
    path = make_model(given.family, given.folder / "model")
    section = ModelSection(path=path, dtype="fp32", max_length=MAX_LENGTH)
    for name, packed in (("packed", True), ("padded", False)):
        yield name, attempt(lambda packed=packed: against_plain(section, packed))
    write_examples(given.folder / "examples.jsonl")
    with learner_ranks(finetune_recipe(given.folder, "", packing=True, lora=None), "cpu") as ranks:
        packing = attempt(lambda: finetune(ranks, given.folder, "finetune", packing=True))
        yield "packing", packing
        works = "difference" in packing
        yield "finetune", packing if works else attempt(
            lambda: finetune(ranks, given.folder, "finetune", packing=False))
        yield "lora", attempt(lambda: finetune(ranks, given.folder, "lora", packing=works, lora={"r": 4}))


def against_plain(section: ModelSection, packed: bool) -> float:
    """Largest |log-prob difference| of the model as the learner computes it, several sequences at once."""
    check_family(section, section.path)
    found = compare("policy", TokenModel(load_model(section, section.path)), random_sequences(LENGTHS), partial(
        collate, pad_id=0, device=torch.device("cpu"), packed=packed))
    if found.failure is not None:
        raise ModelError(found.failure)
    return found.together[1]


def finetune(ranks: Ranks, folder: Path, name: str, *, packing: bool, lora: dict[str, int] | None = None) -> float:
    """Fine-tune as `frpo finetune` does; |NLL difference| of learner and plain transformers, before or after, nats."""
    recipe = finetune_recipe(folder, name, packing=packing, lora=lora)
    checked = check_finetune(recipe)
    with finetune_on(ranks, "cpu", recipe, checked, recipe.model.path) as parts:
        FineTuner(parts).fit()
    said = [row["eval/nll"] for row in rows(folder / name) if "eval/nll" in row]
    right = [plain_nll(path, checked.examples.heldout) for path in (recipe.model.path, folder / name / "export")]
    return largest(np.subtract([said[0], said[-1]], right))


def finetune_recipe(folder: Path, name: str, *, packing: bool, lora: dict[str, int] | None) -> FinetuneRecipe:
    return recipe_from_dict({
        "run": {"name": folder.name, "dir": str(folder / name), "device": "cpu", "resume": "never"},
        "model": {"path": str(folder / "model"), "dtype": "fp32", "max_length": MAX_LENGTH, "lora": lora},
        "data": {"path": str(folder / "examples.jsonl"), "format": "text", "heldout": HELDOUT, "batch_size": BATCH},
        "learner": {"ranks": "process", "deepspeed": "zero3", "lr": 1e-3, "micro_batch_tokens": 8 * MAX_LENGTH,
                    "packing": packing}}, FinetuneRecipe)


def write_examples(path: Path) -> None:
    """Sums of two to MOST_OPERANDS numbers, so that lengths differ."""
    random = np.random.default_rng(0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(EXAMPLES):
            numbers = random.integers(1, 100, size=random.integers(2, MOST_OPERANDS + 1)).tolist()
            file.write(json.dumps({"prompt": "+".join(map(str, numbers)) + "=", "response": str(sum(numbers))}) + "\n")


def rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


# --- plain transformers -----------------------------------------------------------------------------------------------


def plain_logprobs(path: str | Path, sequences: list[list[int]]) -> list[np.ndarray]:
    """Log-probability of every token but the first, sequence by sequence."""
    network = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    found = []
    for ids in sequences:
        with torch.no_grad():
            logits_TV = network(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1].double()
        found.append(logits_TV.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0].numpy())
    return found


def plain_nll(path: str | Path, examples: list[Example]) -> float:
    """Mean negative log-likelihood of the response tokens, in nats."""
    logprobs = plain_logprobs(path, [list(example.token_ids) for example in examples])
    learned = [np.array(example.loss_mask[1:]) for example in examples]
    return -float(np.concatenate(logprobs)[np.concatenate(learned)].mean())


def largest(differences: np.ndarray) -> float:
    """In absolute value; not a number counts as infinite."""
    return float(np.nan_to_num(np.abs(differences), nan=np.inf).max())


def random_sequences(lengths: tuple[int, ...]) -> list[list[int]]:
    random = np.random.default_rng(5)
    return [random.integers(7, 104, size=length).tolist() for length in lengths]


# --- serve ------------------------------------------------------------------------------------------------------------


def serve(given: argparse.Namespace) -> Iterator[tuple[str, Cell]]:
    """One engine for both: what it loaded from the export, then what the learner pushed."""
    recipe = train_recipe(given)
    checked = check(recipe)
    with reward_suite(recipe, checked.prompts) as rewards, build_stack(recipe, recipe.model.path) as stack:
        vllm = attempt(lambda: served_difference(stack.pool, recipe.model.path))
        yield "vllm", vllm

        def gap() -> float:
            """Of the last step, which samples from weights that an update has changed and a push has brought."""
            with parts_on(stack, recipe, checked, rewards, recipe.model.path) as parts:
                Trainer(parts).fit()
            return rows(Path(recipe.run.dir))[-1]["rollout/logprob_gap_max"]

        yield "train", attempt(gap) if "difference" in vllm else {"failed": "vLLM does not load the export"}


def served_difference(pool: EnginePool, export: str) -> float:
    """Largest |log-prob difference| of the engine and plain transformers, both reading the same folder."""
    sequences = random_sequences(tuple(min(length, MAX_LENGTH - 1) for length in LENGTHS))
    pool.wait_until_ready()
    pool.serve_loaded(0)
    served = pool.score([(ids, 1) for ids in sequences], 0)[0]
    return largest(np.concatenate(served) - np.concatenate(plain_logprobs(export, sequences)))


def train_recipe(given: argparse.Namespace) -> Recipe:
    reward = given.folder / "reward.py"
    reward.write_text(REWARD, encoding="utf-8")
    return recipe_from_dict({
        "run": {"name": given.family, "dir": str(given.folder / "train"), "device": "cpu", "num_steps": 2,
                "resume": "never"},
        "model": {"path": str(given.folder / "finetune" / "export"), "dtype": "fp32", "max_length": MAX_LENGTH},
        "data": {"path": "arithmetic", "format": "text", "limit": 64, "heldout": 4, "max_prompt_tokens": 16},
        "rollout": {"prompts_per_step": 8, "group_size": 4, "max_new_tokens": 8, "kv_cache_mb": 64, "threads": 1},
        "rewards": [{"name": "spread", "function": f"{reward}:spread"}],
        "learner": {"deepspeed": "zero3", "lr": 5e-3, "micro_batch_tokens": 8 * MAX_LENGTH,
                    "packing": not given.padded}})


JOBS = {"learn": learn, "serve": serve}

if __name__ == "__main__":
    main()
