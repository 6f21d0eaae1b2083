"""Training adapters on a frozen base model, alone or several at once."""

from peftcore.train.recipe import Recipe, RecipeError, load_recipe
from peftcore.train.rows import DataError

__all__ = ["DataError", "Recipe", "RecipeError", "load_recipe"]
