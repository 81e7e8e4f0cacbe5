"""Adapters on a tiny model in one process: what is merged, what is reference, what is written; peft is the judge."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    DeepseekV4Config,
    DeepseekV4ForCausalLM,
    FalconConfig,
    GPT2Config,
    Llama4TextConfig,
    MambaConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

from frpo.config.model import LoraSection, ModelSection
from frpo.errors import ModelError
from frpo.learner.attention import arrange
from frpo.learner.checkpoint_names import as_they_are
from frpo.learner.lora import (
    adapter_summary,
    adapter_weights,
    adapters_off,
    add_adapters,
    check_targets,
    merged_weights,
    write_adapter,
)
from frpo.learner.model import load_model
from frpo.learner.zero import GatheredWeights

KINDS = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
TOKENS = torch.arange(1, 13).reshape(2, 6)
SECTION = LoraSection(r=3, alpha=12)


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def base(request, tmp_path):
    """Folder of a random model."""
    torch.manual_seed(0)
    network = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=request.param, initializer_range=0.1))
    network.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def load(path, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)


def adapted(path, dtype=torch.float32, section=SECTION):
    """The model with adapters that do something."""
    network = load(path, dtype)
    add_adapters(network, section, seed=1)
    random = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.1)
    return network


def logits(network):
    with torch.no_grad():
        return network(input_ids=TOKENS).logits


def stream(weights, bucket_bytes=5000.0):
    """All tensors of all buckets by name."""
    gathered = GatheredWeights(as_they_are(weights), bucket_bytes)
    return {name: tensor.clone() for bucket in gathered for name, tensor in bucket}


def written(network, folder, base):
    write_adapter(folder, network, stream(adapter_weights(network)), base)
    return str(folder)


def test_merged_weights_are_the_base_models_tensors_with_what_peft_would_add(base, tmp_path):
    network, plain = adapted(base), load(base)
    merged = stream(merged_weights(network))
    assert list(merged) == [name for name, _ in plain.named_parameters()]
    judge = PeftModel.from_pretrained(load(base), written(network, tmp_path / "adapter", base)).merge_and_unload()
    for name, parameter in judge.named_parameters():
        torch.testing.assert_close(merged[name], parameter.data, rtol=0, atol=1e-6)
    moved = {name for name, parameter in plain.named_parameters() if not torch.equal(merged[name], parameter)}
    assert {name.split(".")[-2] for name in moved} == set(KINDS) and len(moved) == 14
    # Out of place: what is under the adapters did not change.
    with adapters_off(network):
        assert torch.equal(logits(network), logits(plain))


def test_an_adapter_names_a_local_base_so_that_it_is_found_from_anywhere(base, tmp_path, monkeypatch):
    network, folder = adapted(base), Path(base)
    monkeypatch.chdir(folder.parent)
    for given, wanted in ((folder.name, str(folder.resolve())), ("owner/name", "owner/name")):
        written(network, tmp_path / "adapter", given)
        config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == wanted


def test_metadata_announces_what_the_buckets_bring(base):
    weights = GatheredWeights(as_they_are(merged_weights(adapted(base, torch.bfloat16))), 5000.0)
    buckets = list(weights)
    assert len(buckets) > 3
    assert [(n, t.dtype, tuple(t.shape)) for bucket in buckets for n, t in bucket] == weights.metadata()


def test_bf16_weights_are_merged_in_fp32_and_rounded_once(base):
    network = adapted(base, torch.bfloat16)
    checked = 0
    for weight in merged_weights(network):
        if weight.factors is not None:
            down, up = (factor.data.double() for factor in weight.factors)
            exact = weight.parameter.data.double() + SECTION.alpha / SECTION.r * up @ down
            assert ((weight.value().double() - exact).abs() <= exact.abs() * 2**-8 * 1.001).all(), weight.name
            checked += 1
    assert checked == 14


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fresh_adapters_change_nothing_and_are_all_that_trains(base, dtype):
    network = load(base, dtype)
    add_adapters(network, SECTION, seed=1)
    assert torch.equal(logits(network), logits(load(base, dtype)))
    trainable = {name: p for name, p in network.named_parameters() if p.requires_grad}
    assert len(trainable) == 2 * 14 and all(".lora_" in name for name in trainable)
    assert {p.dtype for p in network.parameters()} == {dtype}
    network(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert all((p.grad is not None) == (name in trainable) for name, p in network.named_parameters())


def test_adapters_depend_on_the_seed_alone_and_take_no_random_numbers(base):
    def factors(seed):
        network = load(base)
        add_adapters(network, SECTION, seed)
        return stream(adapter_weights(network))

    torch.manual_seed(5)
    first, after = factors(1), torch.rand(1)
    torch.manual_seed(6)
    second, other = factors(1), factors(2)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), after)


def test_without_its_adapters_the_network_is_the_base_to_the_bit_and_comes_back_after_an_error(base):
    network = adapted(base)
    frozen = next(p for p in network.parameters() if p.requires_grad).requires_grad_(False)
    flags = [p.requires_grad for p in network.parameters()]
    before, plain = logits(network), logits(load(base))
    assert (before - plain).abs().max() > 0.1
    with pytest.raises(KeyError), adapters_off(network):
        assert torch.equal(logits(network), plain)
        raise KeyError("while scoring")
    assert torch.equal(logits(network), before)
    assert [p.requires_grad for p in network.parameters()] == flags and not frozen.requires_grad


def test_targets_by_name(base):
    network = adapted(base, section=LoraSection(r=3, targets=["q_proj", "layers.1.mlp.up_proj"]))
    assert sorted(w.name for w in merged_weights(network) if w.factors) == [
        "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight",
        "model.layers.1.self_attn.q_proj.weight"]


@pytest.mark.parametrize("target", ["proj", "lm_head", "embed_tokens", "qproj", "layers.7.mlp.up_proj"])
def test_a_target_that_is_no_linear_layer_is_refused_with_those_there_are(base, target):
    network = load(base)
    message = (rf"model.lora.targets: {target} matches no .*; use {', '.join(KINDS)}, full names such as "
               "model.layers.0.self_attn.q_proj, or all-linear")
    section = LoraSection(targets=["q_proj", target])
    with pytest.raises(ModelError, match=message):
        add_adapters(network, section, seed=0)
    with pytest.raises(ModelError, match=message):
        check_targets(ModelSection(path=base, lora=section), base)
    check_targets(ModelSection(path=base, lora=SECTION), base)


@pytest.mark.parametrize("section", [SECTION, LoraSection(targets=["c_attn"])])
def test_a_model_without_linear_layers_is_refused_before_it_is_loaded(section, tmp_path):
    GPT2Config(vocab_size=40, n_embd=32, n_layer=1, n_head=2).save_pretrained(tmp_path)
    message = (r"model.lora needs linear layers \(torch.nn.Linear\) below the output head, but GPT2LMHeadModel has "
               r"none: its weights are in Conv1D\. Set model.lora to null")
    with pytest.raises(ModelError, match=message):
        check_targets(ModelSection(path=str(tmp_path), lora=section), str(tmp_path))


MAMBA = MambaConfig(vocab_size=40, hidden_size=32, num_hidden_layers=1)
NEXT = Qwen3NextConfig(
    vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
    intermediate_size=32, layer_types=["linear_attention", "full_attention"], linear_num_value_heads=2,
    linear_num_key_heads=2, linear_key_head_dim=16, linear_value_head_dim=16, num_experts=3, num_experts_per_tok=2,
    moe_intermediate_size=16, shared_expert_intermediate_size=16)


def test_a_linear_layer_that_takes_groups_of_vectors_is_none(tmp_path):
    with torch.device("meta"):
        network = DeepseekV4ForCausalLM(DeepseekV4Config(
            vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, head_dim=16, o_groups=2,
            o_lora_rank=8, q_lora_rank=8, n_routed_experts=3, num_experts_per_tok=2, moe_intermediate_size=16,
            layer_types=["sliding_attention"]))
    add_adapters(network, SECTION, seed=1)
    adapted = {name.split(".")[-4] for name, _ in network.named_parameters() if ".lora_A." in name}
    assert {"o_b_proj", "kv_proj"} <= adapted and "o_a_proj" not in adapted


@pytest.mark.parametrize(("config", "message", "instead"), [
    (MAMBA, r"peft cannot adapt MambaForCausalLM .* = all-linear: .*out_proj.* Name other layers", ["in_proj"]),
    (NEXT, r"peft applies .* = all-linear to experts of Qwen3NextForCausalLM \(model.layers.0.mlp.experts, \.\.\.\), "
           r"which are not linear layers; set it to linear layers: in_proj_ba, in_proj_qkvz, k_proj, ",
     ["q_proj"]),
])
def test_what_peft_would_adapt_otherwise_is_refused_before_it_is_loaded(config, message, instead, tmp_path):
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=message):
        check_targets(ModelSection(path=str(tmp_path), lora=SECTION), str(tmp_path))
    check_targets(ModelSection(path=str(tmp_path), lora=LoraSection(targets=instead)), str(tmp_path))


def test_a_router_that_is_a_linear_layer_with_more_to_its_answer_has_no_adapter():
    """Llama 4's returns two tensors; an adapter would add to the pair."""
    network = AutoModelForCausalLM.from_config(Llama4TextConfig(
        vocab_size=40, hidden_size=32, intermediate_size=32, intermediate_size_mlp=32, num_hidden_layers=1, head_dim=16,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=2, interleave_moe_layer_step=1))
    before = logits(network)
    add_adapters(network, SECTION, seed=1)
    torch.testing.assert_close(logits(network), before, rtol=0, atol=0)
    assert not any("router" in name for name, parameter in network.named_parameters() if parameter.requires_grad)


