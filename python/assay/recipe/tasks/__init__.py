"""The tasks of a recipe, one file each: what a row holds, and how rows become batches."""

from assay.recipe.tasks import (  # they register themselves
    causal_lm,
    classification,
    contrastive,
    regression,
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
    TaskSpec,
    attempt,
)

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
    "TaskSpec",
    "attempt",
    "causal_lm",
    "classification",
    "contrastive",
    "regression",
    "token_classification",
]
