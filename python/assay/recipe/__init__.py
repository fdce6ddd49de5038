"""What to score, with which models and methods, as one YAML file of typed keys."""

from assay.recipe.errors import ChangedError, EngineError, RecipeError
from assay.recipe.methods import MethodSpec, register_method
from assay.recipe.models import ModelSpec, register_model
from assay.recipe.recipe import Recipe, load_recipe

__all__ = [
    "ChangedError",
    "EngineError",
    "MethodSpec",
    "ModelSpec",
    "Recipe",
    "RecipeError",
    "load_recipe",
    "register_method",
    "register_model",
]
