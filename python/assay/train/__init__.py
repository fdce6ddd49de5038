"""Methods inside trainers: scores that become weights, a filter or a log in the same step."""

from assay.train import huggingface
from assay.train.reweighter import Reweighter

__all__ = ["Reweighter", "huggingface"]
