"""What has to train models to know: cross-fitted predictions, and datamodels fitted to retrainings."""

from assay.retrain.datamodel import SmallModelDatamodel
from assay.retrain.out_of_fold import OutOfFold, out_of_fold

__all__ = ["OutOfFold", "SmallModelDatamodel", "out_of_fold"]
