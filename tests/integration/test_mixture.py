"""Mixtures of experts on real engines: trained and fine-tuned, and what is pushed is all of what the engine serves.

Models of two families, one after the other, in the processes of the loop that other tests share.
"""
from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ray
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from frpo.cluster.recovery import RecoveringEngines
from frpo.config.finetune import FinetuneRecipe
from frpo.config.loader import load_recipe
from frpo.data.sets.arithmetic import problems
from frpo.downstream.kl_spacing import ProbeSchedule
from frpo.downstream.probe import Task, TaskProbe
from frpo.errors import EngineError, InvariantError
from frpo.learner.model import load_tokenizer
from frpo.loops.rl import Trainer
from frpo.loops.sft import FineTuner
from frpo.run.build import Processes, check, parts_on, reward_suite
from frpo.run.build_finetune import check_finetune, finetune_on
from frpo.run.checks import check_logprob_gap, check_movement
from frpo.telemetry.timer import PhaseTimer
from frpo.types import RunState
from loop import flat, inside, random_model, random_prompts, small_recipe, splitting_strategy
from parity_matrix import LIMIT
from runs import REWARD, metrics

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # actors cannot import from the tests' folder

PROMPTS = random_prompts(6, 40, seed=2)


@pytest.fixture(scope="module")
def borrowed(loop):
    """The loop that other tests share, given back as it was."""
    recipe, path = loop.recipe, loop.model_path
    yield loop
    loop.become(recipe, path)


@pytest.fixture(scope="module")
def mixture(borrowed, tmp_path_factory):
    """family -> the loop with a model of it, under ZeRO-3 on two ranks, just pushed."""
    def build(family, coefficient=None):
        folder = tmp_path_factory.mktemp(family)
        path = random_model(folder / "model", family, tied=False)
        recipe = small_recipe(path, splitting_strategy(folder, 3))
        model = recipe.model.model_copy(update={"router_aux_loss_coef": coefficient})
        borrowed.become(recipe.model_copy(update={"model": model}), path)
        borrowed.push()
        return borrowed

    return build


def plain_logprobs(path, groups):
    """Of all completions under plain transformers, one sequence at a time."""
    network = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager",
                                                   experts_implementation="eager")
    found = []
    for group in groups:
        for completion in group.completions:
            tokens = [*group.prompt.token_ids, *completion.token_ids]
            with torch.no_grad():
                logprobs_TV = network(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)
            start = len(group.prompt.token_ids)
            found += [logprobs_TV[i - 1, tokens[i]].item() for i in range(start, len(tokens))]
    return np.array(found)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_engine_learner_and_export_are_one_function_after_pushes(mixture, family, tmp_path):
    loop = mixture(family, coefficient=0.1)
    before = loop.gap(PROMPTS)
    loop.update(PROMPTS, watch_movement=True)
    movement = loop.learner.movement_report()
    check_movement(movement)
    assert sum(".experts." in name for name in movement) == 4 and sum(".gate." in name for name in movement) == 2
    stale = loop.gap(PROMPTS)
    loop.push()
    after = loop.gap(PROMPTS)
    print(f"\n{family}: before {before:.1e} stale {stale:.1e} after {after:.1e}")
    assert before <= LIMIT["fp32"] and after <= LIMIT["fp32"] and stale > 3 * LIMIT["fp32"]
    groups = loop.sample(PROMPTS)
    learned = flat(loop.learner.score_groups(groups, "policy", temperature=1.0))
    loop.learner.export(str(tmp_path / "export"))
    assert np.abs(plain_logprobs(tmp_path / "export", groups) - learned).max() <= LIMIT["fp32"]
    assert load_file(tmp_path / "export" / "model.safetensors").keys() == load_file(
        f"{loop.model_path}/model.safetensors").keys()


def keep_kernels(engine):
    """Inside an engine's actor: the reload as vLLM has it, which leaves the experts unpacked."""
    import frpo.rollout.receiver as module

    engine.dropped, module.drop_expert_kernels = module.drop_expert_kernels, lambda model: None


def mend_kernels(engine):
    import frpo.rollout.receiver as module

    module.drop_expert_kernels = engine.dropped


@contextmanager
def kept_kernels(loop):
    engine, = loop.pool.engines
    inside(engine, keep_kernels)
    try:
        yield
    finally:
        inside(engine, mend_kernels)


