"""Small real loops for the integration tests: tiny random models, recipes over them, steps with fabricated advantages.

Engines and learner ranks are frpo's own, started through Ray. No rewards and no data set: prompts are random token ids
and an advantage of +-1 a sample is enough to move weights. Not a test itself.
"""
from __future__ import annotations

import gc
import json
import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen3MoeConfig,
)

from frpo.cluster.engine_pool import EnginePool
from frpo.cluster.learner_group import LearnerGroup
from frpo.cluster.ray_ranks import ray_learner
from frpo.cluster.runtime import wait_for
from frpo.config.loader import dump_recipe, recipe_from_dict
from frpo.config.sections import Recipe, repository_file
from frpo.data.batcher import pack
from frpo.data.sets.tiny_tokenizer import build_tokenizer
from frpo.rollout.engine import Sampling
from frpo.rollout.sampler import Sampler
from frpo.types import AdvantagedGroup, Completion, MicroBatch, Prompt, RolloutGroup, ScoredGroup

EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4, "num_experts": 4, "moe_intermediate_size": 64}
FAMILIES = {"qwen2": Qwen2Config, "llama": LlamaConfig, "mistral": MistralConfig,
            "mixtral": partial(MixtralConfig, **EXPERTS), "qwen3_moe": partial(Qwen3MoeConfig, **EXPERTS)}
LEARNING_RATE = 5e-3
BUCKET_MB = 0.1
GREEDY = Sampling(temperature=0.0, top_p=1.0, max_new_tokens=8)
UNSCALED = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=8)

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # actors cannot import from the tests' folder


