"""Sampling: one vLLM engine, what it needs inside vLLM to receive weights, and the sampler over several engines."""
