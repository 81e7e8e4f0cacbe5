"""Define and check every key of a recipe: `sections` holds the models, `loader` reads recipes into them."""
from frpo.config.loader import dump_recipe, load_recipe
from frpo.config.sections import Recipe

__all__ = ["Recipe", "dump_recipe", "load_recipe"]
