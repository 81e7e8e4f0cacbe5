"""Packed attention is attention of each sequence alone: values and gradients, whatever a family makes of attention."""
import copy
import inspect

import pytest
import torch
from torch.nn.attention.varlen import varlen_attn

from frpo.errors import ModelError
from frpo.learner import attention
from frpo.learner.logits import decoder_of
from small_networks import EXPERTS, VOCABULARY, plain_network

LENGTHS = (1, 7, 2, 5, 12)
TOLERANCE = 5e-5
"""Of float32; a leak shows as tenths."""

FAMILIES = {
    "causal": ("Llama", {}),
    "sliding window": ("Mistral", {"sliding_window": 4}),
    "window that reaches everywhere": ("Mistral", {"sliding_window": 100}),
    "window in some layers": ("Gemma3Text", {"sliding_window": 4, "sliding_window_pattern": 2, "head_dim": 8,
                                             "query_pre_attn_scalar": 8}),
    "cap on scores": ("Gemma2", {"attn_logit_softcapping": 2.0, "sliding_window": 4, "head_dim": 8,
                                 "query_pre_attn_scalar": 8}),
    "sinks": ("GptOss", {"head_dim": 8, "sliding_window": 4, **EXPERTS}),
    "chunks": ("Llama4Text", {"head_dim": 8, "attention_chunk_size": 5, "intermediate_size_mlp": 48, **EXPERTS}),
    "boundaries dropped on the way": ("StableLm", {}),
    "keys and values of one size, low rank": ("DeepseekV3", {
        "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
        "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, **EXPERTS}),
}


@pytest.fixture(autouse=True)
def nothing_arranged():
    yield
    attention.arrange(None)


@pytest.fixture
def token_ids():
    random = torch.Generator().manual_seed(1)
    return [torch.randint(2, VOCABULARY, (length,), generator=random) for length in LENGTHS]


def with_attention(network, name):
    network = copy.deepcopy(network)
    network.set_attn_implementation(name if network._supports_sdpa or name == "sdpa" else attention.EAGER)
    return network


def packed(model, token_ids):
    lengths = tuple(len(ids) for ids in token_ids)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    attention.arrange(attention.Arrangement(lengths=lengths, bounds=bounds.int()))
    positions = torch.cat([torch.arange(length) for length in lengths])
    ids = torch.cat(token_ids)[None]
    return decoder_of(model)(input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=positions[None],
                             use_cache=False).last_hidden_state[0]


def one_by_one(model, token_ids):
    attention.arrange(None)
    return torch.cat([decoder_of(model)(input_ids=ids[None], use_cache=False).last_hidden_state[0]
                      for ids in token_ids])


def gradient(model, output):
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float32)
    model.zero_grad()
    (output * weights).sum().backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


@pytest.mark.parametrize("name", [attention.SDPA, attention.EAGER])
@pytest.mark.parametrize(("family", "changes"), FAMILIES.values(), ids=FAMILIES)
def test_a_pack_is_its_sequences_one_by_one(token_ids, family, changes, name):
    """The judge is the family's own eager attention on one sequence at a time."""
    judge = plain_network(family, **changes)
    ours = with_attention(judge, name)
    alone, together = one_by_one(judge, token_ids), packed(ours, token_ids)
    assert len(attention.arrangement().layers) == 2
    torch.testing.assert_close(together, alone, rtol=0, atol=TOLERANCE)
    wanted = gradient(judge, alone)
    torch.testing.assert_close(gradient(ours, together), wanted, rtol=0, atol=TOLERANCE * float(wanted.abs().max()))


@pytest.mark.parametrize(("family", "changes"), FAMILIES.values(), ids=FAMILIES)
def test_padded_rows_are_sequences_one_by_one(token_ids, family, changes):
    judge = plain_network(family, **changes)
    ours = with_attention(judge, attention.SDPA)
    ids = torch.stack([token_ids[4], torch.cat([token_ids[1], token_ids[3]])])
    mask = torch.tensor([[1] * 12, [1] * 9 + [0] * 3])
    got = decoder_of(ours)(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[mask.bool()]
    torch.testing.assert_close(got, one_by_one(judge, [ids[0], ids[1, :9]]), rtol=0, atol=TOLERANCE)


def reference_kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1),
                     enable_gqa=False):
    """Stands in for torch's flash attention, which needs a GPU: what its documentation says, sequence by sequence."""
    assert cu_seq_q.dtype == torch.int32 and max_q == max_k == max(LENGTHS) and window_size[1] == 0
    outputs = []
    for begin, end in zip(cu_seq_q.tolist(), cu_seq_k.tolist()[1:]):
        q, k, v = (tensor[begin:end].transpose(0, 1) for tensor in (query, key, value))
        ones = torch.ones((end - begin, end - begin), dtype=torch.bool)
        mask = ones.tril() if window_size[0] < 0 else ones.tril() & ones.triu(-window_size[0])
        outputs.append(torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=scale, enable_gqa=enable_gqa).transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize(("family", "calls"), [("causal", 2), ("sliding window", 2), ("window in some layers", 2),
                                               ("window that reaches everywhere", 2), ("chunks", 0), ("sinks", 0),
                                               ("boundaries dropped on the way", 2)])
