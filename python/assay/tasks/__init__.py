"""Tasks: what a batch is, how a model is run on it, and what one sample's loss is.

A sample's loss never depends on its neighbours in the batch or on padding, so that its score is a fact about
the sample. The one exception says so in its definition: a contrastive loss compares a sample with the rest of
its batch.
"""

from assay.tasks.base import IGNORE, Outputs, Task
from assay.tasks.causal_lm import CausalLM
from assay.tasks.contrastive import Contrastive
from assay.tasks.judge import Judge
from assay.tasks.losses import row_losses
from assay.tasks.margin import Margin
from assay.tasks.output_layer import OutputLayer
from assay.tasks.prompt import Prompt
from assay.tasks.residual import Residual
from assay.tasks.response import Response
from assay.tasks.sampled import Sampled
from assay.tasks.supervised import Classification, Regression
from assay.tasks.token_classification import TokenClassification

__all__ = [
    "IGNORE",
    "CausalLM",
    "Classification",
    "Contrastive",
    "Judge",
    "Margin",
    "OutputLayer",
    "Outputs",
    "Prompt",
    "Regression",
    "Residual",
    "Response",
    "Sampled",
    "Task",
    "TokenClassification",
    "row_losses",
]
