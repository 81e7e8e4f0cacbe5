"""The learner's model against plain transformers: equal where all is right, refused with its cause where it is not."""
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from frpo.errors import ModelError
from frpo.learner import attention
from frpo.learner.collate import collate
from frpo.learner.guard import compare
from frpo.run.checks import PROBED_TOKENS, check_same_function, probe_sequences
from small_networks import EXPERTS, SPARSE, VOCABULARY, learners_model, plain_network, saved

CPU = torch.device("cpu")
SEQUENCES = [torch.randint(2, VOCABULARY, (length,), generator=torch.Generator().manual_seed(length)).tolist()
             for length in (5, 40, 13, 24)]
RECIPE = SimpleNamespace(checks=SimpleNamespace(same_function=True),
                         model=SimpleNamespace(dtype="fp32", max_length=64))
ITEMS = SimpleNamespace(heldout=(), train=tuple(SimpleNamespace(token_ids=tuple(ids)) for ids in SEQUENCES))

FAMILIES = {
    "scale of logits": ("Granite", {"logits_scaling": 8.0}),
    "caps": ("Gemma2", {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "head_dim": 8}),
    "dropout of its own": ("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.3, "layerdrop": 0.5}),
    "jitter": ("Mixtral", {"router_jitter_noise": 0.3, "sliding_window": None, **EXPERTS}),
    "boundaries dropped on the way": ("StableLm", {}),
}


@pytest.fixture(autouse=True)
def nothing_arranged():
    yield
    attention.arrange(None)


def model_of(tmp_path, family, changes, **options):
    return learners_model(saved(plain_network(family, **changes), tmp_path), **options)


class Ranks:
    """What `LearnerGroup.compare` gives of learners that hold these models."""

    def __init__(self, *models, packed=True):
        self.models, self.packed = models, packed

    def compare(self, sequences):
        self.sequences = sequences
        lay_out = partial(collate, pad_id=0, device=CPU, packed=self.packed)
        return [[compare("policy", model, sequences, lay_out)] for model in self.models]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("family", "changes"), FAMILIES.values(), ids=FAMILIES)
def test_the_learner_computes_what_transformers_computes(tmp_path, family, changes, packed):
    model = model_of(tmp_path, family, changes)
    model.train()  # as DeepSpeed's engine does
    found = compare("policy", model, SEQUENCES, partial(collate, pad_id=0, device=CPU, packed=packed))
    assert max(found.together[1], found.alone[1]) < 1e-4 and found.repeated == (0.0, 0.0)
    assert found.packed == packed and found.layers_apart == (2 if packed else 0)
    check_same_function(Ranks(model, packed=packed), RECIPE, ITEMS)


def refused(model, **options):
    with pytest.raises(ModelError) as error:
        check_same_function(Ranks(model, **options), RECIPE, ITEMS)
    return str(error.value)


def test_a_scale_that_is_forgotten_is_refused(tmp_path):
    model = model_of(tmp_path, *FAMILIES["scale of logits"])
    model.head.scale = replace(model.head.scale, temperature=1.0)
    assert "the policy on learner rank 0 computes another function in the learner than in plain" in refused(model)


def test_a_cap_that_is_forgotten_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(attention, "HARMLESS", attention.HARMLESS | {"softcap"})
    message = refused(model_of(tmp_path, *FAMILIES["caps"]))
    assert "another function" in message and "model.attn_implementation: eager" in message


@pytest.mark.parametrize("family", ["dropout of its own", "jitter"])
def test_noise_is_refused(tmp_path, family):
    model = model_of(tmp_path, *FAMILIES[family])
    torch.nn.Module.train(model, True)
    assert "gives different log-probabilities in two equal passes" in refused(model)


def test_boundaries_that_are_lost_are_refused(tmp_path, monkeypatch):
    model = model_of(tmp_path, *FAMILIES["boundaries dropped on the way"])
    monkeypatch.setattr(attention, "_pack", lambda: None)
    message = refused(model)
    assert "only 0 of its 2 layers" in message and "Set learner.packing to false." in message


@pytest.mark.parametrize(("family", "changes", "apart"), [
    ("Lfm2", {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}, 1),
    ("Mamba", {}, 0),
    ("Falcon", {"new_decoder_architecture": False, "multi_query": True}, 0)])
