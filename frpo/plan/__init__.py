"""Compute the memory that a recipe needs on every GPU from the model's config, without loading or starting anything.

`shape`, `parts`, `learner`, `engine` and `gpus` are arithmetic alone. `counting` reads the config, `command` prints.
All sizes are in bytes; GB is decimal, 10^9 bytes.
"""
