"""What frpo adds to scoring with a model, and how much of the scoring hides behind generation.

    python benchmarks/rewards.py [--repeats 5] [--json FILE] [--part throughput|overlap|slept|all]

throughput: a small random reward model scores the same sequences, in the same batches of equal lengths, in a plain loop
of transformers in this process, in frpo's worker process and in a Ray actor. Each has one thread. The ratio is the
plain loop's time over that of a path, in one repeat: 1 means that nothing is lost.
overlap: a vLLM engine generates groups while a Ray actor scores those that have finished (`ScoreStream`), as in a step.
The reward model is made as deep as it takes for scoring to cost half of the generation. The hidden share is
1 - (both - generation) / scoring, each measured alone too. `max_num_seqs` keeps groups from all ending at once. It
needs two idle cores. On a machine that others use, take many repeats and the figures of the lowest times.
slept: the same stream and actor, but generator and reward sleep in place of computing, as if each had a device of its
own. So it measures what the stream itself hides, on a busy machine too.
Nothing here passes or fails.
"""
from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, PreTrainedTokenizerFast

from frpo.cluster.engine_pool import EnginePool
from frpo.cluster.runtime import ray_session
from frpo.cluster.scorers import workers_of
from frpo.config.loader import recipe_from_dict
from frpo.data.chat import render
from frpo.data.sets.tiny_tokenizer import build_tokenizer
from frpo.rewards import RewardSpec, RewardSuite, ScoreStream
from frpo.rewards.protocol import ActorSpec
from frpo.rewards.scorer_facts import ScorerFacts, template_digest
from frpo.rewards.scorer_model import START_TOKENS_CPU, in_batches
from frpo.rollout.engine import Sampling
from frpo.rollout.sampler import Sampler
from frpo.types import Completion, Prompt, RolloutGroup

WINDOW, BATCH_TOKENS = 512, 4096
TARGETS = {"throughput": 0.95, "hidden": 0.8}
PROMPT_CHARACTERS, ANSWER_CHARACTERS, GROUP_SIZE = 64, 160, 8
WIDTH = {"throughput": 256, "overlap": 128}
MAX_NUM_SEQS = 16
COST = 0.5
"""Time of scoring over that of generation, for the overlap."""

CALIBRATIONS = 5
"""Repeats from which the lowest time is taken to choose the model's depth."""

GROUP_S = 0.1
"""Seconds that a sleeping generator takes for a group."""

Seconds = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="repeats of each measurement, after one that warms up")
    parser.add_argument("--groups", type=int, default=24, help="groups of 8 completions")
    parser.add_argument("--part", choices=["throughput", "overlap", "slept", "all"], default="all")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {"settings": {"groups": given.groups, "group_size": GROUP_SIZE, "torch": torch.__version__}}
    with tempfile.TemporaryDirectory() as folder, ray_session():
        if given.part in ("throughput", "all"):
            found["throughput"] = throughput(Path(folder), given.groups, given.repeats)
        if given.part in ("overlap", "all"):
            found["overlap"] = overlap(Path(folder), given.groups, given.repeats)
        if given.part in ("slept", "all"):
            found["slept"] = slept(Path(folder), given.groups, given.repeats)
    report(found)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


# --- throughput -----------------------------------------------------------------------------------------------------

def throughput(folder: Path, count: int, repeats: int) -> list[Seconds]:
    """Seconds of each path, repeat by repeat. All paths give the same scores."""
    model, groups = reward_model(folder / "scored", layers=4, width=WIDTH["throughput"]), made_up_groups(count)
    with suite_of(model, None) as processes, suite_of(model, ActorSpec(cpus=0)) as actors:
        paths: dict[str, Callable[[], np.ndarray]] = {
            "plain": plain_loop(model, groups), "process": lambda: rewards_of(processes, groups),
            "actor": lambda: rewards_of(actors, groups)}
        values = {name: path() for name, path in paths.items()}  # warms up
        for name in ("process", "actor"):
            np.testing.assert_allclose(values[name], values["plain"], atol=1e-4)
        return [{name: timed(path) for name, path in paths.items()} for _ in range(repeats)]


