"""A tiny model learns to write an expression down again, which a calculator can then answer: "2+5=" -> "2+5=7"."""
import frpo
from frpo.data.sets.arithmetic import problems

ROWS = [{"prompt": asked, "response": asked + answer} for asked, answer in problems(None, seed=0)]

if __name__ == "__main__":
    print(frpo.finetune({
        "extends": "quickstart_downstream",
        "run": {"name": "calls", "dir": "runs/calls", "num_epochs": 5},
        "model": {"path": "runs/own_reward/model"},
        "data": {"path": ROWS, "heldout": 64},
        "learner": {"ranks": "process", "num_ranks": 1, "threads": 2, "lr": 2e-3},
    }))
