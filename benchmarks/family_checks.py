"""What `families.py` measures of one family: a tiny model in frpo's real learner and engine, beside plain transformers.

learn  the policy against plain transformers and a fine-tuning of three updates, packed and padded; another with LoRA
serve  the fine-tuned export in vLLM against plain transformers; then two steps of reinforcement learning from it

Every result is a cell: {"difference": nats}, or {"refused": why} where a check of frpo says no, or {"failed": why}.
Plain transformers is eager attention, fp32, one sequence at a time. Nothing here passes or fails.
"""
from __future__ import annotations

import gc
import json
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from family_zoo import make_model
from transformers import AutoModelForCausalLM

from frpo.cluster.engine_pool import EnginePool
from frpo.cluster.learner_group import LearnerGroup
from frpo.cluster.placement import OnCpu
from frpo.cluster.rank import Ranks
from frpo.cluster.runtime import wait_for
from frpo.config.finetune import FinetuneRecipe
from frpo.config.loader import dump_recipe, recipe_from_dict
from frpo.config.sections import Recipe
from frpo.errors import InvariantError, ModelError
from frpo.loops.rl import Trainer
from frpo.loops.sft import FineTuner
from frpo.run.build import Processes as RunProcesses
from frpo.run.build import check, engine_pool, learner_ranks, parts_on, tried_rewards
from frpo.run.build_finetune import check_finetune, finetune_on
from frpo.types import Example

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # actors cannot import from this folder

Cell = dict[str, Any]
MAX_LENGTH, TIMEOUT_S = 64, 90
LENGTHS = (5, 40, 13, 100, 24)
"""Tokens of the sequences that are compared. The longest exceeds MAX_LENGTH, up to which a model is trained: factors of
rotary positions may change there."""
EXAMPLES, HELDOUT, BATCH, MOST_OPERANDS = 32, 8, 8, 17
EXPORT = "packing/export", "padding/export"
REWARD = """
def spread(completions, **columns):
    return [sum(map(ord, completion)) % 2 for completion in completions]
"""
"""A random model earns something of it."""


class Processes:
    """A learner rank and a rollout engine, through which families go one after the other: imports cost most of a start.

    Started when first needed, and again after a failure, which may have left anything in them.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._ranks, self._engine = ExitStack(), ExitStack()
        self.ranks: Ranks | None = None
        self.pool: EnginePool | None = None

    def learner_ranks(self, recipe: FinetuneRecipe | Recipe) -> Ranks:
        self.ranks = self.ranks or self._ranks.enter_context(learner_ranks(recipe, "cpu", OnCpu()))
        return self.ranks

    def engine_with(self, recipe: Recipe) -> EnginePool:
        """An engine that has loaded the recipe's model. A fresh one first loads another, so that all load alike."""
        if self.pool is None:
            first = make_model("llama", self.folder)
            self.pool = self._engine.enter_context(engine_pool(recipe, first, "cpu", OnCpu()))
            self.pool.wait_until_ready()
        self.pool.recipe, self.pool.model_path = recipe, recipe.model.path
        wait_for("load", [(engine, engine.handle.__ray_call__.remote(load_another, dump_recipe(recipe)))
                          for engine in self.pool.engines], TIMEOUT_S)
        return self.pool

    @contextmanager
    def recorded(self, cells: dict[str, Cell], *names: str) -> Iterator[None]:
        """What is raised within it becomes the cell of each name that has none by then, whatever it is."""
        for name in names:
            cells.pop(name, None)
        try:
            yield
        except (ModelError, InvariantError) as error:
            reason = {"refused": str(error)}
        except Exception as error:
            reason = {"failed": cause(error)}
            self.close()
        else:
            return
        cells |= {name: reason for name in names if name not in cells}

    def close(self) -> None:
        self._ranks.close()
        self._engine.close()
        self.ranks = self.pool = None


def cause(error: Exception) -> str:
    """In one line. What failed in an actor stands behind the actor's name, in the last line that names an error."""
    said = f"{type(error).__name__}: {error}".replace("\\n", "\n")
    lines = [line.strip() for line in said.splitlines() if "Error" in line or "failed" in line]
    return re.sub(r".*\(log: \S+\) (raised )?| \[type=.*", "", lines[-1])


def load_another(engine: Any, recipe: dict[str, Any]) -> None:
    """Inside an engine's actor: let go of its model and load the recipe's."""
    del engine.llm, engine.shared
    gc.collect()
    engine.__init__(recipe, recipe["model"]["path"], "cpu", engine.index)


# --- learn ------------------------------------------------------------------------------------------------------------


def learn(processes: Processes, family: str, folder: Path, cells: dict[str, Cell]) -> None:
    """Cells packed and padded: learner and plain transformers; packing, padding and lora: fine-tunings."""
    shutil.rmtree(folder, ignore_errors=True)
    make_model(family, folder / "model")
    write_examples(folder / "examples.jsonl")
    for compared, trained, packing in (("packed", "packing", True), ("padded", "padding", False)):
        with processes.recorded(cells, compared, trained):
            finetune(processes, folder, cells, compared, trained, packing=packing)
    with processes.recorded(cells, "lora"):
        finetune(processes, folder, cells, None, "lora", packing="difference" in cells["packing"], lora={"r": 4})


