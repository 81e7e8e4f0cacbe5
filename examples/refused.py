"""A mistake in a recipe is an error before anything starts."""
import frpo

try:
    frpo.train({"extends": "smoke", "learner": {"learning_rate": 1e-3}})
except frpo.ConfigError as error:
    print(error)
