"""The tasks of a recipe, one file each: what a row holds, and how rows become batches."""

from assay.recipe.tasks import (  # they register themselves
    causal_lm,
    classification,
    contrastive,
    judge,
    regression,
    text,
    token_classification,
)
from assay.recipe.tasks.base import (
    TASKS,
    Columns,
    Encoded,
    Encoder,
    OwnShapes,
    ReadsColumns,
    ReadsFiles,
    ReadsOptional,
    ShowsTokens,
    Stacked,
    Stacks,
    TaskSpec,
    attempt,
)
from assay.recipe.tasks.own_columns import with_columns_of, without_columns

__all__ = [
    "TASKS",
    "Columns",
    "Encoded",
    "Encoder",
    "OwnShapes",
    "ReadsColumns",
    "ReadsFiles",
    "ReadsOptional",
    "ShowsTokens",
    "Stacked",
    "Stacks",
    "TaskSpec",
    "attempt",
    "causal_lm",
    "classification",
    "contrastive",
    "judge",
    "regression",
    "text",
    "token_classification",
    "with_columns_of",
    "without_columns",
]
