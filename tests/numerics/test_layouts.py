"""One batch, every layout, float64: the gradient of a real network's loss does not depend on how it was split.

Ranks are simulated by summing: what they exchange in a run is a sum, which the integration tests drive through
DeepSpeed. The negative control puts group logic into the loss, where a layout can tear a group apart.
"""
from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from frpo.data.batcher import pack
from frpo.data.layout import Layout
from frpo.kernels import LogitScale
from frpo.learner import attention
from frpo.learner.collate import collate
from frpo.learner.losses import MicroBatchLoss, loss_arrays
from frpo.learner.network import TokenModel
from frpo.objectives.base import build_surrogate
from frpo.objectives.correction import RolloutCorrection
from frpo.objectives.frpo import FRPO
from frpo.objectives.surrogate import PolicyLoss
from frpo.types import AdvantagedGroup, Completion, Prompt, RolloutGroup, ScoredGroup

CPU = torch.device("cpu")
LONGEST = 5 + 24
LAYOUTS = [Layout(num_ranks=ranks, micro_batch_tokens=tokens, packed=packed)
           for ranks, tokens in ((1, 10_000), (1, 60), (2, 120), (4, 60), (8, 30)) for packed in (True, False)]
"""Of 24 samples: whole, and 1 x 8, 2 x 4, 4 x 2 and 8 x 3 ranks x micro-batches, roughly."""
ESTIMATOR = FRPO(lam=0.5, scale="exact")


def groups_of(seed: int) -> list[AdvantagedGroup]:
    """3 groups of 8 samples of 1-24 tokens; one has no advantage; old, reference and rollout log-probs differ."""
    random = np.random.default_rng(seed)
    groups = []
    for draw in range(3):
        completions = tuple(
            Completion(text="", token_ids=tuple(map(int, random.integers(0, 40, size=n))), version_spans=(), seed=0,
                       logprobs=tuple(-3.7 + 0.3 * random.normal(size=n)), loss_mask=tuple(random.random(n) < 0.8),
                       finish_reason="stop") for n in random.integers(1, 25, size=8))
        prompt = Prompt(uid=str(draw), messages=(), token_ids=tuple(map(int, random.integers(0, 40, size=5))))
        rewards = random.random(8) if draw != 1 else np.zeros(8)
        rollout = RolloutGroup(group_id=(0, draw), prompt=prompt, completions=completions)
        groups.append(AdvantagedGroup(
            scored=ScoredGroup(group=rollout, rewards_G=rewards, terms={}), stats={},
            advantages_G=ESTIMATOR.advantages(rewards).advantages_G,
            ref_logprobs=tuple(-3.7 + 0.5 * random.normal(size=len(c.token_ids)) for c in completions)))
    return groups


@pytest.fixture(scope="module")
def model() -> TokenModel:
    torch.manual_seed(0)
    network = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.2, tie_word_embeddings=True))
    network.set_attn_implementation(attention.SDPA)
    return TokenModel(network.double())


def loss_of(**settings) -> PolicyLoss:
    return PolicyLoss(surrogate=build_surrogate(settings.pop("surrogate", {"name": "clip"})), kl_coef=0.1,
                      kl_estimator="k3", correction=settings.pop("correction", None))


LOSSES = {
    "clip, KL": loss_of(),
    "clip, token correction": loss_of(correction=RolloutCorrection()),
    "dual clip, masked sequence correction": loss_of(
        surrogate={"name": "clip", "dual_clip": 3.0},
        correction=RolloutCorrection(level="sequence", mode="mask", low=0.1, high=10.0)),
    "gspo": loss_of(surrogate={"name": "gspo", "clip_low": 0.2, "clip_high": 0.2}),
    "cispo": loss_of(surrogate={"name": "cispo"}),
    "reinforce": loss_of(surrogate={"name": "reinforce"}),
}


def gradient(model: TokenModel, loss: PolicyLoss, layout: Layout, groups: list[AdvantagedGroup], old) -> torch.Tensor:
    """The summed gradient of all ranks and micro-batches, flat."""
    model.zero_grad()
    for rank in pack(groups, layout, reduction="seq-mean-token-mean", max_length=24, old_logprobs=old):
        for samples in rank:
            batch = collate(samples, 0, CPU, packed=layout.packed)
            micro = MicroBatchLoss(loss=loss, arrays=loss_arrays(samples, batch, CPU), reference=None, metrics=[])
            model(batch, partial(micro.of_head, target_N=batch.target_N, temperature=0.8,
                                 scale=LogitScale())).backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def spread(gradients: list[torch.Tensor]) -> float:
    """Largest difference to the first, over its norm."""
    return max(((g - gradients[0]).norm() / gradients[0].norm()).item() for g in gradients)


@pytest.mark.parametrize("name", LOSSES)
def test_every_layout_has_the_same_gradient(model, name):
    random = np.random.default_rng(5)
    groups = groups_of(seed=3)
    old = [tuple(-3.7 + 0.3 * random.normal(size=len(c.token_ids)) for c in g.scored.group.completions)
           for g in groups]
    found = spread([gradient(model, LOSSES[name], layout, groups, old) for layout in LAYOUTS])
    print(f"\n{name}: largest relative difference over {len(LAYOUTS)} layouts {found:.1e}")
    assert found < 1e-13


def test_group_logic_inside_the_loss_is_caught(model):
    """The same comparison, with advantages made from the samples that happen to share a micro-batch."""
    groups = groups_of(seed=3)

    def torn(layout: Layout) -> torch.Tensor:
        model.zero_grad()
        rewards = {(0, g.scored.group.group_id[1], i): r for g in groups for i, r in enumerate(g.scored.rewards_G)}
        for rank in pack(groups, layout, reduction="seq-mean-token-mean", max_length=24):
            for samples in rank:
                batch = collate(samples, 0, CPU, packed=layout.packed)
                arrays = loss_arrays(samples, batch, CPU)
                for draw in range(3):
                    here = [s for s in samples if s.sample_id[1] == draw and s.sample_id in rewards]
                    values = ESTIMATOR.advantages(np.array([rewards[s.sample_id] for s in here])).advantages_G
                    for sample, value in zip(here, values):
                        arrays["advantage_N"][batch.sequence_N == samples.index(sample)] = float(value)
                micro = MicroBatchLoss(loss=loss_of(), arrays=arrays, reference=None, metrics=[])
                model(batch, partial(micro.of_head, target_N=batch.target_N, temperature=0.8,
                                 scale=LogitScale())).backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    whole, *split = [torn(layout) for layout in LAYOUTS]
    torch.testing.assert_close(whole, gradient(model, loss_of(), LAYOUTS[0], groups, None), rtol=1e-12, atol=1e-14)
    assert spread([whole, *split]) > 0.1
