"""Scale and cap of logits are read off a family's code; what is no scale and no cap is refused."""
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from frpo.errors import ModelError
from frpo.kernels import LogitScale
from frpo.learner.logits import decoder_of, logit_scale
from small_networks import EXPERTS, config_of, plain_network

# (family, changes, what its logits are divided by, cap)
SCALES = [
    ("Llama", {}, 1.0, None),
    ("Granite", {"logits_scaling": 8.0}, 8.0, None),
    ("GraniteMoe", {"logits_scaling": 5.0, **EXPERTS}, 5.0, None),
    ("Cohere", {"logit_scale": 0.0625}, 16.0, None),
    ("Cohere2", {"logit_scale": 0.3}, 1 / 0.3, None),
    ("HyperCLOVAX", {"logits_scaling": 0.25}, 4.0, None),
    ("FalconH1", {"lm_head_multiplier": 0.1, "mamba_d_ssm": 32, "mamba_n_heads": 2, "mamba_d_head": 16}, 10.0, None),
    ("MiniCPM3", {"hidden_size": 64, "dim_model_base": 16}, 4.0, None),
    ("Gemma2", {"final_logit_softcapping": 30.0, "head_dim": 8}, 1.0, 30.0),
    ("NanoChat", {}, 1.0, 15.0),
    ("RecurrentGemma", {"logits_soft_cap": 7.0}, 1.0, 7.0),
    ("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 16}, 1.0, None),
]


def hollow(family, **changes):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config_of(family, **changes))


@pytest.mark.parametrize(("family", "changes", "divisor", "cap"), SCALES, ids=[row[0] for row in SCALES])
def test_scale_and_cap_need_no_weights(family, changes, divisor, cap):
    network = hollow(family, **changes)
    found = logit_scale(network)
    assert found.temperature == pytest.approx(divisor, rel=1e-8)
    assert found.softcap == (cap and pytest.approx(cap * divisor, rel=1e-8))
    assert "forward" not in vars(decoder_of(network)) and "forward" not in vars(network.get_output_embeddings())


@pytest.mark.parametrize(("family", "changes"), [
    ("Granite", {"logits_scaling": 8.0}), ("Cohere", {"logit_scale": 0.0625}),
    ("Gemma2", {"final_logit_softcapping": 2.0, "head_dim": 8})])
def test_with_it_hidden_states_and_head_make_the_network_s_logits(family, changes):
    network, ids = plain_network(family, **changes), torch.arange(2, 20)[None]
    scale, hidden = logit_scale(network), decoder_of(network)(input_ids=ids).last_hidden_state
    raw = hidden @ network.get_output_embeddings().weight.T
    logits = (raw if scale.softcap is None else scale.softcap * torch.tanh(raw / scale.softcap)) / scale.temperature
    torch.testing.assert_close(logits, network(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_a_scale_and_a_temperature_multiply():
    assert LogitScale(temperature=8.0, softcap=16.0).at(0.5) == LogitScale(temperature=4.0, softcap=16.0)


def changed_llama(change):
    class Changed(LlamaForCausalLM):
        def forward(self, **kwargs):
            output = super().forward(**kwargs)
            output.logits = change(output.logits)
            return output

    with torch.device("meta"):
        return Changed(config_of("Llama"))


@pytest.mark.parametrize("change", [
    lambda z: z + 1.0, lambda z: z.pow(2), lambda z: z[..., :-2], lambda z: -z, lambda z: z - z.logsumexp(-1, True),
    lambda z: z.clamp(max=5.0)], ids=["offset", "square", "cut", "negative", "normalised", "clamped"])
def test_any_other_function_is_refused(change):
    with pytest.raises(ModelError, match="by more than hidden states times .*, a factor and a soft-cap"):
        logit_scale(changed_llama(change))


def test_a_head_with_a_bias_is_refused():
    with pytest.raises(ModelError, match="PhiForCausalLM has an output head with a bias"):
        logit_scale(hollow("Phi"))


def test_a_layer_before_the_head_is_refused():
    class Squaring(LlamaForCausalLM):
        def forward(self, input_ids, **kwargs):
            hidden = self.model(input_ids=input_ids)[0]
            return SimpleNamespace(logits=self.lm_head(hidden**2))

    with torch.device("meta"):
        squaring = Squaring(config_of("Llama"))
    with pytest.raises(ModelError, match="before the output head by more than a factor"):
        logit_scale(squaring)


def test_a_network_without_a_head_is_refused():
    network = hollow("Llama")
    network.lm_head = None
    with pytest.raises(ModelError, match="LlamaForCausalLM has no output head"):
        logit_scale(network)
