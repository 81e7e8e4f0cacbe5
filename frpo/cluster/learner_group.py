"""Drive all learner ranks as one learner: each call goes to every rank and returns when all ranks are done."""
from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from frpo.cluster.gpu_turns import GpuTurns, NoTurns
from frpo.cluster.rank import Ranks
from frpo.config.loader import AnyRecipe, dump_recipe
from frpo.config.rollout import WeightSyncSection
from frpo.data.batcher import score_batches
from frpo.data.layout import Layout
from frpo.learner.model import hidden_size
from frpo.objectives.supervised import Progress
from frpo.telemetry.sums import MetricSums
from frpo.types import Comparison, MicroBatch, OptimStepOutput, RolloutGroup, SampleId


class LearnerGroup:
    """The learner's interface for the controller. Construction connects the ranks and loads the model in all ranks."""

    def __init__(self, recipe: AnyRecipe, model_path: str, device: str, ranks: Ranks):
        self.recipe, self.ranks, self.device = recipe, ranks, device
        self.turns: NoTurns | GpuTurns = NoTurns()
        self.layout = Layout(
            num_ranks=recipe.learner.num_ranks, micro_batch_tokens=recipe.learner.micro_batch_tokens,
            packed=recipe.learner.packing, attention_length=12 * hidden_size(recipe.model, model_path))
        self.build(model_path, device)

    def build(self, model_path: str, device: str) -> None:
        """Load the model of the recipe in every rank."""
        values = (type(self.recipe), dump_recipe(self.recipe), model_path, device)
        self.ranks.call("load", "build", [(*values, environment) for environment in self.ranks.environments], {},
                        self.recipe.learner.startup_timeout_s)

    def connect_engines(self, client: Any, weight_sync: WeightSyncSection) -> None:
        """Give rank 0 the client of the rollout engines, and all ranks the section that decides how weights are sent.
        """
        self.weight_sync = weight_sync
        others = [None] * (self.recipe.learner.num_ranks - 1)
        self.ranks.call("connect engines", "connect_engines", [(each, weight_sync) for each in (client, *others)], {},
                        self.recipe.learner.timeout_s)

    def compare(self, sequences: Sequence[Sequence[int]]) -> list[list[Comparison]]:
        """Compare the models of every rank with plain transformers. See `Learner.compare`."""
        return self._all("compare", sequences)

    def score_groups(self, groups: Sequence[RolloutGroup], model: str, temperature: float | None = None
                     ) -> list[tuple[np.ndarray, ...]]:
        """Return T log-probabilities a completion, by group, under "policy" or "reference". See `Learner.score`."""
        scores = self.score(score_batches(groups, self.layout), model, temperature)
        return [tuple(scores[(*group.group_id, i)][len(group.prompt.token_ids):] for i in range(len(group.completions)))
                for group in groups]

    def keep_initial_policy(self, path: str | None = None) -> None:
        self._all("keep_initial_policy", path)

    def kl_groups(self, groups: Sequence[RolloutGroup], to: str = "reference") -> list[np.ndarray]:
        """Return an array (G,) for each group: the KL of each completion, in nats. See `Learner.kl`.

        The values are unbiased estimates of the KL of sequences.
        """
        found: dict[SampleId, float] = {}
        for answer in self._each("kl", score_batches(groups, self.layout), to=to):
            found |= answer
        return [np.array([found[(*group.group_id, i)] for i in range(len(group.completions))]) for group in groups]

    def score(self, parts: Sequence[Sequence[MicroBatch]], model: str, temperature: float | None = None
              ) -> dict[SampleId, np.ndarray]:
        """Return the log-probabilities of all tokens of every sample. parts: micro-batches `[rank][i]`.

        See `Learner.score`.
        """
        scores: dict[SampleId, np.ndarray] = {}
        for answer in self._each("score", parts, model=model, temperature=temperature):
            scores |= answer
        return scores

    def forward_backward(self, parts: Sequence[Sequence[MicroBatch]], **options: Any) -> MetricSums:
        """Accumulate one update's gradient over all ranks and return their merged metrics.

        See `Learner.forward_backward`.
        """
        return self._merged("forward_backward", parts, **options)

    def optim_step(self, total_updates: int, *, watch_movement: bool = False) -> OptimStepOutput:
        return self._all("optim_step", total_updates, watch_movement=watch_movement)[0]

    def movement_report(self) -> dict[str, tuple[bool, bool]]:
        """Return name -> (a rank got a gradient, the fp32 master weights moved on a rank)."""
        reports = self._all("movement_report")
        return {name: (any(r[name][0] for r in reports), any(r[name][1] for r in reports)) for name in reports[0]}

    def supervised_forward_backward(self, parts: Sequence[Sequence[MicroBatch]], progress: Progress, **options: Any
                                    ) -> MetricSums:
        """Accumulate (or measure) the supervised loss of one update over all ranks. See the method of `Learner`."""
        return self._merged("supervised_forward_backward", parts, progress, **options)

    def preference_forward_backward(self, parts: Sequence[Sequence[MicroBatch]], **options: Any) -> MetricSums:
        """Accumulate the gradient of one update on pairs over all ranks. See the method of `Learner`."""
        return self._merged("preference_forward_backward", parts, **options)

    def scores(self, parts: Sequence[Sequence[MicroBatch]]) -> dict[SampleId, tuple[float, float]]:
        """Return the scores of both answers of every pair. See `Learner.scores`."""
        found: dict[SampleId, tuple[float, float]] = {}
        for answer in self._each("scores", parts):
            found |= answer
        return found

    def begin_cache(self) -> None:
        self._all("begin_cache")

    def cache_reference(self, parts: Sequence[Sequence[MicroBatch]], folder: str) -> None:
        """Write the reference's states of all samples into the cache. See `Learner.cache_reference`."""
        self._each("cache_reference", parts, folder)

    def end_cache(self, folder: str) -> None:
        self._all("end_cache", folder)

    def use_cache(self, folder: str) -> None:
        self._all("use_cache", folder)

    def push_weights(self, version: int) -> None:
        self.turns.push(lambda: self.ranks.call(
            "push weights", "call", [("push_weights", version)] * self.recipe.learner.num_ranks, {},
            self.weight_sync.timeout_s))

    def make_room(self, offload: bool) -> None:
        """Call `Learner.make_room` on all ranks. This call does not start a turn of the learner."""
        self._between_turns("make_room", offload)

    def take_room(self, offload: bool) -> None:
        """Call `Learner.take_room` on all ranks. This call does not start a turn of the learner."""
        self._between_turns("take_room", offload)

    def _between_turns(self, verb: str, *args: Any) -> None:
        self.ranks.call(verb, "call", [(verb, *args)] * self.recipe.learner.num_ranks, {},
                        self.recipe.learner.timeout_s)

    def save(self, folder: str) -> None:
        self._all("save", os.path.abspath(folder))

    def load(self, folder: str) -> int:
        return self._all("load", os.path.abspath(folder))[0]

    def export(self, folder: str) -> None:
        self._all("export", os.path.abspath(folder))

    def close(self) -> None:
        """End the ranks."""
        self.ranks.close()

    def _merged(self, verb: str, parts: Sequence[Any], *args: Any, **kwargs: Any) -> MetricSums:
        merged = MetricSums()
        for metrics in self._each(verb, parts, *args, **kwargs):
            merged.update(metrics)
        return merged

    def _all(self, verb: str, *args: Any, **kwargs: Any) -> list[Any]:
        return self._call(verb, [args] * self.recipe.learner.num_ranks, kwargs)

    def _each(self, verb: str, parts: Sequence[Any], *args: Any, **kwargs: Any) -> list[Any]:
        return self._call(verb, [(part, *args) for part in parts], kwargs)

    def _call(self, verb: str, arguments: Sequence[tuple[Any, ...]], kwargs: Mapping[str, Any]) -> list[Any]:
        self.turns.learn()
        return self.ranks.call(verb, "call", [(verb, *given) for given in arguments], kwargs,
                               self.recipe.learner.timeout_s)
