"""assay: which of this data is worth training on?

Scores every sample of a corpus with the models you already have, and selects by the scores.
"""

from assay import ops
from assay.ops._backend import backend

__version__ = "0.1.0"
__all__ = ["backend", "ops"]
