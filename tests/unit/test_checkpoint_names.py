"""What is pushed and exported has the names, shapes and values of the files that plain transformers writes."""
from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    Glm4MoeConfig,
    GPTNeoXConfig,
    GraniteMoeConfig,
    HrmTextConfig,
    MixtralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3MoeConfig,
)
from transformers.core_model_loading import GroupWeightRename

from frpo.config.model import LoraSection
from frpo.errors import ModelError
from frpo.learner.checkpoint_names import CheckpointForm
from frpo.learner.lora import add_adapters, merged_weights
from frpo.learner.zero import GatheredWeights

SHAPE = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 1, "head_dim": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
         "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
FAMILIES = {
    "one tensor an expert": Qwen3MoeConfig(**SHAPE, num_experts=3),
    "tied, one tensor an expert": Qwen3MoeConfig(**SHAPE, num_experts=3, tie_word_embeddings=True),
    "one tensor an expert, another name": MixtralConfig(**SHAPE, num_local_experts=3),
    "other names": GraniteMoeConfig(**SHAPE, num_local_experts=3),
    "a buffer that is saved": Glm4MoeConfig(**SHAPE, n_routed_experts=4, n_group=1, topk_group=1,
                                            first_k_dense_replace=1),
    "two and four weights in one tensor": HrmTextConfig(**SHAPE),
    "its head renamed": GPTNeoXConfig(**SHAPE),
    "as it is": Qwen2Config(**SHAPE, tie_word_embeddings=True),
}


def saved(config, folder) -> PreTrainedModel:
    """A random model of `config`, written by transformers and loaded again."""
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(config)
    for buffer in network.buffers():
        if buffer.is_floating_point():
            buffer.normal_()
    network.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


def pushed(network, bucket_bytes=8000.0) -> GatheredWeights:
    weights = merged_weights(network)
    return GatheredWeights(CheckpointForm(network, weights).stored(weights), bucket_bytes)


def tensors(gathered):
    return [(name, tensor.clone()) for bucket in gathered for name, tensor in bucket]


@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES.keys())
def test_all_that_transformers_writes_and_nothing_else(config, tmp_path):
    gathered = pushed(saved(config, tmp_path))
    found, files = tensors(gathered), load_file(tmp_path / "model.safetensors")
    assert sorted(name for name, _ in found) == sorted(files)
    for name, tensor in found:
        assert torch.equal(tensor, files[name]), name
    assert gathered.metadata() == [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in found]
    assert len(list(gathered)) > 4


def test_experts_have_the_names_that_checkpoints_of_the_family_have(tmp_path):
    """2 layers x 3 experts x (gate, up, down), of which transformers makes 2 tensors a layer."""
    network = saved(FAMILIES["one tensor an expert"], tmp_path)
    experts = [name for name, _ in tensors(pushed(network)) if ".experts." in name]
    assert len(experts) == 18
    assert {"model.layers.1.mlp.experts.2.gate_proj.weight", "model.layers.0.mlp.experts.0.down_proj.weight"} < set(
        experts)
    assert len([name for name, _ in network.named_parameters() if ".experts." in name]) == 4


def test_a_bucket_holds_no_more_than_asked_or_one_tensor_of_the_model(tmp_path):
    network = saved(FAMILIES["one tensor an expert"], tmp_path)
    largest = max(p.numel() for p in network.parameters()) * 4
    limit = largest // 2  # down_proj; gate and up together are twice as large
    sizes = [sum(tensor.nbytes for _, tensor in bucket) for bucket in pushed(network, float(limit))]
    assert max(sizes) == largest == 3 * 2 * 16 * 32 * 4
    assert sizes.count(largest) == 2 and all(size <= limit or size == largest for size in sizes)


def test_adapters_are_merged_before_the_names_are(tmp_path):
    network, plain = saved(FAMILIES["one tensor an expert, another name"], tmp_path), load_file(
        tmp_path / "model.safetensors")
    add_adapters(network, LoraSection(r=2, alpha=4), seed=1)
    torch.nn.init.ones_(network.model.layers[1].self_attn.q_proj.lora_B["default"].weight)
    found = dict(tensors(pushed(network)))
    assert found.keys() == plain.keys()
    down = network.model.layers[1].self_attn.q_proj.lora_A["default"].weight.detach()
    name = "model.layers.1.self_attn.q_proj.weight"
    torch.testing.assert_close(found.pop(name), plain[name] + 2.0 * down.sum(0))
    assert all(torch.equal(tensor, plain[name]) for name, tensor in found.items())


def test_a_family_that_can_only_be_converted_at_once_is_refused(tmp_path):
    """Seen alone, the second norm keeps its name: only beside the first one is it renamed."""
    network = saved(FAMILIES["as it is"], tmp_path)
    network._weight_conversions = [GroupWeightRename(["norm_a", "norm_b"],
                                                     ["input_layernorm", "post_attention_layernorm"])]
    with pytest.raises(ModelError, match="Qwen2ForCausalLM: transformers converts .* only all at once"):
        pushed(network)
