"""Measuring what a policy can do, on prompts it was never trained on."""
