"""Training: recipes, the loop that runs them, the stages of a small model, and finetuning."""

from latent_shift.training.checkpoints import CheckpointWriteError, DamagedCheckpointError
from latent_shift.training.config import Recipe, RecipeError, load_recipe, recipe_names
from latent_shift.training.finetune_config import Finetune
from latent_shift.training.trainer import TrainingError, train

__all__ = [
    "CheckpointWriteError",
    "DamagedCheckpointError",
    "Finetune",
    "Recipe",
    "RecipeError",
    "TrainingError",
    "load_recipe",
    "recipe_names",
    "train",
]
