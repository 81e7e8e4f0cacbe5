"""An advantage estimator in a file of one's own: rewards count by their rank within the group, not by their size."""
from dataclasses import dataclass

import numpy as np

import frpo
from frpo.objectives.base import GroupAdvantages, valid_rewards


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """A_i = b_i - mean b, b_i = sign(z_i) |z_i|^power, z_i the rank of r_i in the group from -1 to 1; ties share it."""

    power: float = 1.0

    def advantages(self, rewards_G: np.ndarray) -> GroupAdvantages:
        return valid_rewards(rewards_G).scatter(self._of_valid)

    def _of_valid(self, rewards_K: np.ndarray) -> np.ndarray:
        z_K = np.sign(rewards_K[:, None] - rewards_K[None, :]).mean(axis=1)
        b_K = np.sign(z_K) * np.abs(z_K) ** self.power
        return b_K - b_K.mean()


if __name__ == "__main__":
    from own_reward import even

    result = frpo.train({
        "extends": "smoke",
        "run": {"name": "own_objective", "dir": "runs/own_objective", "num_steps": 8},
        "rewards": [even],
        "objective": {"advantage": {"name": "examples/own_objective.py:Ranks", "power": 0.5}},
        "learner": {"lr": 2e-3, "warmup_steps": 0},
    })
    print("held-out reward before and after:", result.history[0]["eval/reward"], result.metrics["eval/reward"])
