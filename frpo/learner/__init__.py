"""The learner: one DeepSpeed ZeRO rank with the operations that the loops call.

This package does not import Ray, vLLM or rewards.
"""
