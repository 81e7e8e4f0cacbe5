"""Packed attention is attention of each sequence alone: values and gradients, with and without a sliding window."""
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from frpo.learner import attention

LENGTHS = (1, 7, 2, 5, 12)
TOTAL = sum(LENGTHS)


def network(window, implementation):
    torch.manual_seed(0)
    shape = dict(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3)
    model = (LlamaForCausalLM(LlamaConfig(**shape)) if window is None else
             MistralForCausalLM(MistralConfig(**shape, sliding_window=window)))
    model = model.double().eval()
    model.set_attn_implementation(implementation)
    return model


def packed(model, token_ids):
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0)
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    return model.model(
        input_ids=torch.cat(token_ids)[None], position_ids=positions[None], use_cache=False,
        cu_seq_lens_q=bounds.int(), cu_seq_lens_k=bounds.int(), max_length_q=max(LENGTHS), max_length_k=max(LENGTHS),
    ).last_hidden_state[0]


def gradient(model, output, weights):
    model.zero_grad()
    (output * weights).sum().backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.model.parameters()])


@pytest.fixture
def token_ids():
    random = torch.Generator().manual_seed(1)
    return [torch.randint(0, 50, (length,), generator=random) for length in LENGTHS]


@pytest.mark.parametrize("window", [None, 4, 100])
def test_a_pack_is_its_sequences_one_by_one(token_ids, window):
    """The judge is transformers' own SDPA on one sequence at a time; a window of 4 cuts the longer ones."""
    weights = torch.randn(TOTAL, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    judge, ours = network(window, "sdpa"), network(window, attention.NAME)
    alone = torch.cat([judge.model(input_ids=ids[None], use_cache=False).last_hidden_state[0] for ids in token_ids])
    together = packed(ours, token_ids)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient(ours, together, weights), gradient(judge, alone, weights), rtol=0, atol=1e-11)


def test_no_token_sees_another_sequence(token_ids):
    """Change one token of the sequence in the middle: only its own later tokens move."""
    model = network(None, attention.NAME)
    start = sum(LENGTHS[:3])
    changed = [ids.clone() for ids in token_ids]
    changed[3][2] = (changed[3][2] + 1) % 50
    moved = (packed(model, token_ids) != packed(model, changed)).any(-1)
    assert moved.nonzero().flatten().tolist() == [start + 2, start + 3, start + 4]


def test_without_a_pack_it_is_transformers_own_sdpa(token_ids):
    ids = torch.stack([token_ids[4], token_ids[4].flip(0)])
    mask = torch.tensor([[1] * 12, [1] * 9 + [0] * 3])
    ours, theirs = network(None, attention.NAME), network(None, "sdpa")
    got = ours.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[mask.bool()]
    wanted = theirs.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[mask.bool()]
    assert torch.equal(got, wanted)


def test_sequences_are_regrouped_so_that_padding_stays_below_a_factor_of_two():
    buckets = attention._buckets([0, 1, 8, 10, 15, 27])
    assert buckets == [([0], [1]), ([1, 10], [7, 5]), ([8], [2]), ([15], [12])]
    assert all(max(lengths) < 2 * min(lengths) for _, lengths in buckets)
