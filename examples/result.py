"""What a training returns: here the one of examples/own_reward.py, which is finished."""
import frpo

result = frpo.train("examples/own_reward.yaml")
print(result)
print(result.table()[["reward/mean", "eval/reward", "eval/kl"]].tail(3).round(3))
print(result.samples[-1]["prompt"], result.samples[-1]["completion"])
model, tokenizer = result.load()
print(model.num_parameters(), "parameters in", result.export)
