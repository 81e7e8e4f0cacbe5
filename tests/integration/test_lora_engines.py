"""LoRA on real engines: what is pushed and exported is what is trained, the base never moves, a resume is exact.

Two learner ranks, partitioned or not, and one engine, rebuilt in the processes of the loop that other tests share.
"""
from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from frpo.data.batcher import pack
from frpo.errors import EngineError
from frpo.run.checks import MovementWatch, check_movement
from loop import GREEDY, flat, hand_made_groups, inside, random_prompts
from parity_matrix import LIMIT, Combination, recipe_for

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # actors cannot import from the tests' folder

STEPS = 20
COMBINATIONS = [
    Combination(family="qwen2", tied=True, dtype="fp32", stage=3, checkpointing=True, lora=True),
    Combination(family="qwen2", tied=False, dtype="bf16", stage=2, lora=True),
]


@pytest.fixture(scope="module")
def borrowed(loop):
    """The loop that other tests share, given back as it was."""
    recipe, path = loop.recipe, loop.model_path
    yield loop
    loop.become(recipe, path)


def base_digest(actor):
    """Inside a rank: what it holds of the frozen parameters, as bytes."""
    import hashlib

    digest, frozen = hashlib.sha256(), 0
    for parameter in actor.learner.network.parameters():
        if not parameter.requires_grad:
            held = getattr(parameter, "ds_tensor", parameter).detach().contiguous()
            digest.update(held.view(torch.uint8).numpy().tobytes())
            frozen += 1
    return digest.hexdigest(), frozen


def scores(loop, groups, model):
    return flat(loop.learner.score_groups(groups, model, temperature=1.0))


@pytest.fixture(scope="module", params=COMBINATIONS, ids=lambda c: "-".join(str(c).split()))
def trained(request, borrowed, tmp_path_factory):
    """(the loop after STEPS pushed steps, its combination, what was seen on the way, a folder)."""
    loop, combination, folder = borrowed, request.param, tmp_path_factory.mktemp("lora")
    recipe, path = recipe_for(combination, folder)
    loop.become(recipe, path)
    probe = random_prompts(8, 48, seed=99)
    loop.push()
    groups = loop.sample(probe)
    actors = loop.learner.ranks.actors
    seen = {"groups": groups, "gap": [loop.gap(probe)], "base": [inside(a, base_digest) for a in actors],
            "policy": [scores(loop, groups, "policy")], "reference": [scores(loop, groups, "reference")]}
    for step in range(STEPS):
        watch = step in (0, 1)
        loop.update(random_prompts(8, 40, seed=step), watch_movement=watch)
        if watch:
            seen[f"movement {step}"] = loop.learner.movement_report()
        if step == STEPS // 2:
            seen["reference"].append(scores(loop, groups, "reference"))
        if step == STEPS - 1:
            seen["gap"].append(loop.gap(probe))
        loop.push()
    seen["gap"].append(loop.gap(probe))
    seen["policy"].append(scores(loop, groups, "policy"))
    seen["reference"].append(scores(loop, groups, "reference"))
    seen["base"] += [inside(a, base_digest) for a in actors]
    return loop, combination, seen, folder


@pytest.mark.timeout(240)
def test_engine_and_learner_agree_after_every_push_was_merged(trained):
    _, combination, seen, _ = trained
    before, stale, after = seen["gap"]
    limit = LIMIT[combination.dtype]
    print(f"\n{combination} before {before:.2e} stale {stale:.2e} after {after:.2e}")
    assert before <= limit and after <= limit
    assert stale > 3 * limit  # one push left out shows


def test_the_reference_is_the_policy_of_the_start_to_the_bit(trained):
    _, _, seen, _ = trained
    for reference in seen["reference"]:
        assert np.array_equal(reference, seen["policy"][0])
    assert np.abs(seen["policy"][1] - seen["policy"][0]).max() > 0.5


def test_no_rank_changed_a_bit_of_the_base(trained):
    _, combination, seen, _ = trained
    ranks = len(seen["base"]) // 2
    assert seen["base"][:ranks] == seen["base"][ranks:]
    assert seen["base"][0][1] == (26 if combination.tied else 27)
    if combination.stage == 3:
        assert len(set(seen["base"][:ranks])) == ranks  # each holds another part


def test_the_second_update_moves_every_factor_where_the_first_cannot(trained):
    loop, _, seen, _ = trained
    assert MovementWatch(loop.recipe).signals_left == 2
    down = {name for name in seen["movement 0"] if ".lora_A." in name}
    assert len(down) == 14 == len(seen["movement 0"]) / 2
    assert {name for name, (has_gradient, _) in seen["movement 0"].items() if not has_gradient} == down
    check_movement(seen["movement 1"])


