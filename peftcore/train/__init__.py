"""Training one adapter on a frozen base model, written in PEFT's own files."""

from peftcore.train.data import DataError, Example, load_examples, tokenize
from peftcore.train.recipe import Recipe, RecipeError, load_recipe
from peftcore.train.trainer import TrainingSummary, new_adapter, save_adapter, train

__all__ = [
    "DataError",
    "Example",
    "Recipe",
    "RecipeError",
    "TrainingSummary",
    "load_examples",
    "load_recipe",
    "new_adapter",
    "save_adapter",
    "tokenize",
    "train",
]
