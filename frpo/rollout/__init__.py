"""Sample completions: one vLLM engine, its weight receivers inside vLLM, and the sampler over several engines."""
