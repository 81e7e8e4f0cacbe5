"""Learner to rollout engines: one backend a file, all behind `protocol`. A backend's module has a `Sender` class."""
