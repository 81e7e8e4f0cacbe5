"""Buffers that a model computes from its config, in the precision that transformers gives them.

Under ZeRO-3 DeepSpeed makes every new tensor in the precision of the weights. In bfloat16 the frequencies of rotary
positions then have three digits, and far positions are computed at another angle than in rollout engines and exports.
"""
from __future__ import annotations

import torch
from transformers import PreTrainedModel


def restore_buffers(network: PreTrainedModel) -> None:
    """Compute non-persistent buffers below float32 again, as transformers does after loading. In place.

    Only modules without weights are changed, since the same function would draw weights at random again. Buffers that
    this function does not compute stay as they are.
    """
    for module in network.modules():
        kept = {name: buffer for name, buffer in module.named_buffers(recurse=False)
                if name in module._non_persistent_buffers_set and buffer.dtype in (torch.bfloat16, torch.float16)}
        if not kept or next(module.parameters(), None) is not None:
            continue
        for name, buffer in kept.items():
            module.register_buffer(name, torch.full_like(buffer, torch.nan, dtype=torch.float32), persistent=False)
        network._init_weights(module)
        for name, buffer in kept.items():
            if getattr(module, name).isnan().any():
                module.register_buffer(name, buffer, persistent=False)