@pytest.mark.timeout(120)
def test_experts_that_vllm_leaves_unpacked_fail_the_parity_check(mixture):
    loop = mixture("qwen3_moe")
    with kept_kernels(loop):
        loop.push()
        groups = loop.sample(PROMPTS)
        with pytest.raises(InvariantError, match="rollout engine 0 and learner disagree"):
            check_logprob_gap(loop.recipe, loop.learner, loop.pool, groups, loop.version)
    loop.push()
    assert check_logprob_gap(loop.recipe, loop.learner, loop.pool, groups, loop.version) <= LIMIT["fp32"]


def push_instead(actor, change):
    """Inside a rank: push what `change` makes of (name, tensor) pairs, bucket by bucket."""
    learner = actor.learner
    stored = type(learner)._checkpoint

    class Changed:
        def __init__(self, entry):
            self.entry, self.weights, self.layout = entry, entry.weights, entry.layout

        def tensors(self):
            return change(self.entry.tensors())

    learner._checkpoint = lambda: [Changed(entry) for entry in stored(learner)]


def push_as_before(actor):
    del actor.learner._checkpoint


@pytest.mark.timeout(240)
@pytest.mark.parametrize("change, message", [
    (lambda named: [pair for pair in named if "layers.1.mlp.experts." not in pair[0]],
     r"Qwen3MoeForCausalLM: 2 of its parameters were not written: model.layers.1.mlp.experts.routed_experts.w13_"),
    (lambda named: named + [(f"{name}_bias", tensor.clone()) for name, tensor in named if "0.mlp.gate." in name],
     r"Qwen3MoeForCausalLM: 1 of \d+ pushed tensors were not read: model.layers.0.mlp.gate.weight_bias\.")],
    ids=["experts of a layer left out", "a bias that the model does not have"])
def test_an_engine_that_does_not_take_all_of_a_push_is_refused(mixture, change, message):
    loop = mixture("qwen3_moe")
    for actor in loop.learner.ranks.actors:
        inside(actor, push_instead, change)
    with pytest.raises(InvariantError, match=message):
        loop.learner.push_weights(loop.version + 1)
    with pytest.raises(EngineError, match="did not reach the whole model; rebuild"):
        loop.pool.score([(PROMPTS[0].token_ids, 3)], loop.version + 1)
    for actor in loop.learner.ranks.actors:
        inside(actor, push_as_before)