def test_on_a_gpu_one_kernel_is_asked_for_the_whole_pack_where_it_can_compute_it(token_ids, monkeypatch, family, calls):
    """The kernel's parameters are held against torch's signature; what they mean is its documentation's."""
    asked = []

    def kernel(*arguments, **options):
        inspect.signature(varlen_attn).bind(*arguments, **options)
        asked.append(options["window_size"])
        return reference_kernel(*arguments, **options)

    monkeypatch.setattr(attention, "_has_kernel", lambda query, value: query.shape[-1] == value.shape[-1])
    monkeypatch.setattr(attention, "varlen_attn", kernel)
    name, changes = FAMILIES[family]
    judge = plain_network(name, **changes)
    ours = with_attention(judge, attention.SDPA)
    alone, together = one_by_one(judge, token_ids), packed(ours, token_ids)
    assert len(asked) == calls
    assert set(asked) <= {(-1, 0), (3, 0)}
    assert ((3, 0) in asked) == ("sliding_window" in changes and changes["sliding_window"] == 4 and calls > 0)
    torch.testing.assert_close(together, alone, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(gradient(ours, together), gradient(judge, alone), atol=2e-3, rtol=2e-3)


def test_no_token_sees_another_sequence(token_ids):
    """Change one token of the sequence in the middle: only its own later tokens move."""
    model = with_attention(plain_network("Llama"), attention.SDPA)
    start = sum(LENGTHS[:3])
    changed = [ids.clone() for ids in token_ids]
    changed[3][2] = (changed[3][2] + 1) % VOCABULARY
    moved = (packed(model, token_ids) != packed(model, changed)).any(-1)
    assert moved.nonzero().flatten().tolist() == [start + 2, start + 3, start + 4]


def test_without_a_pack_it_is_transformers_own_sdpa(token_ids):
    ids = torch.stack([token_ids[4], token_ids[4].flip(0)])
    mask = torch.tensor([[1] * 12, [1] * 9 + [0] * 3])
    plain = plain_network("Llama")
    ours, theirs = with_attention(plain, attention.SDPA), with_attention(plain, "sdpa")
    got = ours.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[mask.bool()]
    wanted = theirs.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[mask.bool()]
    assert torch.equal(got, wanted)


def test_what_a_pack_cannot_take_is_refused(token_ids):
    layer = plain_network("Llama").model.layers[0].self_attn
    q, k = torch.zeros(1, 4, 3, 8), torch.zeros(1, 2, 3, 8)
    attention.arrange(attention.Arrangement(lengths=(1, 2), bounds=torch.tensor([0, 1, 3])))
    with pytest.raises(ModelError, match="LlamaAttention passes position_bias to attention.*learner.packing to false"):
        attention.packed_sdpa(layer, q, k, k, None, scaling=1.0, position_bias=torch.zeros(1, 4, 3, 3))
    with pytest.raises(ModelError, match=r"shape \(1, 1, 3, 3\).*learner.packing to false"):
        attention.packed_sdpa(layer, q, k, k, torch.ones(1, 1, 3, 3, dtype=torch.bool), scaling=1.0)


def test_sequences_are_regrouped_so_that_padding_stays_below_a_factor_of_two():
    buckets = attention._buckets((1, 7, 2, 5, 12))
    assert buckets == [([0], [1]), ([1, 10], [7, 5]), ([8], [2]), ([15], [12])]
    assert all(max(lengths) < 2 * min(lengths) for _, lengths in buckets)
