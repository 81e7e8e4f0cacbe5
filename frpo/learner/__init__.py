"""The learner: one DeepSpeed ZeRO rank with the verbs that the loops call. Knows nothing of Ray, vLLM or rewards."""
