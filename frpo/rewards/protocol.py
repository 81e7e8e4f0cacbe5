"""Define the signature of a reward function (that of TRL) and the specification by which a recipe names a function.

To load, call and check a function see `loading`, `worker` and `suite`.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

Message = dict[str, str]
"""Message of a chat: {"role": ..., "content": ...}"""

Format = Literal["text", "messages"]
"""Format of the prompts and completions that a reward function gets: strings, or message lists."""

BATCH_ARGUMENTS = ("prompts", "completions", "completion_ids")
"""Arguments of every call; no data column and no keyword argument of a recipe may take their names."""


class RewardFunction(Protocol):
    """Function that scores N completions, in whole groups, in one call.

    A function written for TRL's GRPOTrainer fits: for its standard format without changes, for its conversational
    format with `format: messages`.

    All arguments are passed by name. Their form is the recipe's `format` of this reward and does not depend on
    `data.format`:
    prompts: N strings (text): the contents of a prompt's messages, a blank line between two, without roles. Or N
        message lists (messages). The completions of one prompt follow each other.
    completions: N strings (text), or N lists `[{"role": "assistant", "content": text}]` (messages).
    completion_ids: N lists of token ids.
    columns: every column of the data set as a list of N values, None where a row lacks the column.
    kwargs: the recipe's `kwargs`, the same at every call.

    A function without `**kwargs` receives only the arguments that it names. `async def` works too.

    Returns a sequence of N numbers; None abstains (the completion is not this reward's task). NaN, infinity and numbers
    beyond 1e150 are errors. TRL's `trainer_state`, `log_extra` and `log_metric` are not passed.
    """

    def __call__(
        self, *, prompts: Sequence[str] | Sequence[list[Message]], completions: Sequence[str] | Sequence[list[Message]],
        completion_ids: Sequence[list[int]], **columns: Any,
    ) -> Sequence[float | None]: ...


@dataclass(frozen=True, kw_only=True)
class ActorSpec:
    """Ray actors that run a reward function in place of processes on this machine.

    gpus, cpus: what each actor reserves; a part of a GPU may be shared. count: number of actors.
    """

    gpus: float = 0.0
    cpus: float = 1.0
    count: int = 1


@dataclass(frozen=True, kw_only=True)
class RewardSpec:
    """One reward of a run. The recipe's `RewardSection` has the same fields and serves as well.

    name: name of the component in metrics and traces.
    function: "package.module:function" or "path/file.py:function".
    weight: factor in the sum; with 0 the reward is only logged.
    format: whether the function takes prompts and completions as "text" or as "messages".
    kwargs: passed to the function at every call.
    timeout_s: limit for one call, in seconds.
    on_error: effect of an exception, a time-out, NaN, infinity or a number beyond 1e150: "raise" stops the run,
        "abstain" counts as None.
    where: the function is called only for prompts whose column has one of these values, such as {"task": ["math"]}. On
        other prompts the reward abstains.
    processes: number of processes that run the function; with more than one, each call gets a share of a batch, in
        whole groups.
    actor: run the function in these Ray actors, where Ray runs; None: in processes on this machine.
    """

    name: str
    function: str
    weight: float = 1.0
    format: Format = "text"
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    timeout_s: float = 60.0
    on_error: Literal["raise", "abstain"] = "raise"
    where: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    processes: int = 1
    actor: ActorSpec | None = None
