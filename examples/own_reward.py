"""Reinforcement learning with a reward of one's own: a tiny model, made on the spot, learns to prefer even digits."""
import frpo


def even(completions, **_):
    """Share of a completion's characters that are even digits."""
    return [sum(sign in "02468" for sign in text) / max(len(text), 1) for text in completions]


if __name__ == "__main__":
    result = frpo.train({
        "extends": "smoke",
        "run": {"name": "own_reward", "dir": "runs/own_reward", "num_steps": 12, "save_every": 6},
        "rewards": [even],
        "learner": {"lr": 2e-3, "warmup_steps": 0},
    })
    print(result)
    print("held-out reward before and after:", result.history[0]["eval/reward"], result.metrics["eval/reward"])
