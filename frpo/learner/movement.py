"""Check that every trainable tensor got a gradient, and that its fp32 master moved in the step.

The check finds a learner that silently freezes weights. It compares digests, so it costs one pass over the parameters
and no copy of the model.
"""
from __future__ import annotations

import torch
from deepspeed.utils import safe_get_full_fp32_param

CHUNK = 2**22
"""Number of elements converted to float64 at a time: 64 MiB, whatever the size of a parameter."""


class MovementCheck:
    """Check of one forward-backward and one optimizer step of a DeepSpeed module. Construction hooks the parameters."""

    def __init__(self, module: torch.nn.Module):
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.has_gradient = dict.fromkeys(self.parameters, False)
        self.hooks = [p.register_hook(self._recorder(name)) for name, p in self.parameters.items()]

    def before_step(self) -> None:
        """Digest the fp32 masters. Collective."""
        self.digest = {name: _digest(parameter) for name, parameter in self.parameters.items()}

    def after_step(self) -> None:
        """Compare the digests, and remove the parameters' hooks. Collective."""
        self.moved = {name: _digest(p) != self.digest[name] for name, p in self.parameters.items()}
        for hook in self.hooks:
            hook.remove()

    def report(self) -> dict[str, tuple[bool, bool]]:
        return {name: (self.has_gradient[name], self.moved[name]) for name in self.parameters}

    def _recorder(self, name: str):
        def record(gradient: torch.Tensor) -> None:
            self.has_gradient[name] = self.has_gradient[name] or bool(gradient.count_nonzero())

        return record


def _digest(parameter: torch.nn.Parameter) -> tuple[float, float]:
    """Compute two float64 sums that change when any element changes (exact cancellation aside)."""
    master = safe_get_full_fp32_param(parameter)
    values = (parameter.data if master is None else master).flatten()
    found = torch.zeros(2, dtype=torch.float64, device=values.device)
    for begin in range(0, len(values), CHUNK):
        piece = values[begin:begin + CHUNK].double()
        ramp = torch.arange(begin + 1, begin + 1 + len(piece), dtype=torch.float64, device=values.device)
        found += torch.stack([piece.sum(), piece.dot(ramp)])
    return tuple(found.tolist())
