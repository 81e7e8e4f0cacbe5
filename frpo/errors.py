"""Define the errors that a user can meet. Each error names the given value, the allowed values and what to change."""
from __future__ import annotations

import os


class FrpoError(Exception):
    """Base of every error that frpo raises on purpose; the command line prints it without a traceback.

    Its text can be shown anywhere: control characters and halves of characters, which a file may hold, are escaped.
    """

    def __str__(self) -> str:
        return "".join(char if char.isprintable() or char in "\n\t" else repr(char)[1:-1] for char in super().__str__())


class ConfigError(FrpoError):
    """Error: a recipe, an override or a combination of settings is wrong."""


class DataError(FrpoError):
    """Error: a data file or row is missing, broken or does not fit the model's window."""


class UnknownTokenError(DataError):
    """Error: a text to learn has a character for which the tokenizer has no token."""


class ModelError(FrpoError):
    """Error: a model or tokenizer is missing or lacks something that training needs."""


class RewardError(FrpoError):
    """Error: a reward function raised, timed out, or did not return one number (or None) for each completion."""


class RolloutHookError(FrpoError):
    """Error: a rollout hook raised, timed out, or did not return one episode with log-probabilities."""


class CheckpointError(FrpoError):
    """Error: a checkpoint is incomplete, of another recipe, or not at the expected place."""


class StorageError(FrpoError):
    """Error: a file cannot be written, as on a full disk."""


class EngineError(FrpoError):
    """Error: an engine or learner process died, timed out, or got a request for weights that it does not hold."""


class LostNodeError(EngineError):
    """Error: a node is gone that a run was about to use, or on which it has reserved GPUs."""


class LostRankError(EngineError):
    """Error: a learner rank died, gave no answer in time, or could not exchange data with the others."""


class InvariantError(FrpoError):
    """Error: a fail-fast check of the run failed (log-prob gap, a tensor that never moved, ...)."""


def here() -> str:
    """Name the folder where relative paths begin, in words for messages."""
    return f"relative paths begin at {os.getcwd()}"
