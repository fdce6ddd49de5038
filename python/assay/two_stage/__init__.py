"""The whole of it in one call: small models score and select, a large one trains on their choice, beside controls."""

from assay.two_stage.experiment import Question, two_stage
from assay.two_stage.report import Report, Trial
from assay.two_stage.training import Evaluation, Training

__all__ = ["Evaluation", "Question", "Report", "Training", "Trial", "two_stage"]
