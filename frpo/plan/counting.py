"""Count a model's `Shape`: build the real architecture from the config, without memory, and count its parameters."""
from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from frpo.config.model import LoraSection, ModelSection
from frpo.data.sets.tiny_tokenizer import build_tokenizer
from frpo.errors import ModelError
from frpo.learner.lora import adapted_widths
from frpo.learner.model import check_model_path, hollow_network
from frpo.learner.tiny import new_network
from frpo.plan.shape import Shape


def shape_of(model: ModelSection, path: str | None = None) -> Shape:
    """Return the shape of the model at `path`, or of the recipe's own model. A folder needs only a config.json.

    Raises ModelError if no config can be read, or if a LoRA target is not one of the model's layers.
    """
    path = path or model.path
    if path is not None:
        try:
            check_model_path(model, path)
        except ModelError as error:
            raise ModelError(f"{error}. A plan needs only config.json; a folder with that file is enough") from None
        return count(hollow_network(model, path), model.lora)
    assert model.tiny is not None  # a model without a path is made
    with torch.device("meta"):
        network = new_network(model.tiny, build_tokenizer(), model.max_length, seed=0)
    return count(network, model.lora)


def count(network: PreTrainedModel, lora: LoraSection | None) -> Shape:
    """Count the shape of a network, which may be on the meta device."""
    config = network.config.get_text_config()
    heads = config.num_attention_heads
    sizes = [parameter.numel() for parameter in network.parameters()]
    return Shape(
        parameters=sum(sizes), largest=max(sizes), largest_module=max(map(_own, network.modules())),
        layers=tuple(sum(parameter.numel() for parameter in layer.parameters()) for layer in _layers(network)),
        vocabulary=config.vocab_size, width=config.hidden_size, heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_size=getattr(config, "head_dim", None) or config.hidden_size // heads, inner=_inner(config),
        gated=_has(network, "gate_proj", "gate_up_proj"), head_norms=_has(network, "q_norm"),
        adapted=_adapted(network, lora))


def _layers(network: PreTrainedModel) -> list[torch.nn.Module]:
    return [module for module in network.modules() if isinstance(module, GradientCheckpointingLayer)]


def _own(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters(recurse=False))


def _has(network: PreTrainedModel, *kinds: str) -> bool:
    return any(kind in name.split(".") for name, _ in network.named_parameters() for kind in kinds)


def _inner(config: Any) -> int:
    """Return the MLP's width for one token. For a mixture of experts, add up the token's experts and shared experts."""
    experts = getattr(config, "num_experts_per_tok", None)
    dense = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    if not experts:
        return dense
    shared = getattr(config, "shared_expert_intermediate_size", None) or 0
    return experts * (getattr(config, "moe_intermediate_size", None) or dense) + shared


def _adapted(network: PreTrainedModel, lora: LoraSection | None) -> tuple[int, ...]:
    """Return inputs + outputs of each adapted layer. Without LoRA, use the layers that its default would adapt, if any.
    """
    try:
        return tuple(adapted_widths(network, (lora or LoraSection()).targets))
    except ModelError:
        if lora is not None:
            raise
        return ()
