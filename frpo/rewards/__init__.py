"""Call rewards (user functions and verifiers) in worker processes; check, weigh and sum their values.

A reward is a plain function with TRL's signature (see `protocol`), tried before a run begins (see `trial`). A wrong
length, an exception or a time-out is a named error or a counted abstention, never a zero. This package computes no
advantages, writes no log and does not sample.
"""
from frpo.loading import load_function
from frpo.rewards.control import shuffled
from frpo.rewards.protocol import RewardFunction, RewardSpec
from frpo.rewards.stream import ScoreStream
from frpo.rewards.suite import RewardSuite, ScoreReport
from frpo.rewards.worker import RewardCallError, RewardTimeoutError, RewardWorker

__all__ = [
    "RewardCallError", "RewardFunction", "RewardSpec", "RewardSuite", "RewardTimeoutError", "RewardWorker",
    "ScoreReport", "ScoreStream", "load_function", "shuffled"]
