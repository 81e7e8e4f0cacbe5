"""Measure a policy on held-out prompts, which were not in its training."""
