"""assay: which of this data is worth training on?

Scores every sample of a corpus with the models you already have, and selects by the scores.
"""

import logging

from assay import methods, ops, retrain, select, tasks, train
from assay._version import __version__
from assay.ops import Kronecker, Mask, Rademacher, Sparse
from assay.ops._backend import backend
from assay.probe import Probe
from assay.reading import read
from assay.scoring import score

__all__ = [
    "Kronecker",
    "Mask",
    "Probe",
    "Rademacher",
    "Sparse",
    "__version__",
    "backend",
    "methods",
    "ops",
    "read",
    "retrain",
    "score",
    "select",
    "tasks",
    "train",
]

logging.getLogger("assay").addHandler(logging.NullHandler())
