"""Tiny random models of many families, for `families.py`: what is particular to a family, small, is switched on.

A sliding window is shorter than the sequences it meets, a scale is not 1, dropout is not 0. Weights are wide enough
(initializer_range) that every layer matters. Nothing is measured here.
"""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig

from frpo.data.sets.tiny_tokenizer import build_tokenizer

COMMON = {"vocab_size": 104, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
          "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256,
          "initializer_range": 0.3, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
GPT2 = {"vocab_size": 104, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 256, "initializer_range": 0.3,
        "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
"""Names of the families before Llama."""
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
LINEAR = {"linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 16,
          "linear_value_head_dim": 16}
LATENT = {"num_key_value_heads": 2, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16,
          "qk_nope_head_dim": 16, "v_head_dim": 32}
ROUTED = {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2,
          "moe_intermediate_size": 32, "first_k_dense_replace": 1}
"""Names of DeepSeek and its relatives."""
WINDOWS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
MAMBA2 = {"mamba_n_heads": 4, "mamba_d_state": 16, "mamba_chunk_size": 16}

Make = Callable[[], PreTrainedConfig]


def like_llama(config: str, **own: Any) -> Make:
    return lambda: getattr(transformers, config)(**COMMON | own)


def alone(config: str, **own: Any) -> Make:
    """A family that names everything in its own way."""
    return lambda: getattr(transformers, config)(vocab_size=104, pad_token_id=0, eos_token_id=1, **own)


def like_gpt2(config: str, **own: Any) -> Make:
    return lambda: getattr(transformers, config)(**GPT2 | own)


def rotary(kind: str, **own: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 10000.0, **own}


ZOO: dict[str, Make] = {
    # Llama and its relatives
    "llama": like_llama("LlamaConfig"),
    "llama_tied": like_llama("LlamaConfig", tie_word_embeddings=True),
    "llama_yarn": like_llama("LlamaConfig", rope_parameters=rotary(
        "yarn", factor=4.0, original_max_position_embeddings=64)),
    "llama_dynamic_ntk": like_llama("LlamaConfig", max_position_embeddings=64, rope_parameters=rotary(
        "dynamic", factor=4.0)),
    "mistral": like_llama("MistralConfig", sliding_window=None),
    "mistral_window": like_llama("MistralConfig", sliding_window=8),
    "ministral": like_llama("MinistralConfig", head_dim=32, sliding_window=8,
                            layer_types=["sliding_attention", "full_attention"]),
    "qwen2": like_llama("Qwen2Config", tie_word_embeddings=True),
    "qwen3": like_llama("Qwen3Config", head_dim=32),
    "smollm3": like_llama("SmolLM3Config", no_rope_layers=[1, 0]),
    "seed_oss": like_llama("SeedOssConfig", head_dim=32),
    "olmo": like_llama("OlmoConfig"),
    "olmo2": like_llama("Olmo2Config"),
    "olmo3": like_llama("Olmo3Config", sliding_window=8, layer_types=["sliding_attention", "full_attention"]),
    "helium": like_llama("HeliumConfig", head_dim=32),
    "ernie4_5": like_llama("Ernie4_5Config", head_dim=32),
    "hunyuan": like_llama("HunYuanDenseV1Config", head_dim=32),
    "glm4": like_llama("Glm4Config"),
    "exaone4": like_llama("Exaone4Config", sliding_window=8, sliding_window_pattern=2),
    "apertus": like_llama("ApertusConfig"),
    "arcee": like_llama("ArceeConfig"),
    "nemotron": like_llama("NemotronConfig"),
    "jais2": like_llama("Jais2Config"),
    "cwm": like_llama("CwmConfig", head_dim=32, bos_token_id=1, **WINDOWS),
    "youtu": like_llama("YoutuConfig", **LATENT),
    "nanochat": like_llama("NanoChatConfig"),
    "bitnet": like_llama("BitNetConfig"),
    "diffllama": like_llama("DiffLlamaConfig", num_key_value_heads=2),
    "minicpm3": like_llama("MiniCPM3Config", num_key_value_heads=2),
    "stablelm": like_llama("StableLmConfig"),
    "starcoder2": like_llama("Starcoder2Config", residual_dropout=0.1, embedding_dropout=0.1, sliding_window=None),
    "phi": like_llama("PhiConfig", num_key_value_heads=2),
    "phi3": like_llama("Phi3Config", resid_pdrop=0.1),
    "phi3_longrope": like_llama("Phi3Config", original_max_position_embeddings=16, rope_parameters=rotary(
        "longrope", partial_rotary_factor=1.0, short_factor=[1.0] * 16, long_factor=[4.0] * 16,
        original_max_position_embeddings=16)),
    # Scales and caps
    "gemma": like_llama("GemmaConfig", head_dim=32),
    "gemma2": like_llama("Gemma2Config", head_dim=32, sliding_window=8, final_logit_softcapping=3.0,
                         attn_logit_softcapping=2.0, query_pre_attn_scalar=16),
    "gemma3": like_llama("Gemma3TextConfig", head_dim=32, sliding_window=8, query_pre_attn_scalar=16,
                         sliding_window_pattern=2),
    "gemma3n": like_llama("Gemma3nTextConfig", head_dim=32, num_kv_shared_layers=0, vocab_size_per_layer_input=104,
                          hidden_size_per_layer_input=8, laurel_rank=8, activation_sparsity_pattern=[0.9, 0.0],
                          final_logit_softcapping=3.0, **WINDOWS),
    "vaultgemma": like_llama("VaultGemmaConfig", head_dim=32, sliding_window=8, attn_logit_softcapping=2.0,
                             final_logit_softcapping=3.0),
    "granite": like_llama("GraniteConfig", logits_scaling=8.0, embedding_multiplier=3.0, residual_multiplier=0.5,
                          attention_multiplier=0.1),
    "cohere": like_llama("CohereConfig", logit_scale=0.0625),
    "cohere2": like_llama("Cohere2Config", sliding_window=8, sliding_window_pattern=2, logit_scale=0.25),
    "hyperclovax": like_llama("HyperCLOVAXConfig", logits_scaling=0.25),
    # Mixtures of experts
    "mixtral": like_llama("MixtralConfig", sliding_window=None, **LOCAL_EXPERTS),
    "mixtral_jitter": like_llama("MixtralConfig", sliding_window=None, router_jitter_noise=0.1, **LOCAL_EXPERTS),
    "qwen2_moe": like_llama("Qwen2MoeConfig", shared_expert_intermediate_size=32, **EXPERTS),
    "qwen3_moe": like_llama("Qwen3MoeConfig", head_dim=32, **EXPERTS),
    "olmoe": like_llama("OlmoeConfig", num_experts=4, num_experts_per_tok=2),
    "phimoe": like_llama("PhimoeConfig", **LOCAL_EXPERTS),
    "granitemoe": like_llama("GraniteMoeConfig", logits_scaling=4.0, **LOCAL_EXPERTS),
    "gpt_oss": like_llama("GptOssConfig", head_dim=32, sliding_window=8, **LOCAL_EXPERTS),
    "deepseek_v3": like_llama(
        "DeepseekV3Config", num_key_value_heads=2, n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2,
        moe_intermediate_size=32, first_k_dense_replace=1, q_lora_rank=32, kv_lora_rank=512, qk_rope_head_dim=64,
        qk_nope_head_dim=32, v_head_dim=32, topk_method="noaux_tc"),
    "deepseek_v2": like_llama("DeepseekV2Config", **LATENT, **ROUTED),
    "deepseek_v32": like_llama("DeepseekV32Config", index_topk=8, index_head_dim=32, index_n_heads=16, **LATENT,
                               **ROUTED),
    "glm4_moe": like_llama("Glm4MoeConfig", head_dim=32, use_qk_norm=True, **ROUTED),
    "dots1": like_llama("Dots1Config", head_dim=32, **ROUTED),
    "ernie4_5_moe": like_llama("Ernie4_5_MoeConfig", head_dim=32, moe_num_experts=4, moe_k=2, moe_intermediate_size=32,
                               moe_layer_start_index=1, moe_num_shared_experts=1),
    "hunyuan_moe": like_llama("HunYuanMoEV1Config", head_dim=32, num_experts=4, moe_topk=[2, 2]),
    "minimax_m2": like_llama("MiniMaxM2Config", head_dim=32, **LOCAL_EXPERTS),
    "flex_olmo": like_llama("FlexOlmoConfig", num_experts=4, num_experts_per_tok=2),
    "laguna": like_llama("LagunaConfig", head_dim=32, shared_expert_intermediate_size=32,
                         moe_router_logit_softcapping=2.0, **WINDOWS, **EXPERTS),
    "llama4": like_llama("Llama4TextConfig", head_dim=32, attention_chunk_size=32, intermediate_size_mlp=128,
                         num_local_experts=2, interleave_moe_layer_step=2),
    # Layers that carry state
    "qwen3_next": like_llama("Qwen3NextConfig", head_dim=32, layer_types=["linear_attention", "full_attention"],
                             shared_expert_intermediate_size=32, **LINEAR, **EXPERTS),
    "qwen3_5": like_llama("Qwen3_5TextConfig", head_dim=32, layer_types=["linear_attention", "full_attention"],
                          **LINEAR),
    "minimax": like_llama("MiniMaxConfig", head_dim=32, layer_types=["linear_attention", "full_attention"],
                          **LOCAL_EXPERTS),
    "granitemoehybrid": like_llama("GraniteMoeHybridConfig", logits_scaling=4.0, shared_intermediate_size=32,
                                   layer_types=["mamba", "attention"], mamba_d_head=32, **MAMBA2, **LOCAL_EXPERTS),
    "lfm2_moe": like_llama("Lfm2MoeConfig", layer_types=["conv", "full_attention"], num_dense_layers=1, **EXPERTS),
    "xlstm": alone("xLSTMConfig", hidden_size=64, num_hidden_layers=2, num_heads=2, chunk_size=16),
    "rwkv": alone("RwkvConfig", hidden_size=64, num_hidden_layers=2, context_length=256),
    "lfm2": like_llama("Lfm2Config", layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False),
    "falcon_h1": like_llama("FalconH1Config", mamba_d_ssm=64, mamba_d_head=16, lm_head_multiplier=0.5, **MAMBA2),
    "bamba": like_llama("BambaConfig", attn_layer_indices=[1], mamba_d_head=32, **MAMBA2),
    "jamba": like_llama("JambaConfig", attn_layer_period=2, attn_layer_offset=1, num_experts=2,
                        mamba_d_state=8),
    "mamba": alone("MambaConfig", hidden_size=64, num_hidden_layers=2, initializer_range=0.3),
    "recurrent_gemma": like_llama("RecurrentGemmaConfig"),
    # Before Llama
    "gpt2": like_gpt2("GPT2Config"),
    "gpt_bigcode": like_gpt2("GPTBigCodeConfig"),
    "gptj": like_gpt2("GPTJConfig", rotary_dim=16),
    "codegen": like_gpt2("CodeGenConfig", n_head=4, rotary_dim=8),
    "gpt_neo": alone("GPTNeoConfig", hidden_size=64, num_layers=2, num_heads=2, max_position_embeddings=256,
                     attention_types=[[["global", "local"], 1]], window_size=8, initializer_range=0.3, bos_token_id=1),
    "gpt_neox": like_llama("GPTNeoXConfig", hidden_dropout=0.2, attention_dropout=0.2),
    "opt": alone("OPTConfig", hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=2, init_std=0.3,
                 max_position_embeddings=256, word_embed_proj_dim=64, bos_token_id=1),
    "bloom": alone("BloomConfig", hidden_size=64, n_layer=2, n_head=2, initializer_range=0.3),
    "falcon": alone("FalconConfig", hidden_size=64, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.3,
                    bos_token_id=1, new_decoder_architecture=False, multi_query=True, hidden_dropout=0.1,
                    attention_dropout=0.1),
    "mpt": alone("MptConfig", d_model=64, n_layers=2, n_heads=2, max_seq_len=256),
    "persimmon": like_llama("PersimmonConfig"),
    "xglm": alone("XGLMConfig", d_model=64, ffn_dim=128, num_layers=2, attention_heads=2, max_position_embeddings=256,
                  init_std=0.3),
}
"""Name -> what makes the configuration. One name a family, or a trait of one that changes what attention computes."""


def make_model(family: str, folder: Path) -> str:
    """A random model of `family` in fp32 with a tokenizer, the same at every call. Returns its folder."""
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(ZOO[family](), dtype=torch.float32)
    saved = network.state_dict().keys()
    for name, buffer in network.named_buffers():
        if name in saved and not buffer.any():
            buffer.uniform_(-0.1, 0.1)  # an export that leaves it out is then another model
    network.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return str(folder)
