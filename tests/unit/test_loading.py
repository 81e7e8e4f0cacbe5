"""What loading makes of a network: no noise, layers recomputed, buffers in full precision, attention that fits."""
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, XLNetConfig

from frpo.config.model import ModelSection
from frpo.errors import ModelError
from frpo.learner import attention, model
from frpo.learner.buffers import restore_buffers
from frpo.learner.model import check_family, check_model_path, load_model
from small_networks import EXPERTS, LATENT, SPARSE, learners_model, plain_network, saved

IDS = torch.arange(2, 20)[None]


@pytest.fixture(autouse=True)
def nothing_arranged():
    attention.arrange(None)
    yield
    attention.arrange(None)


@pytest.mark.parametrize(("family", "changes", "asked", "wanted"), [
    ("Llama", {}, "sdpa", attention.SDPA), ("Llama", {}, "eager", attention.EAGER),
    ("GptOss", {"head_dim": 8, **EXPERTS}, "sdpa", attention.EAGER),
    ("DeepseekV32", SPARSE, "sdpa", "eager"),  # it is sparse under the names of transformers alone
    ("Falcon", {}, "sdpa", "sdpa"), ("Falcon", {}, "eager", "eager"), ("Mpt", {"d_model": 32, "n_heads": 4,
                                                                              "n_layers": 2}, "sdpa", "eager")])
def test_attention_is_ours_where_a_family_lets_it_be_chosen(tmp_path, family, changes, asked, wanted):
    path = saved(plain_network(family, **changes), tmp_path)
    network = learners_model(path, model={"attn_implementation": asked}).network
    assert network.config._attn_implementation == wanted


def test_a_model_is_never_in_training_mode(tmp_path):
    learned = learners_model(saved(plain_network("GPTNeoX", hidden_dropout=0.5, attention_dropout=0.5), tmp_path))
    learned.train()
    assert not any(module.training for module in learned.modules())
    assert learned.network.config.hidden_dropout == 0.5  # the export is the model it was


def test_recomputed_layers_have_the_same_gradient(tmp_path):
    path = saved(plain_network("OPT", ffn_dim=48, word_embed_proj_dim=32, dropout=0.5), tmp_path)
    gradients, passes = [], []
    for recompute in (False, True):
        network = learners_model(path, gradient_checkpointing=recompute).network
        count = [0]
        network.model.decoder.layers[0].fc1.register_forward_hook(lambda *_, count=count: count.__setitem__(
            0, count[0] + 1))
        network(input_ids=IDS).logits.square().mean().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in network.parameters()]))
        passes.append(count[0])
    assert passes == [1, 2]
    assert torch.equal(*gradients)


def test_a_pack_is_recomputed_with_its_boundaries(tmp_path):
    """StableLM does not hand them on, and autograd recomputes layers long after the forward pass."""
    path, gradients = saved(plain_network("StableLm"), tmp_path), []
    bounds, positions = torch.tensor([0, 7, 18]).int(), torch.cat([torch.arange(7), torch.arange(11)])[None]
    for recompute in (False, True):
        network = learners_model(path, gradient_checkpointing=recompute).network
        attention.arrange(attention.Arrangement(lengths=(7, 11), bounds=bounds))
        network(input_ids=IDS, attention_mask=torch.ones_like(IDS), position_ids=positions, use_cache=False
                ).logits.square().mean().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in network.parameters()]))
    attention.arrange(None)
    assert torch.equal(*gradients)


def test_a_family_without_layers_to_recompute_is_refused(tmp_path):
    path = saved(plain_network("CTRL", n_embd=32, dff=48, n_layer=2, n_head=4), tmp_path)
    with pytest.raises(ModelError, match="CTRLLMHeadModel has no layers.*learner.gradient_checkpointing to false"):
        load_model(ModelSection(path=path, dtype="fp32"), path, gradient_checkpointing=True)


def test_frequencies_that_lost_their_digits_are_computed_anew(tmp_path):
    path = saved(plain_network("Llama", rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}),
                 tmp_path)
    plain, network = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16) for _ in range(2))
    for name, buffer in list(network.model.rotary_emb.named_buffers()):
        network.model.rotary_emb.register_buffer(name, buffer.bfloat16(), persistent=False)
    assert not torch.equal(network.model.rotary_emb.inv_freq, plain.model.rotary_emb.inv_freq)
    weights = [parameter.clone() for parameter in network.parameters()]
    restore_buffers(network)
    for name, buffer in plain.model.rotary_emb.named_buffers():
        found = getattr(network.model.rotary_emb, name)
        assert found.dtype == torch.float32 and torch.equal(found, buffer)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), weights))


def test_a_family_that_cannot_be_trained_is_refused_by_its_config_alone(tmp_path):
    plain_network("Phi").config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="output head with a bias"):
        check_family(ModelSection(path=str(tmp_path)), str(tmp_path))


@pytest.mark.parametrize("lost", ["lm_head.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_weight_that_the_checkpoint_lacks_is_refused(tmp_path, lost):
    path, file = saved(plain_network("Llama"), tmp_path), tmp_path / "model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if name != lost}, file, {"format": "pt"})
    with pytest.raises(ModelError, match=f"1 of its weights are not found and would be random: {lost}; save the whole"):
        load_model(ModelSection(path=path, dtype="fp32"), path)


def test_loaded_weights_are_not_drawn_where_they_are_in_parts(monkeypatch):
    """Under ZeRO-3 a weight is empty on most ranks, and the family sets a row of it to zero."""
    network = plain_network("Youtu", **LATENT)
    for module in network.modules():
        module._is_hf_initialized = False
    for parameter in network.parameters():
        parameter.data, parameter._is_hf_initialized = torch.empty(0), True
    with pytest.raises(IndexError):
        network.initialize_weights()
    monkeypatch.setattr(model, "is_deepspeed_zero3_enabled", lambda: True)
    with model._loaded_weights_kept():
        network.initialize_weights()


def test_a_buffer_that_the_model_computes_for_its_layers_is_there(tmp_path):
    network = plain_network("FalconH1", mamba_d_ssm=32, mamba_n_heads=2, mamba_d_head=16)
    found = learners_model(saved(network, tmp_path)).network
    assert all(torch.equal(buffer, other) for buffer, other in zip(network.buffers(), found.buffers(), strict=True))


def test_a_family_without_a_longest_sequence_has_no_window(tmp_path):
    """XLNet says -1."""
    XLNetConfig(vocab_size=50, d_model=32, n_layer=1, n_head=2, pad_token_id=0).save_pretrained(tmp_path)
    check_model_path(ModelSection(path=str(tmp_path)), str(tmp_path))