def random_model(folder: Path, family: str, *, tied: bool, max_length: int = 64, seed: int = 0) -> str:
    """A random model of `family` in fp32 and its tokenizer, about five buckets of BUCKET_MB. Returns its path."""
    tokenizer = build_tokenizer()
    torch.manual_seed(seed)
    config = FAMILIES[family](
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=max_length, tie_word_embeddings=tied,
        # Wide enough that attention and every layer matter from the start.
        initializer_range=0.1, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert (folder / "model.safetensors").stat().st_size > 4 * BUCKET_MB * 2**20, "the model fits into few buckets"
    return str(folder)


def splitting_strategy(folder: Path, stage: int) -> str:
    """Path of ds_configs/zero<stage>.json, in stage 3 with a threshold so low that tiny matrices are split too.

    The shipped threshold keeps small parameters whole on all ranks, so that little is gathered.
    """
    strategy = json.loads(repository_file("ds_configs", f"zero{stage}", ".json").read_text(encoding="utf-8"))
    if stage == 3:
        strategy["zero_optimization"]["stage3_param_persistence_threshold"] = 1000
    path = folder / f"zero{stage}.json"
    path.write_text(json.dumps(strategy), encoding="utf-8")
    return str(path)


def small_recipe(model_path: str, strategy: str, *, dtype: str = "fp32", max_length: int = 64,
                 gradient_checkpointing: bool = False, lora: dict[str, Any] | None = None, num_ranks: int = 2,
                 timeout_s: float = 60.0, backend: str = "cpu_shm", staged: bool | None = None, **rollout: Any
                 ) -> Recipe:
    """A recipe for `model_path` with short limits; rewards and data are named but never used.

    rollout: more keys of that section.
    """
    return recipe_from_dict({
        "model": {"path": model_path, "dtype": dtype, "max_length": max_length, "lora": lora},
        "data": {"max_prompt_tokens": max_length - 8},
        "rollout": {"prompts_per_step": 4, "group_size": 2, "max_new_tokens": 8, "kv_cache_mb": 32, "threads": 1,
                    "timeout_s": timeout_s, **rollout},
        "rewards": [{"name": "none", "function": "frpo.rewards.verifiers:exact_answer"}],
        "learner": {"num_ranks": num_ranks, "deepspeed": strategy, "lr": LEARNING_RATE, "timeout_s": timeout_s,
                    "micro_batch_tokens": 4 * max_length, "gradient_checkpointing": gradient_checkpointing},
        "weight_sync": {"backend": backend, "staged": staged, "bucket_mb": BUCKET_MB, "timeout_s": timeout_s},
    })


class RunningLoop:
    """The engines and learner ranks of a recipe, started when first needed and again after a test has killed them."""

    def __init__(self, recipe: Recipe, model_path: str):
        self.recipe, self.model_path = recipe, model_path
        self._pool: EnginePool | None = None
        self._learner: LearnerGroup | None = None
        self.version = 0
        self.drawn = 0

    @property
    def pool(self) -> EnginePool:
        self._start()
        return self._pool

    @property
    def learner(self) -> LearnerGroup:
        self._start()
        return self._learner

    def _start(self) -> None:
        if self._pool is not None and self._learner is not None:
            return
        fresh_pool = self._pool is None
        if fresh_pool:
            self._pool = EnginePool(self.recipe, self.model_path, "cpu")
        if self._learner is None:
            self._learner = ray_learner(self.recipe, self.model_path, "cpu")
        if fresh_pool:
            self._pool.wait_until_ready()
        self._learner.connect_engines(self._pool.client(), self.recipe.weight_sync)

    def become(self, recipe: Recipe, model_path: str) -> None:
        """Build another model's engine and learner in the processes that run already: imports cost most of a start."""
        self.recipe, self.model_path, self.version = recipe, model_path, 0
        if self._pool is None or self._learner is None:
            self.close()
            return
        values, limit = dump_recipe(recipe), recipe.learner.startup_timeout_s
        wait_for("rebuild", [
            *((a, a.handle.__ray_call__.remote(rebuild_engine, values, model_path)) for a in self._pool.engines),
            *((a, a.handle.build.remote(Recipe, values, model_path, "cpu", {}))
              for a in self._learner.ranks.actors)], limit)
        self._pool.recipe = self._learner.recipe = recipe
        self._pool.model_path = model_path  # what a restarted engine loads
        self._learner.layout = replace(self._learner.layout, micro_batch_tokens=recipe.learner.micro_batch_tokens,
                                       packed=recipe.learner.packing)
        self._learner.connect_engines(self._pool.client(), self.recipe.weight_sync)

    def drop_pool(self) -> None:
        """End the engines; the next use starts others."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.close()

    def drop_learner(self) -> None:
        """End the learner ranks; the next use starts new ones from the model on disk."""
        learner, self._learner = self._learner, None
        if learner is not None:
            learner.close()

    def close(self) -> None:
        self.drop_pool()
        self.drop_learner()

    def push(self) -> int:
        """One push under a new version, which it returns."""
        self.learner.push_weights(self.version + 1)
        self.version += 1
        return self.version

    def sample(self, prompts: list[Prompt], sampling: Sampling = UNSCALED, group_size: int = 2) -> list[RolloutGroup]:
        """Groups from the engines at the pushed version."""
        self.drawn += len(prompts)
        return Sampler(self.pool, self.recipe.rollout.num_engines, 0).sample(
            prompts, step=self.drawn, first_sample=self.drawn * group_size, group_size=group_size, sampling=sampling,
            version=self.version)

    def update_of(self, prompts: list[Prompt]) -> tuple[tuple[MicroBatch, ...], ...]:
        """The micro-batches, by rank, of one update on fresh samples; advantages alternate +1, -1."""
        return pack([compute_advantages(group) for group in self.sample(prompts)], self.learner.layout,
                    reduction="seq-mean-token-mean", max_length=self.recipe.rollout.max_new_tokens)

    def update(self, prompts: list[Prompt], *, watch_movement: bool = False) -> None:
        """Sample and take one optimizer step. Does not push."""
        self.learner.forward_backward(self.update_of(prompts), watch_movement=watch_movement)
        self.learner.optim_step(1000, watch_movement=watch_movement)

    def gap(self, prompts: list[Prompt]) -> float:
        """Largest |log-prob difference| (nats) between engines and learner, of generated and of given tokens.

        Every engine generates its share of the prompts and scores all of them.
        """
        groups = self.sample(prompts)
        learner = flat(self.learner.score_groups(groups, "policy", temperature=1.0))
        generated = flat([c.logprobs for c in group.completions] for group in groups)
        sequences = [((*group.prompt.token_ids, *c.token_ids.tolist()), len(group.prompt.token_ids))
                     for group in groups for c in group.completions]
        given = [flat([scores]) for scores in self.pool.score(sequences, self.version)]
        return float(max(np.abs(scores - learner).max() for scores in (generated, *given)))


def random_prompts(count: int, length: int, seed: int) -> list[Prompt]:
    """Prompts of random ids of ordinary tokens; `length` tokens the longest, half of it the shortest."""
    random = np.random.default_rng(seed)
    lengths = random.integers(max(1, length // 2), length + 1, size=count)
    lengths[0] = length
    return [Prompt(uid=str(i), messages=(), token_ids=tuple(int(t) for t in random.integers(7, 104, size=n)))
            for i, n in enumerate(lengths)]


def hand_made_groups(seed: int = 0) -> list[AdvantagedGroup]:
    """3 groups of 3 samples of 1-9 tokens, one without advantage and not watched, with random reference log-probs."""
    random = np.random.default_rng(seed)
    groups = []
    for draw in range(3):
        lengths = random.integers(1, 10, size=3)
        completions = tuple(
            Completion(text="", token_ids=tuple(int(t) for t in random.integers(7, 104, size=n)),
                       logprobs=tuple(-random.random(n)), loss_mask=(True,) * int(n), version_spans=(), seed=0,
                       finish_reason="stop") for n in lengths)
        prompt = Prompt(uid=str(draw), messages=(), columns={"watched": draw != 1},
                        token_ids=tuple(int(t) for t in random.integers(7, 104, size=5)))
        advantages = random.normal(size=3) * (draw != 1)
        scored = ScoredGroup(group=RolloutGroup(group_id=(0, draw), prompt=prompt, completions=completions),
                             rewards_G=advantages, terms={})
        groups.append(AdvantagedGroup(scored=scored, advantages_G=advantages, stats={},
                                      ref_logprobs=tuple(-6 * random.random(n) for n in lengths)))
    return groups


def compute_advantages(group: RolloutGroup) -> AdvantagedGroup:
    """The group with advantages +1, -1, +1, ..."""
    signs = np.where(np.arange(len(group.completions)) % 2 == 0, 1.0, -1.0)
    return AdvantagedGroup(scored=ScoredGroup(group=group, rewards_G=signs, terms={}), advantages_G=signs, stats={})


def flat(arrays: Any) -> np.ndarray:
    """All numbers of arrays in sequences, in order."""
    return np.concatenate([np.asarray(array, dtype=np.float64) for inner in arrays for array in inner])


def rebuild_engine(engine: Any, recipe: dict[str, Any], model_path: str) -> None:
    """Inside an engine's actor: let go of its model, and of its workers if it has them, and build another."""
    if engine.llm.llm_engine.vllm_config.parallel_config.world_size > 1:
        engine.llm.llm_engine.engine_core.shutdown()
    del engine.llm, engine.shared
    gc.collect()
    engine.__init__(recipe, model_path, "cpu", engine.index)


def set_hook(engine: Any, function: str | None) -> None:
    """Inside an engine's actor: sample with this rollout hook from now on."""
    from frpo.rollout.episodes import load_hook

    engine.hook = function and load_hook(function)


def inside(actor: Any, function: Any, *arguments: Any, timeout_s: float = 60.0) -> Any:
    """Run `function(actor's object, *arguments)` in the process of a NamedActor."""
    return ray.get(actor.handle.__ray_call__.remote(function, *arguments), timeout=timeout_s)


def pid_of(actor: Any) -> int:
    """Process id of a NamedActor."""
    return inside(actor, lambda self: os.getpid())
