"""Sections that say how completions are sampled, and how weights reach the engines that sample them."""
from __future__ import annotations

from typing import Literal

from pydantic import Field

from frpo.config.base import Section


class DynamicSection(Section):
    """Groups whose advantages are all zero teach nothing: other prompts are sampled in their place."""

    epsilon: float = Field(1e-6, ge=0, description="a group is replaced if no |advantage| of it exceeds this")
    max_draws: int = Field(4, ge=2, description="most prompts drawn a step, in multiples of prompts_per_step; what is "
                                                "then missing is filled up with groups that teach nothing")


class RolloutSection(Section):
    prompts_per_step: int = Field(16, ge=1, description="prompts drawn a step")
    group_size: int = Field(8, ge=2, description="completions sampled a prompt")
    dynamic: DynamicSection | None = Field(
        None, description="replace groups that teach nothing, a mapping such as {max_draws: 4}; null: keep them")
    max_staleness: int = Field(
        0, ge=0, description="steps that sampling may run ahead of the learner; 0: neither works while the other does")
    replay: str | None = Field(
        None, description="a traces.jsonl whose groups are learned from, step by step, instead of sampling any; no "
                          "engine is started")
    assignment: Literal["static", "load"] = Field(
        "static", description="of groups to engines; static: in turn, so that runs repeat to the bit; load: half of "
                              "them to whoever is done first")
    hook: str | None = Field(
        None, description="'package.module:function' or 'path/file.py:function', an async rollout(prompt, client) that "
                          "samples in several turns; null: one turn")
    hook_timeout_s: float = Field(300, gt=0, description="limit for one sample of the hook")
    num_engines: int = Field(1, ge=1, description="vLLM engines, each its own Ray actor")
    tensor_parallel_size: int = Field(1, ge=1, description="workers of one engine, each on a GPU of its own if any")
    temperature: float = Field(1.0, gt=0, description="sampling temperature; the learner divides its logits by it too")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus mass; below 1 samples leave the policy's distribution")
    max_new_tokens: int = Field(256, ge=1, description="completion length after which a sample is truncated")
    threads: int = Field(2, ge=1, description="CPU threads of an engine, divided among its workers (CPU only)")
    block_size: int | None = Field(
        None, ge=32, multiple_of=32, description="tokens of a block of the KV cache; the samples of a prompt share its "
                                                 "whole blocks; null: vLLM's choice, 16 on most GPUs, 128 on CPU")
    kv_cache_mb: int = Field(128, ge=16, description="KV cache on CPU, in MiB")
    gpu_memory_utilization: float = Field(0.85, gt=0, le=1, description="share of a GPU that an engine takes")
    max_restarts: int = Field(3, ge=0, description="dead engines that a run starts again; one more ends it")
    startup_timeout_s: float = Field(600, gt=0, description="limit for an engine to load")
    timeout_s: float = Field(1800, gt=0, description="limit for one step's generation")


class WeightSyncSection(Section):
    backend: Literal["cpu_shm", "gloo", "nccl", "ipc"] = Field(
        "cpu_shm", description="cpu_shm: one host; gloo: any hosts, over TCP; nccl, ipc: CUDA, not yet executed")
    bucket_mb: float = Field(256.0, gt=0, description="MiB gathered at a time; below the model's size")
    timeout_s: float = Field(600, gt=0, description="limit for one push")
