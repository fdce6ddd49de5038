"""What has to train models to know: cross-fitted predictions, datamodels, derivatives through whole runs, forgetting,
ablations by merging, subsets and models chosen by training a few."""

from assay.retrain.choosing import Choice, choose_model, leep
from assay.retrain.datamodel import SmallModelDatamodel
from assay.retrain.forgetting import Forgotten, forget, klom, margins, outputs_without
from assay.retrain.gradient_matching import Distilled, cluster_effects, clusters_by_class, distil
from assay.retrain.magic import Magic, magic
from assay.retrain.magic_optimizers import SGD, Adam, optimizer_of
from assay.retrain.magic_plan import Plan
from assay.retrain.magic_smoothness import metasmoothness
from assay.retrain.magic_training import Diverged, Training
from assay.retrain.merging import Ablations, ablate, average, merge_files
from assay.retrain.model_specific import Subsample, predicted_drops, subsample
from assay.retrain.out_of_fold import OutOfFold, out_of_fold
from assay.retrain.readout_switching import CodeLengths, SwitchingCode, readout_switching

__all__ = [
    "SGD",
    "Ablations",
    "Adam",
    "Choice",
    "CodeLengths",
    "Distilled",
    "Diverged",
    "Forgotten",
    "Magic",
    "OutOfFold",
    "Plan",
    "SmallModelDatamodel",
    "Subsample",
    "SwitchingCode",
    "Training",
    "ablate",
    "average",
    "choose_model",
    "cluster_effects",
    "clusters_by_class",
    "distil",
    "forget",
    "klom",
    "leep",
    "magic",
    "margins",
    "merge_files",
    "metasmoothness",
    "optimizer_of",
    "out_of_fold",
    "outputs_without",
    "predicted_drops",
    "readout_switching",
    "subsample",
]