def plain_loop(model: str, groups: Sequence[RolloutGroup]) -> Callable[[], np.ndarray]:
    """The loop that a user would write with transformers, with batches of similar length."""
    network = AutoModelForSequenceClassification.from_pretrained(model).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)

    def score() -> np.ndarray:
        texts = [tokenizer.apply_chat_template(
            [*group.prompt.messages, {"role": "assistant", "content": completion.text}], tokenize=False)
            for group in groups for completion in group.completions]
        rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
        scores = np.empty(len(rows))
        lengths = [(len(row), number) for number, row in enumerate(rows)]
        for batch in in_batches(lengths, BATCH_TOKENS, START_TOKENS_CPU):
            inputs = tokenizer.pad({"input_ids": [rows[number] for number in batch]}, return_tensors="pt")
            with torch.inference_mode():
                scores[batch] = network(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"],
                                        use_cache=False).logits[:, 0].numpy()
        return scores

    return score


# --- overlap --------------------------------------------------------------------------------------------------------

def overlap(folder: Path, count: int, repeats: int) -> list[Seconds]:
    """Seconds of generation, of scoring and of both at once, repeat by repeat."""
    path = generator(folder / "policy")
    recipe = recipe_from_dict({
        "model": {"path": path, "dtype": "fp32", "max_length": WINDOW},
        "data": {"max_prompt_tokens": WINDOW // 2},
        "rollout": {"prompts_per_step": count, "group_size": GROUP_SIZE, "max_new_tokens": ANSWER_CHARACTERS,
                    "kv_cache_mb": 256, "threads": 1, "engine_kwargs": {"max_num_seqs": MAX_NUM_SEQS}},
        "rewards": [{"name": "scored", "function": "frpo.rewards.scorer:scores"}], "learner": {"num_ranks": 1}})
    pool = EnginePool(recipe, path, "cpu")
    try:
        pool.wait_until_ready()
        pool.serve_loaded(version=0)
        generate = generation(Sampler(pool, 1, run_seed=0), [group.prompt for group in made_up_groups(count)])
        generate(lambda group: None)  # warms up
        groups: list[RolloutGroup] = []
        generate(groups.append)
        generating = min(timed(lambda: generate(lambda group: None)) for _ in range(CALIBRATIONS))
        layers = scaled_depth(folder, groups, COST * generating)
        with suite_of(reward_model(folder / "final", layers, WIDTH["overlap"]), ActorSpec(cpus=0)) as suite:
            suite.score(groups)
            return [measured(generate, suite) | {"layers": layers} for _ in range(repeats)]
    finally:
        pool.close()


def slept(folder: Path, count: int, repeats: int) -> list[Seconds]:
    """Seconds as of `overlap`, of a generator and a reward that sleep."""
    groups = made_up_groups(count)
    (folder / "slow.py").write_text(f"import time\n\ndef slow(completions):\n    "
                                    f"time.sleep({COST * GROUP_S / GROUP_SIZE} * len(completions))\n"
                                    "    return [0.0] * len(completions)\n", encoding="utf-8")

    def generate(take: Callable[[RolloutGroup], Any]) -> None:
        for group in groups:
            time.sleep(GROUP_S)
            take(group)

    with RewardSuite([RewardSpec(name="slow", function=f"{folder / 'slow.py'}:slow", actor=ActorSpec(cpus=0))],
                     workers=workers_of) as suite:
        suite.score(groups)
        return [measured(generate, suite) for _ in range(repeats)]


def measured(generate: Callable[..., None], suite: RewardSuite) -> Seconds:
    groups: list[RolloutGroup] = []
    generating = timed(lambda: generate(groups.append))
    scoring = timed(lambda: suite.score(groups))

    def both() -> None:
        with ScoreStream(suite) as stream:
            generate(stream.add)
            stream.result()

    return {"generation": generating, "scoring": scoring, "both": timed(both)}


def generation(sampler: Sampler, prompts: Sequence[Prompt]) -> Callable[..., None]:
    """A function that samples the same groups each time and gives each group away as it finishes."""
    sampling = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=ANSWER_CHARACTERS)

    def generate(take: Callable[[RolloutGroup], Any]) -> None:
        for group in sampler.stream(prompts, step=0, first_sample=0, group_size=GROUP_SIZE, sampling=sampling,
                                    version=0):
            take(group)

    return generate


def scaled_depth(folder: Path, groups: Sequence[RolloutGroup], wanted_s: float) -> int:
    """The number of layers with which scoring takes so long: cost grows evenly from one depth to another."""
    seconds = {}
    for layers in (2, 8):
        with suite_of(reward_model(folder / f"depth{layers}", layers, WIDTH["overlap"]), ActorSpec(cpus=0)) as suite:
            suite.score(groups)
            seconds[layers] = min(timed(lambda suite=suite: suite.score(groups)) for _ in range(CALIBRATIONS))
    return max(1, round(2 + (wanted_s - seconds[2]) * 6 / (seconds[8] - seconds[2])))


