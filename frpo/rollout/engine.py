"""One vLLM engine: sampling whole groups, scoring given tokens, receiving weights under a version label.

A plain class: `cluster` puts it into a Ray actor. It does not choose prompts, know rewards or other engines.
"""
from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from frpo.config.sections import Recipe
from frpo.errors import EngineError
from frpo.types import Completion, GroupId, Prompt, RolloutGroup, VersionSpan

CPU_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # Asked for log-probabilities, vLLM otherwise compiles a kernel for many seconds at the first call.
    "TORCH_COMPILE_DISABLE": "1",
}
ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}


@dataclass(frozen=True, kw_only=True)
class GroupRequest:
    """One group to sample; `seeds` has one entry a completion."""

    group_id: GroupId
    prompt: Prompt
    seeds: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn. temperature 0 is greedy."""

    temperature: float
    top_p: float
    max_new_tokens: int


class RolloutEngine:
    """Serves one policy; refuses to sample until a push, or `serve_loaded`, has given its weights a version."""

    def __init__(self, recipe: Recipe, model_path: str, device: str, index: int = 0):
        os.environ.update(ENVIRONMENT)
        if device == "cpu":
            os.environ.update(CPU_ENVIRONMENT | {"OMP_NUM_THREADS": str(recipe.rollout.threads)})
        from vllm import LLM

        self.index = index
        # On CPU vLLM fails at a seeded request whose prompt it splits over two passes, so no prompt is split there.
        memory = ({"kv_cache_memory_bytes": recipe.rollout.kv_cache_mb * 2**20, "enable_chunked_prefill": False}
                  if device == "cpu" else {"gpu_memory_utilization": recipe.rollout.gpu_memory_utilization})
        self.llm = LLM(
            model=model_path, dtype={"fp32": "float32", "bf16": "bfloat16"}[recipe.model.dtype],
            max_model_len=recipe.model.max_length, tensor_parallel_size=recipe.rollout.tensor_parallel_size,
            enforce_eager=device == "cpu", seed=index, trust_remote_code=recipe.model.trust_remote_code,
            logprobs_mode="processed_logprobs", weight_transfer_config={"backend": recipe.weight_sync.backend},
            worker_extension_cls="frpo.rollout.weight_receiver.WorkerExtension", **memory)
        self.tokenizer = self.llm.get_tokenizer()
        self.staged = recipe.weight_sync.backend == "cpu_shm"
        self.unusable: str | None = None

    # --- sampling -------------------------------------------------------------------------------------------------

    def generate(self, requests: Sequence[GroupRequest], sampling: Sampling, version: int) -> Iterator[RolloutGroup]:
        """Sample every requested group and yield each as its last completion ends.

        version: the policy version that the caller expects these weights to be.
        Raises EngineError if the engine holds another one, or none.
        """
        self._check_version(version)
        engine = self.llm.llm_engine
        waiting: dict[GroupId, dict[int, Completion]] = {}
        by_request: dict[str, tuple[GroupRequest, int]] = {}
        for request in requests:
            waiting[request.group_id] = {}
            for sample, seed in enumerate(request.seeds):
                request_id = f"{request.group_id[0]}-{request.group_id[1]}-{sample}"
                by_request[request_id] = (request, sample)
                engine.add_request(request_id, {"prompt_token_ids": list(request.prompt.token_ids)},
                                   self._sampling_params(sampling, seed))
        try:
            while engine.has_unfinished_requests():
                for output in engine.step():
                    if not output.finished:
                        continue
                    request, sample = by_request.pop(output.request_id)
                    done = waiting[request.group_id]
                    done[sample] = self._completion(output.outputs[0], request.seeds[sample])
                    if len(done) == len(request.seeds):
                        yield RolloutGroup(group_id=request.group_id, prompt=request.prompt,
                                           completions=tuple(done[i] for i in range(len(done))))
        finally:
            if by_request:  # the caller went away: leave no request behind for the next call
                engine.abort_request(list(by_request), internal=False)

    def score(self, sequences: Sequence[tuple[Sequence[int], int]], version: int) -> list[np.ndarray]:
        """Log-probabilities (nats, temperature 1, no truncation) of given tokens under the served weights.

        sequences: (token ids, number of leading prompt tokens); returns one float64 array of the rest each.
        """
        from vllm import SamplingParams

        self._check_version(version)
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        outputs = self.llm.generate([{"prompt_token_ids": list(ids)} for ids, _ in sequences], params, use_tqdm=False)
        return [
            np.array([entry[token].logprob for entry, token in
                      zip(output.prompt_logprobs[start:], ids[start:], strict=True)])
            for output, (ids, start) in zip(outputs, sequences, strict=True)]

    def _sampling_params(self, sampling: Sampling, seed: int):
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            temperature=sampling.temperature, top_p=sampling.top_p if sampling.temperature > 0 else 1.0,
            max_tokens=sampling.max_new_tokens, seed=seed if sampling.temperature > 0 else None, logprobs=0,
            detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY)

    def _completion(self, output, seed: int) -> Completion:
        token_ids = tuple(output.token_ids)
        return Completion(
            text=self.tokenizer.decode(token_ids, skip_special_tokens=True),
            token_ids=token_ids,
            logprobs=tuple(entry[token].logprob for entry, token in zip(output.logprobs, token_ids)),
            loss_mask=(True,) * len(token_ids),
            version_spans=tuple(VersionSpan(policy_version=int(span.version), start=span.start, end=span.end)
                                for span in output.weight_versions or ()),
            seed=seed,
            finish_reason=output.finish_reason)

    # --- weights --------------------------------------------------------------------------------------------------

    def policy_version(self) -> int | None:
        """Version of the served weights; None before they have one."""
        version = self.llm.get_weight_version()
        return int(version) if version.isdigit() else None

    def serve_loaded(self, version: int) -> None:
        """Label the weights that were loaded from disk, so that they can be sampled without a push.

        Raises EngineError if they have a version already, or a push has begun: they may then be others.
        """
        held = self.policy_version()
        if self.unusable or held is not None:
            raise EngineError(f"engine {self.index}: {self.unusable or f'serves version {held} already'}; only weights "
                              "without a version are those that were loaded from disk")
        self.llm.llm_engine.set_weight_version(str(version))

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.llm.init_weight_transfer_engine({"init_info": init_info})

    def start_weight_update(self) -> None:
        """Open an update. A staged one that a dead sender left open is dropped, never finished.

        Raises EngineError if an earlier in-place push broke off: the weights are then a mixture.
        """
        if self.unusable:
            raise EngineError(f"engine {self.index}: {self.unusable}; rebuild it")
        if self.staged:
            self.llm.llm_engine.collective_rpc("abort_weight_update")
        else:
            self.unusable = "a push broke off while weights were landing in place"
        self.llm.start_weight_update()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.llm.update_weights({"update_info": update_info})

    def finish_weight_update(self, weight_version: str) -> None:
        """Swap the new weights in, label them and drop what the old ones left in the prefix cache."""
        self.unusable = f"the push of version {weight_version} broke off while weights were being swapped"
        self.llm.finish_weight_update(weight_version)
        self.llm.reset_prefix_cache()
        self.unusable = None

    def ready(self) -> int:
        """Process id, once the engine can be called."""
        return os.getpid()

    def _check_version(self, expected: int) -> None:
        if self.unusable:
            raise EngineError(f"engine {self.index}: {self.unusable}; rebuild and sync it before it serves again")
        held = self.policy_version()
        if held != expected:
            raise EngineError(f"engine {self.index} holds policy version {held}, asked to sample version {expected}; "
                              "push the weights first")