def test_export_and_adapter_folder_are_the_trained_policy(trained):
    loop, combination, seen, folder = trained
    loop.learner.export(str(folder / "export"))
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[combination.dtype]
    assert load_file(folder / "export" / "model.safetensors").keys() == load_file(
        folder / "model" / "model.safetensors").keys()
    merged = AutoModelForCausalLM.from_pretrained(folder / "export", dtype=dtype)
    base = AutoModelForCausalLM.from_pretrained(loop.model_path, dtype=dtype)
    by_peft = PeftModel.from_pretrained(base, folder / "export" / "adapter")
    assert by_peft.peft_config["default"].base_model_name_or_path == loop.model_path
    limit = LIMIT[combination.dtype]
    group = seen["groups"][0]
    for network in (merged, by_peft):
        given = np.concatenate([logprobs_of(network, group, c) for c in group.completions])
        assert np.abs(given - seen["policy"][1][:len(given)]).max() <= limit
    for name, tensor in load_file(folder / "export" / "adapter" / "adapter_model.safetensors").items():
        assert name.startswith("base_model.model.model.layers.") and tensor.abs().max() > 0
        assert tensor.dtype == dtype


@pytest.mark.timeout(240)
@pytest.mark.parametrize("backend", ["cpu_shm", "gloo"])
def test_adapters_pushed_alone_make_the_same_policy(borrowed, tmp_path, backend):
    """vLLM adds them to the model that it has loaded; a push that is left out or breaks off shows."""
    recipe, path = recipe_for(COMBINATIONS[0], tmp_path)
    section = recipe.weight_sync.model_copy(update={"adapters": True, "backend": backend})
    borrowed.become(recipe.model_copy(update={"weight_sync": section}), path)
    probe, short, gaps, stale = random_prompts(8, 48, seed=99), random_prompts(6, 20, seed=1), [], []
    for step in range(4):
        borrowed.push()
        gaps.append(borrowed.gap(probe))
        for seed in (step, step + 10):  # the first update after the start moves one factor of two
            borrowed.update(random_prompts(8, 40, seed=seed))
        stale.append(borrowed.gap(probe))
    print(f"\nadapters over {backend}: {max(gaps):.2e}, stale {min(stale):.2e}")
    assert max(gaps) <= LIMIT["fp32"] and min(stale) > 3 * LIMIT["fp32"]
    version, old = borrowed.pool.policy_versions(), greedy(borrowed, short)
    client = inside(borrowed.learner.ranks.actors[0], cut_short)
    with pytest.raises(EngineError, match="cut on purpose"):
        borrowed.learner.push_weights(borrowed.version + 1)
    inside(borrowed.learner.ranks.actors[0], mended)
    assert client == "EngineClient" and borrowed.pool.policy_versions() == version
    assert greedy(borrowed, short) == old
    borrowed.push()
    assert greedy(borrowed, short) != old
    assert borrowed.gap(probe) <= LIMIT["fp32"]
    assert inside(borrowed.pool.engines[0], lambda engine: engine.pushed_adapters) == 5
    assert not list(Path("/dev/shm").glob("frpo-adapters-*"))


def greedy(loop, prompts):
    """Tokens and log-probs at the version in force: equal to the bit if the weights are."""
    return [(c.token_ids.tolist(), c.logprobs.tolist()) for group in loop.sample(prompts, GREEDY)
            for c in group.completions]


def cut_short(actor):
    """Let the next push fail when all of it has arrived."""
    client = actor.learner.sender.client

    class Cut:
        def __getattr__(self, name):
            if name == "finish_weight_update":
                raise RuntimeError("cut on purpose")
            return getattr(client, name)

    actor.learner.sender.client, actor.whole_client = Cut(), client
    return type(client).__name__


def mended(actor):
    actor.learner.sender.client = actor.whole_client


def logprobs_of(network, group, completion):
    """Of the completion's tokens under a plain model."""
    prompt, tokens = group.prompt.token_ids, tuple(completion.token_ids.tolist())
    with torch.no_grad():
        logits_TV = network(input_ids=torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1:-1].float()
    return logits_TV.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0].numpy()


def test_a_resume_is_exact_without_the_base_in_the_checkpoint(trained):
    loop, _, seen, folder = trained
    loop.learner.save(str(folder / "saved"))
    went_on = next_updates(loop)
    loop.become(loop.recipe, loop.model_path)
    assert np.array_equal(scores(loop, seen["groups"], "policy"), seen["policy"][0])  # it starts anew
    assert loop.learner.load(str(folder / "saved")) == STEPS
    assert np.array_equal(scores(loop, seen["groups"], "policy"), seen["policy"][1])
    assert np.array_equal(scores(loop, seen["groups"], "reference"), seen["reference"][0])
    assert np.array_equal(next_updates(loop), went_on)
    for file in (folder / "saved").rglob("*model_states.pt"):
        state = torch.load(file, weights_only=False)
        held = {name for name, tensor in state["module"].items() if tensor.numel() and ".lora_" not in name}
        assert held <= {"head.weight", "network.lm_head.weight"} and state["frozen_param_fragments"] is None


def next_updates(loop):
    """Three updates on fixed samples and what the policy then says of them."""
    groups = hand_made_groups()
    for _ in range(3):
        loop.learner.forward_backward(
            pack(groups, loop.learner.layout, reduction="seq-mean-token-mean", max_length=16))
        loop.learner.optim_step(1000)
    return scores(loop, [group.scored.group for group in groups], "policy")
