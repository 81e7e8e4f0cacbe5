"""Define the frozen records that cross a boundary, one per stage of a training step.

A stage never fills in fields of an earlier record: it wraps the earlier record in its own. This module computes
nothing. It does not import torch or an engine.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, TypeVar

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

Metrics: TypeAlias = "dict[str, tuple[float | Tensor, float | Tensor, str]]"
"""Metrics by name: name -> (sum, count, "mean"), or (largest value, count, "max")."""

GroupId = tuple[int, int]
"""Id of a group: (step, draw index within the step). Unique in a run even where prompt uids repeat over epochs."""

SampleId = tuple[int, int, int]
"""Id of a sample: (step, draw index, sample index within the group)."""

LARGEST_REWARD = 1e150
"""Largest absolute value of a reward. With larger rewards the squares in a standard deviation overflow float64."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One row of a data set, rendered and tokenized. `columns` holds the values that rewards need (answer, task, ...).

    messages: the messages that were rendered. A prompt that is verbatim text is one message of the user.
    origin: "file:line" for error messages, where the place is known.
    """

    uid: str
    messages: tuple[Mapping[str, str], ...]
    token_ids: tuple[int, ...]
    columns: Mapping[str, Any] = field(default_factory=dict)
    origin: str = field(default="", compare=False)


def is_one_of(value: Any, wanted: Sequence[Any]) -> bool:
    """Check whether `value` is one of the wanted values. Unlike in Python, 1 does not equal true and 0 not false."""
    return any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in wanted)


def matches(columns: Mapping[str, Any], where: Mapping[str, Sequence[Any]]) -> bool:
    """Check whether every column named in `where` has one of the values given there. An empty `where` matches all."""
    return all(name in columns and is_one_of(columns[name], wanted) for name, wanted in where.items())


@dataclass(frozen=True, kw_only=True)
class VersionSpan:
    """Span of tokens `[start, end)` of a completion, sampled by the weights of `policy_version`."""

    policy_version: int
    start: int
    end: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Completion:
    """One sampled continuation of a prompt. Its three arrays may be given as any sequences.

    token_ids: int64, T ids, the end-of-sequence token included when `finish_reason` is "stop".
    logprobs: float64, T log-probabilities in nats under the *sampling* distribution (after temperature and top-p).
    loss_mask: bool, T flags; False marks a token that the policy did not choose (a tool's output).
    finish_reason: "stop", or "length" for a truncated completion.
    """

    text: str
    token_ids: np.ndarray
    logprobs: np.ndarray
    loss_mask: np.ndarray
    version_spans: tuple[VersionSpan, ...]
    seed: int
    finish_reason: str

    def __post_init__(self) -> None:
        for name, dtype in (("token_ids", np.int64), ("logprobs", np.float64), ("loss_mask", np.bool_)):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=dtype))

    def __eq__(self, other: object) -> bool:
        """Return whether all fields are equal. Arrays are compared number by number."""
        if not isinstance(other, Completion):
            return NotImplemented
        mine, theirs = ([getattr(completion, each.name) for each in fields(Completion)] for completion in (self, other))
        return all(np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b
                   for a, b in zip(mine, theirs, strict=True))

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"


@dataclass(frozen=True, kw_only=True)
class RolloutGroup:
    """All completions of one drawn prompt."""

    group_id: GroupId
    prompt: Prompt
    completions: tuple[Completion, ...]


@dataclass(frozen=True, kw_only=True)
class ScoredGroup:
    """A group and its rewards.

    rewards_G: float64, absolute values at most LARGEST_REWARD; NaN marks a completion on which every reward abstained.
    terms: every reward component by name, unweighted, NaN where the component abstained.
    """

    group: RolloutGroup
    rewards_G: np.ndarray
    terms: Mapping[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class ScoredBatch:
    """Groups that one step sampled, by group id: the chosen groups to learn from, and those that dynamic sampling
    replaced.

    positions: number of positions by which the step advanced in the stream of prompts.
    selection: state of prompt selection after the step. counts: events during sampling, by metric name.
    """

    chosen: tuple[ScoredGroup, ...]
    replaced: tuple[ScoredGroup, ...]
    positions: int
    counts: Mapping[str, float]
    selection: Mapping[str, Sequence[float]] = field(default_factory=dict)

    @property
    def drawn(self) -> list[ScoredGroup]:
        """Return all groups, sorted by group id."""
        return sorted((*self.chosen, *self.replaced), key=lambda scored: scored.group.group_id)


@dataclass(frozen=True, kw_only=True)
class AdvantagedGroup:
    """A scored group and its advantages (float64, sum zero, 0 where the reward abstained).

    scalars_G: numbers of a scalariser, from which the advantages are computed; None: the weighted sums of rewards.
    ref_logprobs: per completion, T log-probabilities under the frozen reference; None if no KL term needs them.
    """

    scored: ScoredGroup
    advantages_G: np.ndarray
    stats: Mapping[str, float]
    ref_logprobs: tuple[np.ndarray, ...] | None = None
    scalars_G: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class TrainingSample:
    """One sequence in the learner's form: prompt and completion, S tokens in all, of which T have a loss.

    Arrays over S are aligned with `token_ids`: entry s belongs to the prediction *of* token s. Weights are divided
    already (by the sequence's length, by the global number of sequences, ...), so the learner only sums.
    policy_weight: S factors of the surrogate term; kl_weight: S factors of the KL term. Zero where nothing is learned.
    kl_metric_weight: 1 / T at the tokens with a loss, for the metric of the mean KL of a sequence. All zero if the KL
    of this sequence is not counted.
    """

    WEIGHTS: ClassVar = ("policy_weight", "kl_weight", "kl_metric_weight")

    sample_id: SampleId
    token_ids: np.ndarray
    loss_mask: np.ndarray
    advantage: float
    policy_weight: np.ndarray
    kl_weight: np.ndarray
    kl_metric_weight: np.ndarray
    rollout_logprobs: np.ndarray
    old_logprobs: np.ndarray | None = None
    ref_logprobs: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class Example:
    """One row of supervised data: S tokens. The tokens with a loss are the assistant's.

    origin: place of the row for a user, such as "train.jsonl:17". loss_mask: S flags, never True at the first token.
    """

    uid: str
    origin: str
    token_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]


@dataclass(frozen=True, kw_only=True)
class SupervisedSample:
    """One example in the learner's form, S tokens.

    sample_id: (0, place within the update, index of the example in its data set).
    Arrays over S are aligned with `token_ids`: entry s belongs to the prediction *of* token s. weight is divided
    already, so the learner only sums. weight is zero where nothing is learned.
    """

    WEIGHTS: ClassVar = ("weight",)

    sample_id: SampleId
    token_ids: np.ndarray
    loss_mask: np.ndarray
    weight: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two answers to one prompt, each with the prompt as one sequence. `first` should score higher.

    origin: place of the row for a user. target: share of judgements for `first`; 1, or 0.5 for a tie. margin: least
    difference of the scores. signs: 1 for a harmful answer, -1 for a harmless one, 0 where this is unknown.
    """

    uid: str
    origin: str
    first: tuple[int, ...]
    second: tuple[int, ...]
    target: float = 1.0
    margin: float = 0.0
    signs: tuple[int, int] = (0, 0)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Return both sequences end to end, in an order that does not depend on which one is better."""
        return (*min(self.first, self.second), *max(self.first, self.second))


@dataclass(frozen=True, kw_only=True)
class PairSample:
    """One pair in the learner's form: both sequences end to end, S tokens.

    sample_id: (0, place within the update, index of the pair in its data set).
    lengths: tokens of each sequence. loss_mask: S flags, True at the last token of each sequence, where its score is
    read. weight: the same at both; divided already, so the learner only sums. target, margin, signs: as in `Pair`.
    """

    WEIGHTS: ClassVar = ("weight",)

    sample_id: SampleId
    token_ids: np.ndarray
    lengths: tuple[int, int]
    loss_mask: np.ndarray
    weight: np.ndarray
    target: float
    margin: float
    signs: tuple[int, int]


Sample = TypeVar("Sample", TrainingSample, SupervisedSample, PairSample)

AnySample = TrainingSample | SupervisedSample | PairSample


def sequence_lengths(sample: AnySample) -> tuple[int, ...]:
    """Return the tokens of each sequence of a sample, which `token_ids` holds end to end. Most samples have one."""
    return sample.lengths if isinstance(sample, PairSample) else (len(sample.token_ids),)

MicroBatch = tuple[AnySample, ...]
"""Micro-batch: samples of one kind."""

RankBatches = tuple[tuple[MicroBatch, ...], ...]
"""Micro-batches `[rank][i]` for one optimizer update or one scoring pass. Every rank has the same number of them."""


Gap = tuple[float, float]
"""Mean and largest absolute difference over all tokens: of log-probs in nats, of scores in standard deviations."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Differences between log-probabilities of the same tokens, computed in several ways by the model named `model`.

    values: "log-probabilities", or "scores" of a reward model, in units of their standard deviation.
    "Plain" log-probabilities come from the network's own logits, one sequence at a time.
    together: all sequences in one micro-batch, as in training, minus plain.
    alone: one sequence at a time by the learner's own functions, minus plain.
    repeated: a second computation of the same micro-batch, minus the first.
    before: plain values of all tokens of one sequence but the last, minus the same values with another last token.
    layers_apart: number of attention layers, of `layers`, that kept the sequences of a pack apart.
    failure: why several sequences, or one if `fails_alone`, could not be computed; all other values are unknown then.
    """

    model: str
    packed: bool
    values: str = "log-probabilities"
    layers: int
    layers_apart: int = 0
    together: Gap = (math.inf, math.inf)
    alone: Gap = (math.inf, math.inf)
    repeated: Gap = (math.inf, math.inf)
    before: Gap = (math.inf, math.inf)
    failure: str | None = None
    fails_alone: bool = False


@dataclass(frozen=True, kw_only=True)
class OptimStepOutput:
    """Result of one optimizer step: policy version after it, gradient norm before clipping, learning rate applied."""

    policy_version: int
    grad_norm: float
    lr: float


@dataclass(frozen=True, kw_only=True)
class RunState:
    """State that a resume restores besides the learner's own state (parameters, optimizer, schedule).

    file_offsets: size in bytes of each append-only file at the checkpoint; a resume truncates the file to this size.
    controllers: values that change during the run, such as the coefficient of the KL (`objectives.kl_control`).
    """

    step: int
    policy_version: int
    data_cursor: int
    recipe_digest: str
    file_offsets: Mapping[str, int]
    controllers: Mapping[str, float] = field(default_factory=dict)


Probe = Callable[[RunState, int], dict[str, float]]
"""Function (state, updates or steps of the whole run) -> metrics of the policy at this state; empty without any."""