def test_a_linear_layer_of_a_familys_own_class_has_an_adapter(tmp_path):
    """Falcon computes the product by itself."""
    FalconConfig(vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=2).save_pretrained(tmp_path)
    said = adapter_summary(ModelSection(path=str(tmp_path), lora=SECTION), str(tmp_path))
    assert "in adapters of 4 linear layers" in said and "FalconLinear" not in said


def test_what_has_no_adapter_is_named(tmp_path):
    """2 layers of: attention 32 x 32 (q, o) and 32 x 16 (k, v) with rank 3; experts 3 x 3 x 16 x 32, router 3 x 32."""
    Qwen3MoeConfig(vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                   head_dim=16, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=16,
                   tie_word_embeddings=True).save_pretrained(tmp_path)
    said = adapter_summary(ModelSection(path=str(tmp_path), lora=SECTION), str(tmp_path))
    trained, experts, norms = 2 * 3 * (2 * 64 + 2 * 48), 2 * 3 * 3 * 16 * 32, 2 * (2 * 32 + 2 * 16) + 32
    whole = 2 * (2 * 32 * 32 + 2 * 32 * 16) + experts + 40 * 32 + norms + 2 * 3 * 32
    assert said == (
        f"LoRA trains {trained:,} parameters, in adapters of 8 linear layers. Of the model's {whole:,} parameters "
        f"these have no adapter and stay as they are: Qwen3MoeExperts {experts:,}, Embedding 1,280, Qwen3MoeRMSNorm "
        f"{norms}, Qwen3MoeTopKRouter 192")


