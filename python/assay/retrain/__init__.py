"""What has to train models to know: cross-fitted predictions, datamodels, derivatives through whole runs."""

from assay.retrain.datamodel import SmallModelDatamodel
from assay.retrain.magic import Magic, magic
from assay.retrain.magic_optimizers import SGD, Adam, optimizer_of
from assay.retrain.magic_plan import Plan
from assay.retrain.magic_smoothness import metasmoothness
from assay.retrain.magic_training import Diverged, Training
from assay.retrain.out_of_fold import OutOfFold, out_of_fold

__all__ = [
    "SGD",
    "Adam",
    "Diverged",
    "Magic",
    "OutOfFold",
    "Plan",
    "SmallModelDatamodel",
    "Training",
    "magic",
    "metasmoothness",
    "optimizer_of",
    "out_of_fold",
]
