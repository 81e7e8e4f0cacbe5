"""DeepSpeed's own estimate of model states, which `frpo plan` prints beside its own numbers."""
from __future__ import annotations

from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs


def gpu_estimate(stage: int, parameters: int, largest_module: int, ranks: int, *, offload_optimizer: bool,
                 offload_parameters: bool) -> int | None:
    """Return bytes on each GPU for parameters that are all trained in 16 bits.

    None for ZeRO-1, which DeepSpeed leaves out.
    ZeRO-2: 2 P + 18 P / N, where 18 = 2 + 4 gradients, 4 master weights, 8 moments. frpo counts 16, since the 16-bit
    gradients lie in buckets. ZeRO-3: 4 times the largest module + 18 P / N, where 18 includes the weights instead of
    the 16-bit gradients. Offloading the optimizer does not move the weights. DeepSpeed applies its factor of 1.5 for
    buffers on the CPU's side only.
    """
    if stage == 1:
        return None
    if stage == 2:
        return estimate_zero2_model_states_mem_needs(
            parameters, num_gpus_per_node=ranks, num_nodes=1, cpu_offload=offload_optimizer)[1]
    return estimate_zero3_model_states_mem_needs(
        parameters, largest_module, num_gpus_per_node=ranks, num_nodes=1, cpu_offload=offload_optimizer,
        cpu_offload_params=offload_parameters)[1]
