"""The memory that a recipe needs on every GPU, worked out from the model's config: nothing is loaded, nothing started.

`shape`, `parts`, `learner`, `engine` and `gpus` are arithmetic alone. `counting` reads the config, `command` prints.
All sizes are in bytes; GB is decimal, 10^9 bytes.
"""
