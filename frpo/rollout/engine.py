"""Run one vLLM engine: sample whole groups, score given tokens, and receive weights under a version label.

`RolloutEngine` is a plain class; `cluster` puts it into a Ray actor. The engine does not choose prompts and does not
depend on rewards or other engines.
"""
from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from frpo.config.sections import Recipe
from frpo.errors import EngineError, InvariantError
from frpo.imports import keep_imported, quick_imports
from frpo.rollout.construction import arguments, ends_if_broken, environment
from frpo.rollout.episodes import Episodes, checked, completion_of, load_hook
from frpo.rollout.hook import Client, Turn
from frpo.rollout.sharing import Caller, SharedEngine
from frpo.types import Completion, GroupId, Prompt, RolloutGroup, VersionSpan
from frpo.weight_sync.cpu_shm import remove_leftovers, shared_folder

WEIGHTS, CACHE = "weights", "kv_cache"
"""vLLM's names of the memory that its sleep frees."""
FORGET_WEIGHTS = 2
"""Level of vLLM's sleep that keeps no copy of the weights. The next push restores them."""


@dataclass(frozen=True, kw_only=True)
class GroupRequest:
    """One group to sample; `seeds` has one entry a completion."""

    group_id: GroupId
    prompt: Prompt
    seeds: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Parameters of sampling. temperature 0 is greedy."""

    temperature: float
    top_p: float
    max_new_tokens: int


class RolloutEngine:
    """Sample from one policy. The engine refuses to sample until a push or `serve_loaded` gives its weights a version.
    """

    def __init__(self, recipe: Recipe, model_path: str, device: str, index: int = 0):
        os.environ.update(environment(recipe.rollout, device))
        with quick_imports():
            from vllm import LLM
        keep_imported()
        self.index = index
        self.llm = LLM(**arguments(recipe, model_path, device, index))
        if device == "cpu" and recipe.rollout.tensor_parallel_size > 1:
            self.llm.collective_rpc("unname_shared_memory")
        self.shared = SharedEngine(self.llm.llm_engine, recipe.weight_sync.timeout_s, ends_if_broken)
        self.tokenizer = self.llm.get_tokenizer()
        self.staged = recipe.weight_sync.staged_here
        self.unusable: str | None = None
        self.lora = recipe.model.lora if recipe.weight_sync.adapters else None
        if self.lora is not None:
            remove_leftovers()
        self.pushed_adapters = 0
        self.given_up: set[str] = set()
        self.lacks_weights = False
        self.hook_timeout_s = recipe.rollout.hook_timeout_s
        self.hook = None if recipe.rollout.hook is None else load_hook(recipe.rollout.hook)

    # --- sampling -------------------------------------------------------------------------------------------------

    def generate(self, requests: Sequence[GroupRequest], sampling: Sampling, version: int, or_newer: bool = False
                 ) -> Iterator[RolloutGroup]:
        """Sample every requested group and yield each as its last completion ends.

        version: the expected policy version of the weights. or_newer: also accept newer versions. Weights pushed
        meanwhile sample the rest of the unfinished completions; the version spans record this.
        Raises EngineError if the engine holds another version, or none.
        """
        if not or_newer:  # then no push is running, but a push that broke off may still hold the engine
            self._check_usable()
        done: dict[GroupId, dict[int, Completion]] = {request.group_id: {} for request in requests}
        run = self._completions if self.hook is None else self._episodes
        with self.shared.caller() as caller:
            for request, sample, completion in run(caller, requests, sampling, lambda: self._check_version(
                    version, or_newer)):
                group = done[request.group_id]
                group[sample] = completion
                if len(group) == len(request.seeds):
                    yield RolloutGroup(group_id=request.group_id, prompt=request.prompt,
                                       completions=tuple(group[i] for i in range(len(group))))

    def _completions(self, caller: Caller, requests: Sequence[GroupRequest], sampling: Sampling,
                     check: Callable[[], None]) -> Iterator[tuple[GroupRequest, int, Completion]]:
        """Sample each completion in one turn."""
        by_key = {str(number): pair for number, pair in enumerate(_samples(requests))}

        def vllm_requests() -> dict[str, Any]:
            check()
            return {key: (self._prompt(request.prompt.token_ids),
                          self._sampling_params(sampling, request.seeds[sample]))
                    for key, (request, sample) in by_key.items()}

        caller.add(vllm_requests)
        while caller.unfinished:
            for key, output in caller.outputs():
                request, sample = by_key[key]
                yield request, sample, self._completion(output, request.seeds[sample])

    def _episodes(self, caller: Caller, requests: Sequence[GroupRequest], sampling: Sampling,
                  check: Callable[[], None]) -> Iterator[tuple[GroupRequest, int, Completion]]:
        """Sample each completion by the rollout hook, in any number of turns."""
        def request_of(token_ids: Sequence[int], wanted: int, stops: tuple[int, ...], seed: int) -> tuple[Any, Any]:
            return self._prompt(token_ids), self._sampling_params(
                replace(sampling, max_new_tokens=wanted), seed, stops)

        with self.shared.turn():
            check()
        episodes = Episodes(caller, request_of, self._turn)
        assert self.hook is not None  # or each sample is one turn
        calls = {}
        for request, sample in _samples(requests):
            client = Client(request.prompt, request.seeds[sample], sampling.max_new_tokens, self.tokenizer,
                            episodes.ask)
            calls[request.group_id, sample] = checked(self.hook, client, self.hook_timeout_s)
        by_id = {request.group_id: request for request in requests}
        for (group_id, sample), episode in episodes.run(calls):
            text = self.tokenizer.decode(episode.token_ids, skip_special_tokens=True)
            request = by_id[group_id]
            yield request, sample, completion_of(episode, request.seeds[sample], text)

    def score(self, sequences: Sequence[tuple[Sequence[int], int]], version: int) -> list[np.ndarray]:
        """Return log-probabilities (nats, temperature 1, no truncation) of given tokens under the served weights.

        sequences: (token ids, number of leading prompt tokens). Returns one float64 array for each sequence, without
        its prompt tokens.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, flat_logprobs=True, detokenize=False,
                                output_kind=RequestOutputKind.FINAL_ONLY)

        def vllm_requests() -> dict[str, Any]:
            self._check_version(version)
            return {str(i): (self._prompt(ids), params) for i, (ids, _) in enumerate(sequences)}

        self._check_usable()
        found: dict[str, np.ndarray] = {}
        with self.shared.caller() as caller:
            caller.add(vllm_requests)
            while caller.unfinished:
                for key, output in caller.outputs():
                    _, start = sequences[int(key)]
                    found[key] = np.array(_of_tokens(output.prompt_logprobs, start))
        return [found[str(i)] for i in range(len(sequences))]

    def _prompt(self, token_ids: Sequence[int]) -> dict[str, Any]:
        """Return vLLM's form of a prompt. Its cache salt, the policy version, excludes prefixes cached under others."""
        return {"prompt_token_ids": list(token_ids), "cache_salt": self.llm.get_weight_version()}

    def _sampling_params(self, sampling: Sampling, seed: int, stop_token_ids: tuple[int, ...] = ()) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            temperature=sampling.temperature, top_p=sampling.top_p if sampling.temperature > 0 else 1.0,
            max_tokens=sampling.max_new_tokens, seed=seed if sampling.temperature > 0 else None, logprobs=0,
            flat_logprobs=True, stop_token_ids=list(stop_token_ids), detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY)

    def _turn(self, output: Any) -> Turn:
        """Convert vLLM's output of one request to a turn."""
        said = output.outputs[0]
        token_ids = tuple(said.token_ids)
        return Turn(
            text=self.tokenizer.decode(token_ids, skip_special_tokens=True), token_ids=token_ids,
            logprobs=tuple(_of_tokens(said.logprobs)),
            version_spans=tuple(VersionSpan(policy_version=int(span.version), start=span.start, end=span.end)
                                for span in said.weight_versions or ()),
            finish_reason=said.finish_reason)

    def _completion(self, output: Any, seed: int) -> Completion:
        turn = self._turn(output)
        return Completion(text=turn.text, token_ids=np.array(turn.token_ids), logprobs=np.array(turn.logprobs),
                          loss_mask=np.ones(len(turn.token_ids)), version_spans=turn.version_spans, seed=seed,
                          finish_reason=turn.finish_reason)

    # --- weights --------------------------------------------------------------------------------------------------

    def policy_version(self) -> int | None:
        """Return the version of the served weights; None if the weights have no version yet."""
        version = self.llm.get_weight_version()
        return int(version) if version.isdigit() else None

    def usable(self) -> bool:
        """Return whether the weights are whole: no push broke off while it changed them."""
        return self.unusable is None

    def serve_loaded(self, version: int) -> None:
        """Label the weights that were loaded from disk, so that the engine can sample without a push.

        Raises EngineError if the weights have a version already or a push has begun. They may then be other weights.
        """
        with self.shared.turn():
            held = self.policy_version()
            if self.unusable or held is not None:
                raise EngineError(f"engine {self.index}: {self.unusable or f'it already serves version {held}'}; "
                                  "label weights as loaded from disk only if they have no version yet")
            self.llm.llm_engine.set_weight_version(str(version))

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        with self.shared.turn():
            self.llm.init_weight_transfer_engine({"init_info": init_info})

    def start_weight_update(self) -> None:
        """Open an update. Drop a staged update that a dead sender left open.

        During an in-place update the engine does not sample until the update is finished.
        Raises EngineError if an earlier in-place push broke off: the weights are then a mixture.
        """
        if self.unusable:
            raise EngineError(f"engine {self.index}: {self.unusable}; rebuild it")
        if not self.staged:
            self.shared.hold()
            self.unusable = "a push broke off while it changed weights in place"
        with self.shared.turn_of_update():
            if self.staged:
                self.llm.llm_engine.collective_rpc("abort_weight_update")
            self.llm.start_weight_update()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        with self.shared.turn_of_update():
            self.llm.update_weights({"update_info": update_info})

    def finish_weight_update(self, weight_version: str) -> None:
        """Swap the new weights in, label them, and clear the prefix cache of the old weights.

        While requests are unfinished, the cache keeps its blocks. The cache salt prevents their use by requests of
        another version. Raises InvariantError if vLLM's model did not load all of the push. The engine then samples
        no more.
        """
        with self.shared.turn_of_update():
            self.unusable = f"the push of version {weight_version} broke off while weights were being swapped"
            problems = [found for found in self.llm.llm_engine.collective_rpc("load_weight_update") if found]
            if problems:
                self.unusable = f"the push of version {weight_version} did not reach the whole model"
                raise InvariantError(
                    f"rollout engine {self.index}: vLLM does not load the pushed weights as it loads the checkpoint: "
                    f"{problems[0]}. It would serve a mixture of old and new weights. This version of vLLM cannot be "
                    "used to train this model family; fine-tune it instead (frpo finetune)")
            self.llm.finish_weight_update(weight_version)
            if self.lora is not None:  # only now: vLLM drops all adapters when it finishes an update
                self._take_adapters()
            if not self.llm.llm_engine.has_unfinished_requests():
                self.llm.reset_prefix_cache()
            self.unusable = None
            self.lacks_weights = False
        if not self.staged:
            self.shared.release()

    def sleep(self) -> None:
        """Free the memory of weights and cache. The engine samples again once both are back and weights are pushed."""
        with self.shared.turn():
            self.given_up, self.lacks_weights = {WEIGHTS, CACHE}, True
            self.llm.reset_prefix_cache()
            self.llm.sleep(level=FORGET_WEIGHTS)

    def wake(self, tag: str) -> None:
        """Allocate the memory of WEIGHTS, whose values are lost, or of CACHE again. A new engine has both."""
        with self.shared.turn():
            if tag in self.given_up:
                self.llm.wake_up([tag])
                self.given_up.remove(tag)

    def _take_adapters(self) -> None:
        """Replace the last adapters by those that the workers hold, for every request from now on."""
        from vllm.lora.request import LoRARequest

        engine, held = self.llm.llm_engine, self.pushed_adapters
        with shared_folder() as folder:
            engine.collective_rpc("write_adapter", args=(str(folder), self.lora))
            request = LoRARequest(f"policy-{held + 1}", held + 1, str(folder))
            engine.add_lora(request)
        self.pushed_adapters, self.shared.options = held + 1, {"lora_request": request}

    def ready(self) -> int:
        """Return the process id. The call returns once the engine is loaded."""
        return os.getpid()

    def _check_usable(self) -> None:
        if self.given_up or self.lacks_weights:
            raise EngineError(f"engine {self.index} has slept and got no weights since; wake it and push the weights "
                              "first")
        if self.unusable:
            raise EngineError(f"engine {self.index}: {self.unusable}; rebuild and sync it before it serves again")

    def _check_version(self, expected: int, or_newer: bool = False) -> None:
        self._check_usable()
        held = self.policy_version()
        if held is None or (held < expected if or_newer else held != expected):
            raise EngineError(f"engine {self.index} holds policy version {held}, but must sample version {expected}"
                              f"{' or a newer one' if or_newer else ''}; push the weights first")


def _of_tokens(flat: Any, start: int = 0) -> list[float]:
    """Return the log-probability of each token from `start` on in vLLM's FlatLogprobs. A token's own value comes first.
    """
    return [flat.logprobs[place] for place in flat.start_indices[start:]]


def _samples(requests: Sequence[GroupRequest]) -> Iterator[tuple[GroupRequest, int]]:
    """Return every sample of every group, in order."""
    return ((request, sample) for request in requests for sample in range(len(request.seeds)))
