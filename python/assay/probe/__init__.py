"""The probe: runs a model on a batch and returns its signals. The only home of hooks in assay."""

from assay.probe.adam import AdamState
from assay.probe.formulas import Factors
from assay.probe.gradient import PerSampleGradient
from assay.probe.jvp import Jvp
from assay.probe.pooling import Pooled
from assay.probe.probe import Probe
from assay.probe.reductions import Displaced, Dot, Feature, Projected, Reduction, Sketched, SqNorm, TokenDot
from assay.probe.selection import tapped_parameters
from assay.probe.signals import Signals
from assay.probe.terms import Convolution, Dense, Outer, Scatter

__all__ = [
    "AdamState",
    "Convolution",
    "Dense",
    "Displaced",
    "Dot",
    "Factors",
    "Feature",
    "Jvp",
    "Outer",
    "PerSampleGradient",
    "Pooled",
    "Probe",
    "Projected",
    "Reduction",
    "Scatter",
    "Signals",
    "Sketched",
    "SqNorm",
    "TokenDot",
    "tapped_parameters",
]
