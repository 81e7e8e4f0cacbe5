"""Low-rank adapters (LoRA, arXiv:2106.09685) on a causal language model, by peft: W x + (alpha / r) B A x.

The base stays frozen and the adapters are inside the network. The same network without them is therefore the reference.
Other packages see only merged weights: engines and exports get W + (alpha / r) B A under the name of W. The merge is
out of place and per tensor. peft's own merge writes into the base, of which a ZeRO-3 rank holds only a part.
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from frpo.config.model import LoraSection, ModelSection
from frpo.errors import ModelError
from frpo.learner.logits import output_head
from frpo.learner.model import SCORE, hollow_network

ADAPTER = "default"
"""peft's name for the only adapter, a part of its parameters' names."""


@dataclass(frozen=True, kw_only=True)
class Weight:
    """One tensor of the model without adapters, a parameter or a buffer, and the factors that an adapter adds to it."""

    name: str
    parameter: torch.Tensor
    factors: tuple[nn.Parameter, nn.Parameter] | None = None
    """A (r, in) and B (out, r)."""
    scaling: float = 0.0

    @property
    def parameters(self) -> tuple[torch.Tensor, ...]:
        return (self.parameter, *(self.factors or ()))

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the whole tensor, partitioned or not."""
        return tuple(getattr(self.parameter, "ds_shape", self.parameter.shape))

    def value(self) -> torch.Tensor:
        """Return the tensor itself, merged in fp32. All `parameters` must be whole."""
        if self.factors is None:
            return self.parameter.data
        down, up = (factor.data.float() for factor in self.factors)
        return torch.addmm(self.parameter.data.float(), up, down, alpha=self.scaling).to(self.parameter.dtype)


def add_adapters(network: PreTrainedModel, section: LoraSection, seed: int) -> None:
    """Freeze `network` and put a trainable adapter, zero in effect, into its linear layers. In place.

    The result is the same on every rank: the random factor comes from `seed` alone. Works on partitioned parameters.
    Raises ModelError where a target is none of the linear layers (the output head does not count as one). Also raises
    ModelError where peft adapts other layers than those, by its own rules for some families.
    """
    layers, family = _adapted_layers(network, section.targets), type(network).__name__
    config = LoraConfig(r=section.r, lora_alpha=section.alpha, lora_dropout=0.0, task_type="CAUSAL_LM",
                        target_modules=layers)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            inject_adapter_in_model(config, network, ADAPTER)
        except ValueError as error:
            raise ModelError(f"peft cannot adapt {family} with model.lora.targets = {section.targets}: {error} Name "
                             "other layers in model.lora.targets") from error
    others = [name for name, module in network.named_modules() if isinstance(module, LoraLayer) and name not in layers]
    if others:
        kinds = {name.rpartition(".")[2] for name in layers if isinstance(network.get_submodule(name), LoraLayer)}
        raise ModelError(f"peft applies model.lora.targets = {section.targets} to experts of {family} ({others[0]}, "
                         f"...), which are not linear layers; set it to linear layers: {', '.join(sorted(kinds))}")


def check_targets(model: ModelSection, path: str) -> None:
    """Raise what `add_adapters` would raise for the model at `path`, from its config alone."""
    assert model.lora is not None
    add_adapters(hollow_network(model, path), model.lora, seed=0)


def adapter_summary(model: ModelSection, path: str, *, scores: bool = False) -> str:
    """Describe the parameters that adapters train in the model at `path`, and the kinds of modules without adapters.

    The kinds with most parameters come first. scores: whether the model becomes a reward model, whose head is trained.
    """
    assert model.lora is not None
    network = hollow_network(model, path, scores=scores)
    layers = _adapted_layers(network, model.lora.targets)
    adapted = {network.get_submodule(name) for name in layers}
    head, frozen = output_head(network), Counter[str]()
    counted: set[nn.Parameter] = set()
    for module in network.modules():
        kind = "output head" if module is head else type(module).__name__
        for parameter in module.parameters(recurse=False):
            if parameter not in counted and module not in adapted and not (scores and module is head):
                frozen[kind] += parameter.numel()
            counted.add(parameter)
    trained = model.lora.r * sum(adapted_widths(network, model.lora.targets))
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in frozen.most_common())
    whole = sum(parameter.numel() for parameter in counted)
    whole_head = ", and the score head whole" if scores else ""
    return (f"LoRA trains {trained:,} parameters, in adapters of {len(layers)} linear layers{whole_head}. Of the "
            f"model's {whole:,} parameters these have no adapter and stay as they are: {kinds}")


def adapted_widths(network: PreTrainedModel, targets: str | Sequence[str]) -> list[int]:
    """Return inputs plus outputs of each linear layer among `targets`.

    An adapter of rank r has r times as many parameters. Raises ModelError where a target is no linear layer.
    """
    layers = {cast(nn.Linear, network.get_submodule(name)) for name in _adapted_layers(network, targets)}
    return sorted(layer.in_features + layer.out_features for layer in layers)


