"""Recipes, running them over a corpus, and curating the corpus by the scores: what the command line calls."""

from assay.engine.curation import Curated, curate
from assay.engine.errors import ChangedError, EngineError, RecipeError
from assay.engine.local import Plan, Report, make_plan, run
from assay.engine.methods import MethodSpec, register_method
from assay.engine.models import ModelSpec, register_model
from assay.engine.recipe import Recipe, load_recipe
from assay.engine.status import Scores, open_scores
from assay.engine.targeted import TargetedSpec

__all__ = [
    "ChangedError",
    "Curated",
    "EngineError",
    "MethodSpec",
    "ModelSpec",
    "Plan",
    "Recipe",
    "RecipeError",
    "Report",
    "Scores",
    "TargetedSpec",
    "curate",
    "load_recipe",
    "make_plan",
    "open_scores",
    "register_method",
    "register_model",
    "run",
]
