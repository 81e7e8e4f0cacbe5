"""Rotary frequencies that depend on length follow each sequence's own, packed or padded, whatever came before."""
import pytest
import torch

from frpo.errors import ModelError
from frpo.learner import attention
from frpo.learner.rotary import follow_own_lengths, scale_within_sequences
from small_networks import VOCABULARY, plain_network

ORIGINAL = 8
LENGTHS = (3, 20, 8, 9, 12)
LONGROPE = ("Phi3", {"original_max_position_embeddings": ORIGINAL, "resid_pdrop": 0.0, "rope_parameters": dict(
    rope_type="longrope", rope_theta=10000.0, partial_rotary_factor=1.0, short_factor=[1.0] * 4,
    long_factor=[4.0, 3.0, 2.0, 5.0], original_max_position_embeddings=ORIGINAL)})
DYNAMIC = ("Llama", {"max_position_embeddings": ORIGINAL, "rope_parameters": dict(
    rope_type="dynamic", rope_theta=10000.0, factor=4.0)})


@pytest.fixture(autouse=True)
def nothing_arranged():
    yield
    attention.arrange(None)


@pytest.fixture
def token_ids():
    random = torch.Generator().manual_seed(1)
    return [torch.randint(2, VOCABULARY, (length,), generator=random) for length in LENGTHS]


def alone(family, changes, ids):
    """A network that has computed nothing before."""
    return plain_network(family, **changes).model(input_ids=ids[None], use_cache=False).last_hidden_state[0]


@pytest.mark.parametrize(("family", "changes"), [LONGROPE, DYNAMIC], ids=["longrope", "dynamic"])
@pytest.mark.parametrize("packs", [True, False])
def test_every_sequence_has_the_frequencies_of_its_own_length(token_ids, family, changes, packs):
    network = plain_network(family, **changes)
    follow_own_lengths(network)
    network.set_attn_implementation(attention.SDPA)
    wanted = [alone(family, changes, ids) for ids in token_ids]
    if packs:
        ids = torch.cat(token_ids)[None]
        bounds = torch.tensor([0, *LENGTHS]).cumsum(0).int()
        options = {"position_ids": torch.cat([torch.arange(length) for length in LENGTHS])[None]}
        real = torch.ones_like(ids)
    else:
        ids = torch.nn.utils.rnn.pad_sequence(token_ids, batch_first=True)
        bounds, options, real = None, {}, (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    attention.arrange(attention.Arrangement(lengths=LENGTHS, bounds=bounds))
    for _ in range(2):  # the second pass begins with what the first has left behind
        found = network.model(input_ids=ids, attention_mask=real, use_cache=False, **options).last_hidden_state
        torch.testing.assert_close(found[real.bool()], torch.cat(wanted), rtol=0, atol=5e-5)


LLAMA4 = ("Llama4Text", {
    "head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2, "num_experts_per_tok": 1, "floor_scale": 21,
    "attn_scale": 2.0, "no_rope_layers": [0, 0], "attention_chunk_size": 64})


def test_a_scale_by_place_in_the_pack_is_left_out_below_its_beginning(token_ids):
    """The pack of 52 tokens passes the 21 at which it begins, none of its sequences does."""
    def packed_states(network):
        attention.arrange(attention.Arrangement(
            lengths=LENGTHS, bounds=torch.tensor([0, *LENGTHS]).cumsum(0).int()))
        places = torch.cat([torch.arange(length) for length in LENGTHS])[None]
        ids = torch.cat(token_ids)[None]
        return network.model(input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=places, use_cache=False
                             ).last_hidden_state[0]

    network = plain_network(LLAMA4[0], **LLAMA4[1])
    wanted = torch.cat([alone(*LLAMA4, ids) for ids in token_ids])
    network.set_attn_implementation(attention.SDPA)
    assert (packed_states(network) - wanted).abs().max() > 1e-3, "which is what transformers does"
    scale_within_sequences(network, max(LENGTHS))
    torch.testing.assert_close(packed_states(network), wanted, rtol=0, atol=5e-5)


def test_a_scale_by_place_is_refused_where_sequences_reach_it():
    network = plain_network(LLAMA4[0], **LLAMA4[1])
    with pytest.raises(ModelError, match=r"scales queries from 21 tokens on, .* lower model.max_length \(21\)"):
        scale_within_sequences(network, 21)


def test_without_an_arrangement_what_came_before_is_forgotten(token_ids):
    network = plain_network(DYNAMIC[0], **DYNAMIC[1])
    follow_own_lengths(network)
    network.model(input_ids=token_ids[1][None], use_cache=False)
    found = network.model(input_ids=token_ids[3][None], use_cache=False).last_hidden_state[0]
    torch.testing.assert_close(found, alone(*DYNAMIC, token_ids[3]), rtol=0, atol=5e-5)


def test_transformers_itself_follows_the_longest_and_the_past(token_ids):
    """The reason for all this: without it the second sequence is another one after a longer."""
    network = plain_network(DYNAMIC[0], **DYNAMIC[1])
    network.model(input_ids=token_ids[1][None], use_cache=False)
    found = network.model(input_ids=token_ids[3][None], use_cache=False).last_hidden_state[0]
    assert (found - alone(*DYNAMIC, token_ids[3])).abs().max() > 1e-3
