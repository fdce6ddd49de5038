"""The probe: runs a model on a batch and returns its signals. The only home of hooks in assay."""

from assay.probe.adam import AdamState
from assay.probe.gradient import Convolution, Dense, Outer, PerSampleGradient, Scatter
from assay.probe.jvp import Jvp
from assay.probe.layers import Factors
from assay.probe.probe import Probe, Signals
from assay.probe.reductions import Displaced, Dot, Feature, Reduction, Sketched, SqNorm, TokenDot
from assay.probe.selection import tapped_parameters

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
    "Probe",
    "Reduction",
    "Scatter",
    "Signals",
    "Sketched",
    "SqNorm",
    "TokenDot",
    "tapped_parameters",
]