@contextmanager
def adapters_off(network: nn.Module) -> Iterator[None]:
    """Switch the adapters off within the context: `network` computes the same as before `add_adapters`.

    For scoring only, since no parameter requires a gradient then. Partitioned or not, parameters and their hooks stay
    as they are, so training goes on as if nothing had been scored.
    """
    layers = [module for module in network.modules() if isinstance(module, LoraLayer)]
    trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        kept = set(trainable)
        for parameter in network.parameters():
            parameter.requires_grad_(parameter in kept)


def merged_weights(network: nn.Module) -> list[Weight]:
    """Return the parameters and saved buffers of `network` without adapters; a tied parameter once."""
    adapted: dict[nn.Parameter, tuple[nn.Parameter, nn.Parameter, float]] = {}
    for module in network.modules():
        if isinstance(module, LoraLayer):
            base, down, up = (cast(nn.Parameter, layer.weight) for layer in (
                module.get_base_layer(), module.lora_A[ADAPTER], module.lora_B[ADAPTER]))
            adapted[base] = (down, up, module.scaling[ADAPTER])
    factors = {factor for down, up, _ in adapted.values() for factor in (down, up)}
    weights = []
    for name, parameter in network.named_parameters():
        if parameter in adapted:
            down, up, scaling = adapted[parameter]
            weights.append(Weight(name=name.replace(".base_layer.", "."), parameter=parameter, factors=(down, up),
                                  scaling=scaling))
        elif parameter not in factors:
            weights.append(Weight(name=name.replace(".base_layer.", "."), parameter=parameter))
    saved = network.state_dict().keys()
    return weights + [Weight(name=name, parameter=buffer) for name, buffer in network.named_buffers() if name in saved]


def adapter_weights(network: nn.Module) -> list[Weight]:
    """Return only the adapters, and the score head of a reward model, under the names of peft's adapter file."""
    return [Weight(name=f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}", parameter=parameter)
            for name, parameter in network.named_parameters() if f".{ADAPTER}." in name or name == SCORE]


def write_adapter(folder: Path, network: nn.Module, state: Mapping[str, torch.Tensor], base: str) -> None:
    """Write a folder for `PeftModel.from_pretrained(base model, folder)`. `state` is named as in `adapter_weights`.

    base: the model under the adapters, a hub id or a folder. The path of a folder is made absolute, so that peft finds
    it from any working directory.
    """
    configs: Any = network.peft_config
    config = copy(configs[ADAPTER])
    config.base_model_name_or_path = str(Path(base).resolve()) if Path(base).is_dir() else base
    config.inference_mode = True
    config.target_modules = sorted(config.target_modules)
    if any(name == SCORE for name, _ in network.named_parameters()):
        config.task_type, config.modules_to_save = "SEQ_CLS", ["score"]
    config.save_pretrained(folder)
    save_file(dict(state), folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _adapted_layers(network: PreTrainedModel, targets: str | Sequence[str]) -> list[str]:
    """Return the names of the linear layers among `targets`."""
    head = output_head(network)
    layers = [name for name, module in network.named_modules() if module is not head and _is_linear(module)]
    if not layers:
        others = {type(module).__name__ for module in network.modules()
                  if module is not head and not isinstance(module, nn.Embedding)
                  and any(parameter.ndim > 1 for parameter in module.parameters(recurse=False))}
        raise ModelError(f"model.lora needs linear layers (torch.nn.Linear) below the output head, but "
                         f"{type(network).__name__} has none: its weights are in {', '.join(sorted(others))}. Set "
                         "model.lora to null to train the whole model")
    if targets == "all-linear":
        return layers
    found = {target: [name for name in layers if f".{name}".endswith(f".{target}")] for target in targets}
    unknown = [target for target, names in found.items() if not names]
    if unknown:
        kinds = sorted({name.rpartition(".")[2] for name in layers})
        raise ModelError(f"model.lora.targets: {', '.join(unknown)} matches no linear layer of "
                         f"{type(network).__name__} below its output head; use {', '.join(kinds)}, full names "
                         f"such as {layers[0]}, or all-linear")
    return sorted({name for names in found.values() for name in names})


def _is_linear(module: nn.Module) -> bool:
    """Return whether an adapter can add to the output of `module`.

    Some routers are an nn.Linear with additional outputs, which an adapter cannot add to.
    """
    if not isinstance(module, nn.Linear) or type(module).forward is nn.Linear.forward:
        return isinstance(module, nn.Linear)
    hollow = {name: torch.empty(getattr(parameter, "ds_shape", parameter.shape), dtype=parameter.dtype, device="meta")
              for name, parameter in module.named_parameters(recurse=False)}
    with torch.no_grad():
        asked = torch.empty((1, module.in_features), dtype=module.weight.dtype, device="meta")
        try:
            answer = torch.func.functional_call(module, hollow, (asked,))
        except Exception:  # any error: the module takes other input than one vector, such as a group of vectors
            return False
    return isinstance(answer, torch.Tensor) and answer.shape == (1, module.out_features)
