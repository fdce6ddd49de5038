"""What to score, with which models and methods, as one YAML file of typed keys."""

from assay.recipe.errors import ChangedError, EngineError, RecipeError
from assay.recipe.methods import MethodSpec, register_method
from assay.recipe.models import ModelSpec, register_model
from assay.recipe.recipe import Recipe, load_recipe
from assay.recipe.targeted import TargetedSpec

__all__ = [
    "ChangedError",
    "EngineError",
    "MethodSpec",
    "ModelSpec",
    "Recipe",
    "RecipeError",
    "TargetedSpec",
    "load_recipe",
    "register_method",
    "register_model",
]
