"""Select the arguments of a reward function: the batch and its columns as lists of N, and the recipe's kwargs.

This module does not call the function. N: completions of all groups of one call.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from frpo.errors import RewardError
from frpo.loading import Parameters, did_you_mean
from frpo.rewards.protocol import BATCH_ARGUMENTS, Format, RewardSpec
from frpo.types import Completion, Prompt, RolloutGroup


def offered_arguments(
    groups: Sequence[RolloutGroup], form: Format, always: Sequence[str],
) -> dict[str, list[Any]]:
    """Return every argument that a reward of format `form` may name, each a list of N.

    The arguments are prompts, completions, token ids and all columns. Token ids are arrays here; the worker turns them
    into lists. always: columns that are passed even if no prompt has them. Raises RewardError if a column has the name
    of a batch argument.
    """
    pairs = [(group.prompt, completion) for group in groups for completion in group.completions]
    columns = dict.fromkeys([*always, *(name for group in groups for name in group.prompt.columns)])
    taken = [name for name in columns if name in BATCH_ARGUMENTS]
    if taken:
        raise RewardError(
            f"data column {taken[0]!r} has the name of an argument that every reward gets; rename the column "
            f"(reserved: {', '.join(BATCH_ARGUMENTS)})")
    return {
        "prompts": [_prompt_argument(prompt, form) for prompt, _ in pairs],
        "completions": [_completion_argument(completion, form) for _, completion in pairs],
        "completion_ids": [completion.token_ids for _, completion in pairs],
        **{name: [prompt.columns.get(name) for prompt, _ in pairs] for name in columns}}


def select_arguments(
    spec: RewardSpec, label: str, parameters: Parameters, offered: Mapping[str, list[Any]],
) -> dict[str, Any]:
    """Return the offered arguments that the function takes, and the recipe's kwargs.

    Raises RewardError if the function needs an argument that neither has, or if both have the same name.
    """
    shadowed = [name for name in spec.kwargs if name in offered]
    if shadowed:
        raise RewardError(f"{label}: kwargs has {shadowed[0]!r}, which is a data column too; rename one of them")
    missing = [name for name in parameters.required if name not in offered and name not in spec.kwargs]
    if missing:
        columns = [name for name in offered if name not in BATCH_ARGUMENTS]
        hint = did_you_mean(missing[0], columns) or did_you_mean(missing[0], ["prompts", "completions"], cutoff=0.8)
        raise RewardError(
            f"{label} needs {missing[0]!r}, which is neither a data column{hint} nor in its kwargs; "
            f"columns: {', '.join(columns) or 'none'}; kwargs: {', '.join(spec.kwargs) or 'none'}; every reward may "
            f"also take {', '.join(BATCH_ARGUMENTS)}, each a list with one value for each completion")
    taken = {name: values for name, values in offered.items() if parameters.open or name in parameters.named}
    return {**taken, **spec.kwargs}


def check_kwargs(spec: RewardSpec, label: str, parameters: Parameters) -> None:
    """Raise RewardError if the function cannot be called by name, or does not take a name of the recipe's kwargs."""
    if parameters.nameless:
        raise RewardError(f"{label} takes {', '.join(parameters.nameless)} by position only, but every argument is "
                          "passed by name; name them, remove a / after them, or take **kwargs")
    unknown = [name for name in spec.kwargs if not parameters.open and name not in parameters.named]
    if unknown:
        known = [name for name in parameters.named if name not in BATCH_ARGUMENTS]
        raise RewardError(
            f"{label} has no argument {unknown[0]!r}{did_you_mean(unknown[0], known)}, but its kwargs set it; "
            f"it takes: {', '.join(parameters.named) or 'nothing'}")


def _prompt_argument(prompt: Prompt, form: Format) -> Any:
    if form == "messages":
        return [dict(message) for message in prompt.messages]
    return "\n\n".join(message["content"] for message in prompt.messages)


def _completion_argument(completion: Completion, form: Format) -> Any:
    return [{"role": "assistant", "content": completion.text}] if form == "messages" else completion.text