def test_layers_that_carry_state_are_padded_or_refused(tmp_path, family, changes, apart):
    model = model_of(tmp_path, family, changes)
    message = refused(model)
    assert f"only {apart} of its 2 layers" in message and "Set learner.packing to false." in message
    check_same_function(Ranks(model, packed=False), RECIPE, ITEMS)


def test_state_beside_attention_in_one_layer_is_refused_by_its_numbers(tmp_path):
    model = model_of(tmp_path, "FalconH1", {"mamba_d_ssm": 32, "mamba_n_heads": 2, "mamba_d_head": 16})
    message = refused(model)
    assert "in a micro-batch than alone" in message and "Set learner.packing to false." in message
    check_same_function(Ranks(model, packed=False), RECIPE, ITEMS)


@pytest.mark.parametrize(("family", "changes"), [
    ("DeepseekV32", SPARSE),
    ("DeepseekV4", {"head_dim": 16, "q_lora_rank": 16, "n_routed_experts": 4, "num_experts_per_tok": 2,
                    "moe_intermediate_size": 16, "num_hidden_layers": 3, "sliding_window": 8, "o_groups": 2,
                    "o_lora_rank": 8, "index_n_heads": 16, "index_head_dim": 16, "index_topk": 2,
                    "layer_types": ["sliding_attention", "compressed_sparse_attention",
                                    "heavily_compressed_attention"]})])
def test_attention_that_changes_its_own_mask_is_right_when_padded(tmp_path, family, changes):
    """Only some tokens are met, by a mask of the model's own beside the causal one."""
    model = model_of(tmp_path, family, changes)
    check_same_function(Ranks(model, packed=False), RECIPE, ITEMS)
    with pytest.raises(ModelError, match="[Ss]et learner.packing to false"):
        check_same_function(Ranks(model), RECIPE, ITEMS)


@pytest.mark.parametrize("packed", [True, False])
def test_a_model_that_sees_what_comes_is_refused(tmp_path, packed):
    model = model_of(tmp_path, "Gemma3Text", {"use_bidirectional_attention": True, "head_dim": 8})
    message = refused(model, packed=packed)
    assert "is no causal language model" in message and "use_bidirectional_attention" in message


def test_a_failure_of_the_model_s_own_code_is_refused_with_what_it_says(tmp_path, monkeypatch):
    """Of any class, in one sequence or in several."""
    model = model_of(tmp_path, "Llama", {})
    forward = model.network.model.layers[0].forward

    def fails_beyond(length):
        def layer(hidden, **options):
            assert hidden.shape[1] <= length, "too long"
            return forward(hidden, **options)
        monkeypatch.setattr(model.network.model.layers[0], "forward", layer)

    fails_beyond(64)
    assert "cannot compute several sequences at once (AssertionError: too long). Set learner.packing" in refused(model)
    fails_beyond(4)
    message = refused(model)
    assert "cannot compute one sequence (AssertionError: too long)" in message and "packing" not in message


def test_shapes_that_a_layer_cannot_take_are_refused(tmp_path):
    model = model_of(tmp_path, "Doge", {})
    message = refused(model)
    assert "cannot compute several sequences at once (" in message and "Set learner.packing to false." in message
    check_same_function(Ranks(model, packed=False), RECIPE, ITEMS)


def test_a_rank_with_other_weights_than_plain_is_named(tmp_path):
    right, wrong = (model_of(tmp_path / name, "Llama", {}) for name in "ab")
    wrong.head.weight = torch.nn.Parameter(wrong.head.weight + 0.1 * torch.randn(wrong.head.weight.shape))
    with pytest.raises(ModelError, match="the policy on learner rank 1 computes another function"):
        check_same_function(Ranks(right, wrong), RECIPE, ITEMS)


def test_the_check_can_be_switched_off(tmp_path):
    off = SimpleNamespace(checks=SimpleNamespace(same_function=False))
    check_same_function(None, off, ITEMS)


def test_sequences_differ_in_length_and_the_last_joins_the_others():
    items = [range(length) for length in (7, 3, 1, 9, 4)]
    assert [len(ids) for ids in probe_sequences(items, 100)] == [3, 7, 9, 100]
    assert probe_sequences(items, 5)[0] == [0, 1, 2]
    assert [len(ids) for ids in probe_sequences(items, 5)] == [3, 5, 5, 5]
    assert probe_sequences([range(2000)], 4000)[0] == list(range(PROBED_TOKENS))
    assert probe_sequences([[8], [9]], 4) == [[8, 9, 8, 9]]
