"""The tasks of a recipe, one file each: what a row holds, and how rows become batches."""

from assay.recipe.tasks import causal_lm, classification, regression, token_classification  # they register themselves
from assay.recipe.tasks.base import TASKS, Columns, Encoded, Encoder, ReadsColumns, TaskSpec, attempt

__all__ = [
    "TASKS",
    "Columns",
    "Encoded",
    "Encoder",
    "ReadsColumns",
    "TaskSpec",
    "attempt",
    "causal_lm",
    "classification",
    "regression",
    "token_classification",
]
