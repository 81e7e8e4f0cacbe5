"""The load-balancing loss of experts: transformers' number and gradient, and the same for every layout of an update."""
from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from test_layouts import CPU, LAYOUTS, groups_of, loss_of, spread
from transformers import MixtralConfig, MixtralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from frpo.config.model import ModelSection
from frpo.data.batcher import pack
from frpo.data.layout import Layout, is_padding
from frpo.errors import ModelError
from frpo.kernels import LogitScale
from frpo.learner import attention
from frpo.learner.collate import collate
from frpo.learner.losses import MicroBatchLoss, loss_arrays
from frpo.learner.model import checkpoint_layers
from frpo.learner.network import TokenModel
from frpo.learner.router import ExpertUse, RouterTerm, UseCounter, balance_coefficient, counted_tokens
from frpo.telemetry.sums import MetricSums

COEFFICIENT = 0.3
SHAPE = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "initializer_range": 0.2,
         "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}


def mixture(**settings) -> TokenModel:
    torch.manual_seed(0)
    network = MixtralForCausalLM(MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2, **settings))
    network.set_attn_implementation(attention.SDPA)
    network.set_experts_implementation("eager")  # others have no float64
    return TokenModel(network.double())


@pytest.fixture(scope="module")
def model() -> TokenModel:
    return mixture()


def update(model, layout, *, balanced=True):
    """The gradient of one update, flat, and its metrics; as `Learner.forward_backward` makes it."""
    model.zero_grad()
    micro_batches = [samples for rank in pack(groups_of(seed=3), layout, reduction="seq-mean-token-mean",
                                              max_length=24) for samples in rank]
    counter, parts, loss = UseCounter(2), [], loss_of()
    batches = [collate(samples, 0, CPU, packed=layout.packed) for samples in micro_batches]
    counted = [counted_tokens(samples, batch) for samples, batch in zip(micro_batches, batches)]
    with torch.no_grad():
        for batch, counted_M in zip(batches, counted):
            model(batch, lambda hidden_ND, head_VD: None, partial(counter.add, counted_M=counted_M))
    use = counter.over_all_ranks()
    for samples, batch, counted_M in zip(micro_batches, batches, counted):
        micro = MicroBatchLoss(loss=loss, arrays=loss_arrays(samples, batch, CPU), reference=None, metrics=parts)
        term = RouterTerm(use=use, coefficient=COEFFICIENT, counted_M=counted_M, metrics=parts) if balanced else None
        model(batch, partial(micro.of_head, target_N=batch.target_N, temperature=0.8, scale=LogitScale()),
              term).backward()
    metrics = MetricSums()
    for part in parts:
        metrics.update(part)
    flat = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    return flat, metrics.result(), any(is_padding(s) for samples in micro_batches for s in samples)


def test_every_layout_has_the_same_gradient_and_number(model):
    more_ranks_than_samples = [Layout(num_ranks=25, micro_batch_tokens=60, packed=packed) for packed in (True, False)]
    layouts = [*LAYOUTS, *more_ranks_than_samples]
    gradients, metrics, padded = zip(*(update(model, layout) for layout in layouts))
    assert padded[-2:] == (True, True)  # samples that only keep ranks in step count for nothing
    assert spread(list(gradients)) < 1e-12
    assert [m["policy/router_aux"] for m in metrics] == pytest.approx([metrics[0]["policy/router_aux"]] * len(layouts))
    assert spread([update(model, LAYOUTS[0], balanced=False)[0], gradients[0]]) > 1e-2  # and it has a part in it


def test_it_is_the_loss_of_transformers(model):
    """On all sequences of an update as one padded batch, whose padding counts for neither."""
    layout = LAYOUTS[1]
    assert not layout.packed and layout.num_ranks == 1
    (samples,), = pack(groups_of(seed=3), layout, reduction="seq-mean-token-mean", max_length=24)
    batch = collate(samples, 0, CPU, packed=False)
    model.zero_grad()
    attention.arrange(None)
    expected = model.network(input_ids=batch.token_ids_BL, attention_mask=batch.attention_mask_BL,
                             output_router_logits=True).aux_loss
    expected.backward()
    theirs = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()])
    with_it, metrics, _ = update(model, layout)
    without, _, _ = update(model, layout, balanced=False)
    assert metrics["policy/router_aux"] == pytest.approx(expected.item(), rel=1e-6)
    assert spread([COEFFICIENT * theirs, with_it - without]) < 1e-5  # transformers adds up in float32


def test_layers_that_are_computed_again_have_the_same_gradient(model):
    again = mixture()
    checkpoint_layers(again.network)
    assert spread([update(model, LAYOUTS[4])[0], update(again, LAYOUTS[4])[0]]) < 1e-12


def test_by_hand():
    """Three of four tokens prefer expert 0 by odds of 3 to 1, one expert 1; a fifth is padding. f = (3/4, 1/4),
    P = (5/8, 3/8), so 2 (15/32 + 3/32) = 9/8; even use would give 1.
    """
    logits_ME = torch.tensor([[math.log(3.0), 0.0]] * 3 + [[0.0, math.log(3.0)], [9.0, 0.0]])
    counted_M = torch.tensor([True] * 4 + [False])
    counter = UseCounter(1)
    assert counter.add("answer", (logits_ME, logits_ME), counted_M=counted_M) == "answer"
    use = counter.over_all_ranks()
    assert use.share_E.tolist() == [0.75, 0.25] and use.rows == 8.0
    parts = []
    term = RouterTerm(use=use, coefficient=0.5, counted_M=counted_M, metrics=parts)
    assert term(torch.tensor(7.0), (logits_ME, logits_ME)).item() == pytest.approx(7.0 + 0.5 * 9 / 8)
    metrics = MetricSums()
    metrics.update(parts[0])
    assert metrics.result() == {"policy/router_aux": pytest.approx(9 / 8)}
    even = RouterTerm(use=ExpertUse(share_E=torch.full((2,), 0.5), rows=8.0), coefficient=1.0, counted_M=counted_M,
                      metrics=parts)
    assert even(torch.tensor(0.0), (logits_ME * 0, logits_ME * 0)).item() == pytest.approx(1.0)


@pytest.mark.parametrize("asked, given, coefficient", [
    (False, None, 0.0), (True, None, 0.02), (True, 0.0, 0.0), (False, 0.5, 0.5), (True, 0.5, 0.5)])
def test_whose_coefficient_it_is(asked, given, coefficient):
    network = mixture(output_router_logits=asked, router_aux_loss_coef=0.02).network
    section = ModelSection(path="somewhere", router_aux_loss_coef=given)
    assert balance_coefficient(section, network) == coefficient


def test_a_model_without_experts_has_no_such_loss():
    network = Qwen2ForCausalLM(Qwen2Config(**SHAPE))
    for given in (None, 0.0):
        assert balance_coefficient(ModelSection(path="somewhere", router_aux_loss_coef=given), network) == 0.0
    with pytest.raises(ModelError, match=r"router_aux_loss_coef = 0.1, .* for Qwen2ForCausalLM; set it to null"):
        balance_coefficient(ModelSection(path="somewhere", router_aux_loss_coef=0.1), network)


@pytest.mark.parametrize(("router_logits", "message"), [
    ((), "no layer with experts.*model.router_aux_loss_coef to null"),
    ((torch.zeros(10, 2),), "10 rows for 5 tokens.*model.router_aux_loss_coef to 0")])
def test_routers_of_another_kind_are_refused(router_logits, message):
    with pytest.raises(ModelError, match=message):
        UseCounter(1).add("answer", router_logits, counted_M=torch.ones(5, dtype=torch.bool))
