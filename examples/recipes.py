"""The forms that a recipe has in Python."""
from own_reward import even

import frpo

by_name = frpo.load_recipe("smoke", "run.num_steps=8")
by_path = frpo.load_recipe("examples/own_reward.yaml")
of_objects = frpo.Recipe(
    run=frpo.Run(name="objects", dir="runs/objects", num_steps=8, device="cpu"),
    model=frpo.Model(tiny=frpo.TinyModel(), dtype="fp32", max_length=64),
    data=frpo.Data(path="arithmetic", format="text", max_prompt_tokens=16),
    rollout=frpo.Rollout(max_new_tokens=6),
    rewards=[frpo.Reward(name="even", function=even)],
    objective=frpo.Objective(advantage=frpo.DrGRPO()),
)
print(by_name.run.num_steps, by_path.learner.lr, of_objects.rewards[0].function)
