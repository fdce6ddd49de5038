"""Folds of a parameter's per-sample gradient to one number per sample, while the backward pass runs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from assay.probe.gradient import PerSampleGradient


@runtime_checkable
class Reduction(Protocol):
    """Called once per parameter that it names; the probe adds up the results over the parameters.

    A parameter that a batch does not use has gradient zero, and the reduction is not called for it.
    """

    @property
    def parameters(self) -> Collection[str]:
        """The names of the parameters wanted, as in ``model.named_parameters()``."""
        ...

    def __call__(self, parameter: str, gradient: PerSampleGradient) -> Tensor:
        """This parameter's share, (B,)."""
        ...


@dataclass(frozen=True)
class Dot:
    """⟨gradient of sample b, direction⟩ over the parameters that ``direction`` names."""

    direction: Mapping[str, Tensor]

    @property
    def parameters(self) -> Collection[str]:
        return self.direction.keys()

    def __call__(self, parameter: str, gradient: PerSampleGradient) -> Tensor:
        try:
            return gradient.dot(self.direction[parameter])
        except ValueError as error:
            raise ValueError(f"{parameter}: {error}") from error


@dataclass(frozen=True)
class SqNorm:
    """‖gradient of sample b‖² over ``parameters``."""

    parameters: Collection[str]

    def __call__(self, parameter: str, gradient: PerSampleGradient) -> Tensor:
        return gradient.sqnorm()
