"""Training: recipes, stages, and the loop that runs them."""

from latent_shift.training.config import Recipe, RecipeError, load_recipe, recipe_names
from latent_shift.training.trainer import train

__all__ = ["Recipe", "RecipeError", "load_recipe", "recipe_names", "train"]
