"""Methods inside trainers: scores that become weights, a filter or a log in the same step."""

import importlib
from typing import Any

from assay.train import huggingface, losses, trajectories
from assay.train.joining import join
from assay.train.reweighter import Reweighter
from assay.train.sampler import WeightedSampler
from assay.train.tokens import sample_means, token_weights

__all__ = [
    "Reweighter",
    "WeightedSampler",
    "huggingface",
    "join",
    "losses",
    "sample_means",
    "token_weights",
    "trajectories",
]


def __getattr__(name: str) -> Any:
    if name == "lightning":  # its callback is a class of Lightning's
        return importlib.import_module("assay.train.lightning")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
