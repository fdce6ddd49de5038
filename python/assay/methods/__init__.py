"""Methods: one file each, named as its paper names it. Signals in, named scores out."""

from assay.methods.base import Column, Method, Need
from assay.methods.ensemble import Ensemble, ensemble_scores
from assay.methods.grad_mimic import GradMimic
from assay.methods.label_quality import label_quality, model_weights
from assay.methods.out_of_fold import OutOfFold, out_of_fold
from assay.methods.scorer import Scorer

__all__ = [
    "Column",
    "Ensemble",
    "GradMimic",
    "Method",
    "Need",
    "OutOfFold",
    "Scorer",
    "ensemble_scores",
    "label_quality",
    "model_weights",
    "out_of_fold",
]
