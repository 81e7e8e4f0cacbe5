"""Prompts in, learner batches out: reading, rendering and tokenizing rows; laying samples out over ranks.

It does not sample, score or train, and it starts no engine.
"""
