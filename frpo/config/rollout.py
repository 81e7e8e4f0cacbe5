"""Define the sections of sampling and of the weight transfer to the rollout engines."""
from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from frpo.config.base import FunctionName, PathText, Section

SET_BY_FRPO = frozenset({
    "model", "dtype", "max_model_len", "tensor_parallel_size", "distributed_executor_backend", "block_size",
    "enforce_eager", "seed", "trust_remote_code", "logprobs_mode", "weight_transfer_config", "worker_extension_cls",
    "async_scheduling", "hf_overrides", "enable_sleep_mode", "gpu_memory_utilization", "kv_cache_memory_bytes",
    "enable_chunked_prefill", "enable_lora", "max_loras", "max_lora_rank"})
"""Arguments of vLLM's `LLM` that frpo sets: from other keys of the recipe, or because the training loop needs them."""


class DynamicSection(Section):
    """Replacement of groups whose advantages are all zero by other prompts, because these groups teach nothing."""

    epsilon: float = Field(1e-6, ge=0, description="replace a group if none of its |advantages| is above this")
    max_draws: int = Field(
        4, ge=2, description="most prompts drawn per step, as a multiple of prompts_per_step; after that, groups that "
                             "teach nothing fill the batch")


class RolloutSection(Section):
    prompts_per_step: int = Field(16, ge=1, description="prompts drawn per step")
    group_size: int = Field(8, ge=2, description="completions sampled per prompt")
    dynamic: DynamicSection | None = Field(
        None, description="replace groups that teach nothing; a mapping such as {max_draws: 4}; null: keep them")
    max_staleness: int = Field(
        0, ge=0, description="steps that sampling may run ahead of the learner; 0: sampling and learning take turns")
    replay: PathText | None = Field(
        None, description="path of a traces.jsonl; the run learns from its groups step by step and starts no engine; "
                          "null: sample")
    assignment: Literal["static", "load"] = Field(
        "static", description="how groups go to engines. static: in turn, so that runs repeat bit by bit; load: half "
                              "of them in turn, each other one to the engine that finishes a group first")
    hook: FunctionName | None = Field(
        None, description="'package.module:function' or 'path/file.py:function' of an async rollout(prompt, client) "
                          "that samples in several turns; null: one turn")
    hook_timeout_s: float = Field(300, gt=0, description="time limit for one sample of the hook")
    num_engines: int = Field(1, ge=1, description="number of vLLM engines, each a Ray actor")
    tensor_parallel_size: int = Field(1, ge=1, description="workers of one engine; on GPUs each has a GPU of its own")
    temperature: float = Field(1.0, gt=0, description="sampling temperature; the learner divides its logits by it too")
    top_p: float = Field(
        1.0, gt=0, le=1, description="probability mass of nucleus sampling; below 1, samples leave the policy's "
                                     "distribution")
    max_new_tokens: int = Field(256, ge=1, description="most tokens of a completion; a longer one is truncated")
    threads: int = Field(2, ge=1, description="CPU threads of an engine, divided among its workers (CPU only)")
    block_size: int | None = Field(
        None, ge=32, multiple_of=32, description="tokens of a block of the KV cache; the samples of a prompt share its "
                                                 "whole blocks; null: vLLM's choice (16 on most GPUs, 128 on CPU)")
    kv_cache_mb: int = Field(128, ge=16, description="size of the KV cache on CPU, in MiB")
    gpu_memory_utilization: float = Field(0.85, gt=0, le=1, description="share of a GPU's memory that an engine takes")
    engine_kwargs: dict[str, Any] = Field(
        {}, description="more arguments of vLLM's LLM, such as {max_num_seqs: 512}; arguments that frpo sets are an "
                        "error")
    max_restarts: int = Field(3, ge=0, description="most dead engines that a run replaces; one more death ends the run")
    startup_timeout_s: float = Field(
        1800, gt=0, description="time limit for an engine to load; download, compilation and graph capture included")
    timeout_s: float = Field(1800, gt=0, description="time limit for one step's generation")


    @field_validator("engine_kwargs")
    @classmethod
    def _leaves_ours_alone(cls, given: dict[str, Any]) -> dict[str, Any]:
        if taken := sorted(given.keys() & SET_BY_FRPO):
            raise ValueError(f"{', '.join(taken)}: frpo sets this itself; use the recipe's own keys "
                             "(`frpo config --keys rollout`), or leave it out")
        return given


class WeightSyncSection(Section):
    backend: Literal["auto", "cpu_shm", "gloo", "nccl", "ipc"] = Field(
        "auto", description="auto: the one that fits the run; cpu_shm: through the memory of one host; gloo: any "
                            "hosts, over TCP; nccl: between GPUs; ipc: on GPUs that learner and engines share")
    staged: bool | None = Field(
        None, description="true: engines take new weights only when a push is complete, so that a broken push changes "
                          "nothing; false: weights are replaced in place, without memory for a second model; null: "
                          "true for cpu_shm and gloo")
    adapters: bool = Field(
        False, description="true: with model.lora, push only the adapters, and vLLM adds them to its loaded model; "
                           "false: push whole weights with the adapters merged")
    bucket_mb: float = Field(
        256.0, gt=0, description="MiB of weights gathered at a time; keep it below the model's size")
    timeout_s: float = Field(600, gt=0, description="time limit for one push")

    @property
    def staged_here(self) -> bool:
        """Value of `staged` with null resolved by the backend. Adapters are always staged."""
        return self.adapters or (self.backend in ("cpu_shm", "gloo") if self.staged is None else self.staged)

    @property
    def for_engines(self) -> dict[str, bool]:
        """Settings that the receivers in the engines need."""
        return {"staged": self.staged_here, "adapters": self.adapters}