def test_the_head_of_a_reward_model_is_trained_whole(base, tmp_path):
    """2 layers of: attention 32 x 32 (q, o) and 32 x 16 (k, v), MLP 3 x 32 x 64; a head of 32 instead of logits."""
    said = adapter_summary(ModelSection(path=base, lora=SECTION), base, scores=True)
    trained = 2 * 3 * (2 * 64 + 2 * 48 + 3 * 96)
    frozen = 2 * 2 * 32 + 32
    whole = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 64 + 3 * 32 * 64) + 40 * 32 + frozen + 32
    assert said == (
        f"LoRA trains {trained:,} parameters, in adapters of 14 linear layers, and the score head whole. Of the "
        f"model's {whole:,} parameters these have no adapter and stay as they are: Embedding 1,280, "
        f"Qwen2RMSNorm {frozen}")


def test_adapters_of_a_reward_model_leave_its_head_and_are_written_with_it(base, tmp_path):
    section = ModelSection(path=base, dtype="fp32", max_length=64, lora=SECTION)
    network = load_model(section, base, score_seed=3)
    plain = load_model(section, base, score_seed=3)
    add_adapters(network, SECTION, seed=1)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
        network.score.weight.add_(1.0)
    names = {weight.name for weight in adapter_weights(network)}
    assert "base_model.model.score.weight" in names and len(names) == 2 * 14 + 1
    folder = written(network, tmp_path / "adapter", base)
    config = json.loads((Path(folder) / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["score"])
    peft = PeftModel.from_pretrained(plain, folder)
    arrange(None)
    with torch.no_grad():
        hidden = [each.model(input_ids=TOKENS).last_hidden_state for each in (network, peft.get_base_model())]
        assert torch.equal(*hidden)
        found = [each.score(state) for each, state in zip((network, peft.get_base_model()), hidden, strict=True)]
    assert torch.equal(*found)


def test_the_adapter_folder_on_the_base_and_the_merged_export_are_one_model(base, tmp_path):
    network = adapted(base)
    network.save_pretrained(tmp_path / "merged", state_dict=stream(merged_weights(network)))
    folder = written(network, tmp_path / "merged" / "adapter", base)
    by_peft = logits(PeftModel.from_pretrained(load(base), folder))
    assert torch.equal(by_peft, logits(network))
    torch.testing.assert_close(logits(load(tmp_path / "merged")), by_peft, rtol=0, atol=1e-5)
    config = json.loads((tmp_path / "merged" / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"], config["lora_alpha"]) == (base, 3, 12)
    assert config["inference_mode"] and config["lora_dropout"] == 0