def finetune(processes: Processes, folder: Path, cells: dict[str, Cell], compared: str | None, trained: str,
             **options: Any) -> None:
    """As `frpo finetune` does it. Its cell is the larger |NLL difference| of learner and plain transformers, before the
    first update and after the last.
    """
    recipe = finetune_recipe(folder, trained, **options)
    checked = check_finetune(recipe)
    with finetune_on(processes.learner_ranks(recipe), "cpu", recipe, checked, recipe.model.path) as parts:
        if compared:
            cells[compared] = against_plain(parts.learner)
        FineTuner(parts).fit()
    said = [row["eval/nll"] for row in rows(folder / trained) if "eval/nll" in row]
    right = [plain_nll(path, checked.examples.heldout) for path in (folder / "model", folder / trained / "export")]
    cells[trained] = difference(np.subtract([said[0], said[-1]], right))


def against_plain(learner: LearnerGroup) -> Cell:
    """Largest |log-prob difference| of several sequences at once."""
    found = learner.compare(random_sequences(LENGTHS))[0][0]
    return {"failed": found.failure} if found.failure else {"difference": found.together[1]}


def finetune_recipe(folder: Path, name: str, *, packing: bool, lora: dict[str, int] | None = None) -> FinetuneRecipe:
    return recipe_from_dict({
        "run": {"name": name, "dir": str(folder / name), "device": "cpu", "resume": "never"},
        "model": {"path": str(folder / "model"), "dtype": "fp32", "max_length": MAX_LENGTH, "lora": lora},
        "data": {"path": str(folder / "examples.jsonl"), "format": "text", "heldout": HELDOUT, "batch_size": BATCH},
        "learner": learner_section(1e-3, packing)}, FinetuneRecipe)


def learner_section(lr: float, packing: bool) -> dict[str, Any]:
    return {"deepspeed": "zero3", "lr": lr, "micro_batch_tokens": 8 * MAX_LENGTH, "packing": packing,
            "startup_timeout_s": TIMEOUT_S, "timeout_s": TIMEOUT_S}


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


def plain_logprobs(path: Path, sequences: list[list[int]]) -> list[np.ndarray]:
    """Log-probability of every token but the first, sequence by sequence."""
    network = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    found = []
    for ids in sequences:
        with torch.no_grad():
            logits_TV = network(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1].double()
        found.append(logits_TV.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0].numpy())
    return found


def plain_nll(path: Path, examples: list[Example]) -> float:
    """Mean negative log-likelihood of the response tokens, in nats."""
    logprobs = plain_logprobs(path, [list(example.token_ids) for example in examples])
    learned = [np.array(example.loss_mask[1:]) for example in examples]
    return -float(np.concatenate(logprobs)[np.concatenate(learned)].mean())


def difference(values: np.ndarray) -> Cell:
    """The largest in absolute value; not a number counts as infinite."""
    return {"difference": float(np.nan_to_num(np.abs(values), nan=np.inf).max())}


def random_sequences(lengths: tuple[int, ...]) -> list[list[int]]:
    random = np.random.default_rng(5)
    return [random.integers(7, 104, size=length).tolist() for length in lengths]


# --- serve ------------------------------------------------------------------------------------------------------------


def serve(processes: Processes, family: str, folder: Path, cells: dict[str, Cell]) -> None:
    """Cells vllm, of what the engine loaded, and train, of what it sampled after an update and a push."""
    packing = "difference" in cells["packing"]
    with processes.recorded(cells, "vllm", "train"):
        export = folder / EXPORT[0 if packing else 1]
        if not export.is_dir():
            raise ModelError("no fine-tuning has left an export")
        shutil.rmtree(folder / "train", ignore_errors=True)
        recipe = train_recipe(folder, export, packing)
        checked = check(recipe)
        pool = processes.engine_with(recipe)
        pool.serve_loaded(0)
        sequences = random_sequences(tuple(min(length, MAX_LENGTH - 1) for length in LENGTHS))
        served = pool.score([(ids, 1) for ids in sequences], 0)[0]
        cells["vllm"] = difference(np.concatenate(served) - np.concatenate(plain_logprobs(export, sequences)))
        stack = RunProcesses(pool=pool, ranks=processes.learner_ranks(recipe), device="cpu")
        with (tried_rewards(recipe, checked.prompts) as rewards,
              parts_on(stack, recipe, checked, rewards, str(export)) as parts):
            Trainer(parts).fit()
        cells["train"] = {"difference": rows(Path(recipe.run.dir))[-1]["rollout/logprob_gap_max"]}


def train_recipe(folder: Path, export: Path, packing: bool) -> Recipe:
    (folder / "reward.py").write_text(REWARD, encoding="utf-8")
    return recipe_from_dict({
        "run": {"name": "train", "dir": str(folder / "train"), "device": "cpu", "num_steps": 2, "resume": "never"},
        "model": {"path": str(export), "dtype": "fp32", "max_length": MAX_LENGTH},
        "data": {"path": "arithmetic", "format": "text", "limit": 64, "heldout": 4, "max_prompt_tokens": 16},
        "rollout": {"prompts_per_step": 8, "group_size": 4, "max_new_tokens": 8, "kv_cache_mb": 64,
                    "block_size": 32,  # a chunk of Llama 4's attention must be whole blocks
                    "startup_timeout_s": TIMEOUT_S, "timeout_s": TIMEOUT_S},
        "rewards": [{"name": "spread", "function": f"{folder / 'reward.py'}:spread"}],
        "weight_sync": {"timeout_s": TIMEOUT_S},
        "learner": learner_section(5e-3, packing)})


JOBS = {"learn": (learn, ("packed", "padded", "packing", "padding", "lora")), "serve": (serve, ("vllm", "train"))}
"""Name -> what runs, the cells that it fills."""
