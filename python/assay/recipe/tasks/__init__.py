"""The tasks of a recipe, one file each: what a row holds, and how rows become batches."""

from assay.recipe.tasks import causal_lm, classification, contrastive  # they register themselves
from assay.recipe.tasks.base import TASKS, Encoded, Encoder, ShowsTokens, TaskSpec, attempt, beside

__all__ = [
    "TASKS",
    "Encoded",
    "Encoder",
    "ShowsTokens",
    "TaskSpec",
    "attempt",
    "beside",
    "causal_lm",
    "classification",
    "contrastive",
]
