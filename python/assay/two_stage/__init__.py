"""Training to know: small models score and select, another trains on their choice, beside random rows and controls."""

from assay.two_stage.experiment import Question, two_stage
from assay.two_stage.laboratory import Trainee
from assay.two_stage.proof import Comparison, Cost, prove
from assay.two_stage.report import Report, Trial
from assay.two_stage.training import Evaluation, Training

__all__ = [
    "Comparison",
    "Cost",
    "Evaluation",
    "Question",
    "Report",
    "Trainee",
    "Training",
    "Trial",
    "prove",
    "two_stage",
]
