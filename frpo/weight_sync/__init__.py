"""Transfer of weights from the learner to the rollout engines.

Each backend is one file, whose module has a `Sender` class. All backends are used through `protocol`.
"""