def what_is_unwritten(engine):
    """Inside an engine's actor: of toys with a tied pair, an encoder and a bias outside the reload, loaded in part."""
    from vllm.model_executor.model_loader.reload import initialize_layerwise_reload, record_metadata_for_reloading

    from frpo.rollout.load_check import unwritten

    class Language(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.first, self.second = (torch.nn.Linear(2, 2, bias=False) for _ in range(3))
            self.head = torch.nn.Linear(2, 2, bias=False)
            self.head.weight = self.embed.weight
            self.router = torch.nn.Module()
            self.router.e_score_correction_bias = torch.nn.Parameter(torch.zeros(2))

    class Seeing(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.eyes, self.language = torch.nn.Linear(2, 2, bias=False), Language()

        def get_language_model(self):
            return self.language

    def missing(model, loaded):
        language = getattr(model, "language", model)
        record_metadata_for_reloading(model)
        language.router.packed = torch.nn.Parameter(torch.zeros(2))  # as a kernel makes of what is loaded
        initialize_layerwise_reload(model)
        for layer in (language.embed, language.second):
            layer.weight.weight_loader(layer.weight, torch.ones(2, 2))
        return unwritten(model, loaded)

    return missing(Language(), None), missing(Language(), ()), missing(Seeing(), None)


@pytest.mark.timeout(60)
def test_what_counts_as_written(loop):
    """A tied pair once, a bias outside the reload by what the model says, and of a model that sees its language alone.
    """
    quiet, told, seeing = inside(loop.pool.engines[0], what_is_unwritten)
    assert quiet == ["first.weight"] and told == ["first.weight", "router.e_score_correction_bias"]
    assert seeing == ["first.weight"]


def training_recipe(loop, folder):
    """Three steps of two updates with the loop's model, ranks and engine."""
    (folder / "reward.py").write_text(REWARD, encoding="utf-8")
    return load_recipe("smoke", [
        "model.tiny=null", f"model.path={loop.model_path}", "model.router_aux_loss_coef=0.05", "model.max_length=64",
        f"learner.deepspeed={loop.recipe.learner.deepspeed}", "learner.num_ranks=2", "run.num_steps=3",
        f"run.dir={folder / 'run'}", "data.heldout=4", "evaluate.every=0", "rollout.prompts_per_step=4",
        "rollout.group_size=4", "rollout.num_engines=1", "rollout.max_new_tokens=8", "learner.lr=1.0e-3",
        "learner.updates_per_step=2", f"rewards=[{{name: spread, function: '{folder}/reward.py:spread'}}]"])


@pytest.mark.timeout(240)
def test_a_probe_of_a_fork_refuses_engines_that_serve_other_weights(mixture, tmp_path):
    loop = mixture("qwen3_moe")
    recipe = training_recipe(loop, tmp_path)
    prompts = check(recipe).prompts
    loop.learner.keep_initial_policy()
    state = RunState(step=0, policy_version=loop.version + 1, data_cursor=0, recipe_digest="", file_offsets={})
    with reward_suite(recipe, prompts) as rewards:
        task = Task(name="kept", recipe=recipe, prompts=prompts, rewards=rewards)

        def probe():
            engines = RecoveringEngines(loop.pool, loop.learner, 0)
            journal = SimpleNamespace(keep_samples=lambda *given: None)
            return TaskProbe(schedule=ProbeSchedule([], 4.0, dict), tasks=[task], exact=None, engines=engines,
                             learner=loop.learner, journal=journal, timer=PhaseTimer())(state, 1)

        with kept_kernels(loop), pytest.raises(InvariantError, match="rollout engine 0 and learner disagree"):
            probe()
        assert probe()["kept/kl"] == 0


@pytest.mark.timeout(240)
def test_training_with_the_auxiliary_loss(mixture, tmp_path):
    loop = mixture("qwen3_moe", coefficient=0.05)
    recipe = training_recipe(loop, tmp_path)
    checked = check(recipe)
    stack = Processes(pool=loop.pool, ranks=loop.learner.ranks, device="cpu")
    with reward_suite(recipe, checked.prompts) as rewards, parts_on(
            stack, recipe, checked, rewards, loop.model_path) as parts:
        Trainer(parts).fit()
    rows = metrics(tmp_path / "run")[1:]
    assert len(rows) == 3
    for row in rows:
        assert row["rollout/logprob_gap_max"] <= LIMIT["fp32"]
        assert 1.9 < row["policy/router_aux"] < 4  # k = 2 where experts are used evenly, 4 where two do all
    start, end = (load_file(folder / "model.safetensors") for folder in (
        Path(loop.model_path), tmp_path / "run" / "export"))
    assert start.keys() == end.keys()
    assert not any(torch.equal(start[name], end[name]) for name in start)


@pytest.mark.timeout(240)
def test_fine_tuning_ends_at_the_loss_of_its_export(mixture, tmp_path):
    loop = mixture("mixtral")
    rows = [{"question": question, "answer": f"it is {answer}"} for question, answer in problems(40, 0)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = load_recipe("finetune_gsm8k", [
        f"run.dir={tmp_path / 'run'}", f"data.path={tmp_path / 'rows.jsonl'}", "model.tiny=null", "objective=sft",
        f"model.path={loop.model_path}", "model.max_length=64", "model.router_aux_loss_coef=0.05",
        f"learner.deepspeed={loop.recipe.learner.deepspeed}", "learner.micro_batch_tokens=128", "learner.ranks=ray",
        "learner.num_ranks=2", "data.limit=40", "data.heldout=8", "data.batch_size=16", "run.num_epochs=1"],
        FinetuneRecipe)
    checked = check_finetune(recipe)
    with finetune_on(loop.learner.ranks, "cpu", recipe, checked, loop.model_path) as parts:
        FineTuner(parts).fit()
    first, *_, last = metrics(tmp_path / "run")
    assert last["eval/nll"] < first["eval/nll"] and 1.9 < last["policy/router_aux"] < 4
    for folder, row in ((loop.model_path, first), (tmp_path / "run" / "export", last)):
        assert plain_nll(folder, checked.examples.heldout) == pytest.approx(row["eval/nll"], abs=1e-5)


def plain_nll(path, examples):
    """Mean over the learned tokens under plain transformers."""
    network = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    assert load_tokenizer(str(path)).vocab_size == network.config.vocab_size
    found = []
    for example in examples:
        with torch.no_grad():
            logprobs_TV = network(input_ids=torch.tensor([example.token_ids])).logits[0].log_softmax(-1)
        found += [-logprobs_TV[i - 1, token].item() for i, token in enumerate(example.token_ids)
                  if example.loss_mask[i]]
    return float(np.mean(found))