# --- models, groups and figures -------------------------------------------------------------------------------------

def shape(layers: int, width: int, **changes: Any) -> LlamaConfig:
    tokenizer = build_tokenizer()
    return LlamaConfig(vocab_size=len(tokenizer), hidden_size=width, intermediate_size=3 * width,
                       num_hidden_layers=layers, num_attention_heads=width // 32, num_key_value_heads=width // 32,
                       max_position_embeddings=WINDOW, pad_token_id=tokenizer.pad_token_id,
                       eos_token_id=tokenizer.eos_token_id, bos_token_id=None, **changes)


def reward_model(folder: Path, layers: int, width: int) -> str:
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    AutoModelForSequenceClassification.from_config(shape(layers, width, num_labels=1)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ScorerFacts(kind="bradley_terry", format="chat", template=template_digest(tokenizer.chat_template),
                system_prompt=None, max_length=WINDOW, dtype="fp32").write(folder)
    return str(folder)


def generator(folder: Path) -> str:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(shape(layers=4, width=128)).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return str(folder)


def suite_of(model: str, actor: ActorSpec | None) -> RewardSuite:
    return RewardSuite([RewardSpec(
        name="scored", function="frpo.rewards.scorer:scores", format="messages", timeout_s=600, actor=actor,
        kwargs={"model": model, "threads": 1, "batch_tokens": BATCH_TOKENS})], workers=workers_of)


def rewards_of(suite: RewardSuite, groups: Sequence[RolloutGroup]) -> np.ndarray:
    return np.concatenate([scored.rewards_G for scored in suite.score(groups).groups])


def made_up_groups(count: int) -> list[RolloutGroup]:
    """Groups of random letters, of random lengths up to the largest."""
    random, tokenizer = np.random.default_rng(0), build_tokenizer()

    def text(longest: int) -> str:
        return "".join(random.choice([*"abcdefgh "], size=random.integers(longest // 2, longest + 1)))

    groups = []
    for number in range(count):
        messages = ({"role": "user", "content": text(PROMPT_CHARACTERS)},)
        prompt = Prompt(uid=str(number), messages=messages, token_ids=render(messages, tokenizer))
        texts = [text(ANSWER_CHARACTERS) for _ in range(GROUP_SIZE)]
        groups.append(RolloutGroup(group_id=(0, number), prompt=prompt, completions=tuple(
            Completion(text=each, token_ids=np.array(tokenizer(each)["input_ids"]), logprobs=np.zeros(len(each)),
                       loss_mask=np.ones(len(each), dtype=bool), version_spans=(), seed=0, finish_reason="stop")
            for each in texts)))
    return groups


def timed(function: Callable[[], Any]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def report(found: dict[str, Any]) -> None:
    console = Console(width=120, soft_wrap=True)
    table = Table("figure", "median", "lowest", "highest", "of the lowest times", "wanted",
                  title="Scoring with a reward model")
    throughput = found.get("throughput", [])
    for path in ("process", "actor") if throughput else ():
        add(table, f"throughput of the {path} / plain loop", throughput,
            lambda row, path=path: row["plain"] / row[path], TARGETS["throughput"])
    for part in ("overlap", "slept"):
        if part in found:
            add(table, f"{part}: share of scoring that is hidden", found[part],
                lambda row: 1 - (row["both"] - row["generation"]) / row["scoring"], TARGETS["hidden"])
            add(table, f"{part}: time of scoring / of generation", found[part],
                lambda row: row["scoring"] / row["generation"], None)
    console.print(table)
    for part in ("throughput", "overlap", "slept"):
        for row in found.get(part, []):
            console.print(f"{part}: " + ", ".join(f"{name} {value:.3f}" for name, value in row.items()))


def add(table: Table, name: str, rows: Sequence[Seconds], figure: Callable[[Seconds], float], wanted: float | None
        ) -> None:
    values, lowest = [figure(row) for row in rows], {key: min(row[key] for row in rows) for key in rows[0]}
    table.add_row(name, *(f"{value:.3f}" for value in (
        statistics.median(values), min(values), max(values), figure(lowest))),
        "" if wanted is None else f">= {wanted}")


if __name__ == "__main__":
    main()
