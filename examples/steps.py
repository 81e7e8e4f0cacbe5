"""The RL loop, driven step by step: look at what was sampled, stop early, export where it stopped."""
from own_reward import even

import frpo

if __name__ == "__main__":
    recipe = {
        "extends": "smoke",
        "run": {"name": "steps", "dir": "runs/steps", "num_steps": 30},
        "rewards": [even],
        "learner": {"lr": 2e-3, "warmup_steps": 0},
        "evaluate": {"every": 0},
    }
    with frpo.steps(recipe) as run:
        for step in run:
            group = step.groups[0].scored
            best = group.group.completions[group.rewards_G.argmax()]
            print(f"step {step.number}: {group.group.prompt.messages[0]['content']!r} -> {best.text!r}")
            if step.metrics["reward/mean"] > 0.5:
                break
        print("held-out reward:", run.evaluate()["eval/reward"])
        print("exported to", run.export("runs/steps/early"))
