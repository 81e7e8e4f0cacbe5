"""The errors a user can meet. Each names what was given, what is allowed and what to change."""
from __future__ import annotations

import os


class FrpoError(Exception):
    """Base of every error that frpo raises on purpose; the command line prints it without a traceback."""


class ConfigError(FrpoError):
    """A recipe, an override or a combination of settings is wrong."""


class DataError(FrpoError):
    """A data file or row is missing, broken or does not fit the model's window."""


class UnknownTokenError(DataError):
    """A text to learn has a character for which the tokenizer has no token."""


class ModelError(FrpoError):
    """A model or tokenizer is missing or lacks what training needs."""


class RewardError(FrpoError):
    """A reward function raised, timed out, or returned something other than one number (or None) a completion."""


class RolloutHookError(FrpoError):
    """A rollout hook raised, timed out, or returned something other than one episode with log-probabilities."""


class CheckpointError(FrpoError):
    """A checkpoint is incomplete, of another recipe, or not where it was expected."""


class EngineError(FrpoError):
    """An engine or learner process died, timed out or was asked for weights it does not hold."""


class InvariantError(FrpoError):
    """A fail-fast check of the run did not hold (log-prob gap, a tensor that never moved, ...)."""


def here() -> str:
    """Where relative paths begin, in words for messages."""
    return f"from {os.getcwd()}, where relative paths begin"
