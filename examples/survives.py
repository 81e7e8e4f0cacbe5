"""Two tiny policies, made with and without robustness: what do they keep through the same fine-tuning?"""
import frpo

EVEN = "rewards=[{name: even, function: 'examples/own_reward.py:even'}]"
POLICY = [EVEN, "run.num_steps=10", "learner.lr=2e-3", "learner.warmup_steps=0", "evaluate.every=0"]
ROWS = [{"prompt": f"{a}+{b}=", "response": "7" * 5} for a in range(10) for b in range(10)]

if __name__ == "__main__":
    rows = frpo.SupervisedData(path=ROWS).path  # written to runs/inputs/
    results = frpo.retention({
        "run": {"name": "survives", "dir": "runs/survives"},
        "policies": {
            "frpo": {"recipe": "smoke", "overrides": POLICY},
            "dr_grpo": {"recipe": "smoke", "overrides": [*POLICY, "objective.advantage={name: dr_grpo}"]},
        },
        "downstream": {
            "sevens": {"recipe": "quickstart_downstream", "means": "fine-tuning to answer with sevens",
                       "overrides": [f"data.path={rows}", "run.num_epochs=4", "learner.lr=3e-4"]},
        },
        "measure": {"kept": {"recipe": "smoke", "overrides": [EVEN], "means": "even digits"}, "max_kl": 1.0},
        "certificate": None,
        "compare": [["frpo", "dr_grpo"]],
    })
    for policy in ("frpo", "dr_grpo"):
        kept = results.measured((policy, "sevens"), "end")
        print(policy, "after the fine-tuning:", kept)
    print(results.failures or "no stage failed")
