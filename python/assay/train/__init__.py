"""Methods inside trainers: scores that become weights, a filter or a log in the same step."""

from assay.train.joining import join
from assay.train.reweighter import Reweighter
from assay.train.sampler import WeightedSampler

__all__ = ["Reweighter", "WeightedSampler", "join"]
