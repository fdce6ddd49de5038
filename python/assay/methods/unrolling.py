"""Gradient descent on a quadratic, in closed form: what a stretch of training makes of a gradient."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from assay.methods.eigenbases import Bases
from assay.methods.krylov import Vector, functions_of


@dataclass(frozen=True)
class Unrolled:
    """What became of gradients along a segment, in the gradients' order.

    Attributes:
        integrated: H⁻¹(1 − e^(−aH)) of each: its sum along the steps.
        before: e^(−aH) of each: the same gradient, seen from before the segment.
        remainder: what the last product changed, relative; 0 in closed form.
    """

    integrated: list[dict[str, Tensor]]
    before: list[dict[str, Tensor]]
    remainder: float = 0.0


class Segment(ABC):
    """Steps whose rates sum to a, at a curvature H that stays as it is."""

    @abstractmethod
    def unrolled(self, gradients: Sequence[Vector]) -> Unrolled: ...


@dataclass(frozen=True)
class Eigenbasis(Segment):
    """H in its eigenbasis, parameter by parameter."""

    rate: float
    bases: Bases

    def unrolled(self, gradients: Sequence[Vector]) -> Unrolled:
        integrated, before = (
            [self.bases.apply(function, gradient) for gradient in gradients] for function in _functions(self.rate)
        )
        return Unrolled(integrated, before)


@dataclass(frozen=True)
class Products(Segment):
    """H by its products, and steps that are multiplied with a diagonal P, an optimiser's: of e^(−aPH).

    PH is similar to the symmetric S = √P H √P: H⁻¹(1 − e^(−aHP)) = √P S⁻¹(1 − e^(−aS)) √P, e^(−aHP) = √P⁻¹ e^(−aS) √P.

    Attributes:
        product: vectors -> H times each.
        roots: √P by parameter, 0 where nothing moves; None: P = 1.
        iterations: products at most.
    """

    rate: float
    product: Callable[[Sequence[Vector]], Sequence[Vector]]
    roots: Vector | None
    iterations: int

    def unrolled(self, gradients: Sequence[Vector]) -> Unrolled:
        found, remainder, _ = functions_of(
            self._symmetric, [self._times_root(g) for g in gradients], _functions(self.rate), self.iterations
        )
        before = [{name: self._over_root(name, g) for name, g in v.items()} for v in found[1]]
        return Unrolled([self._times_root(v) for v in found[0]], before, remainder)

    def _symmetric(self, vectors: Sequence[Vector]) -> list[dict[str, Tensor]]:
        return [self._times_root(v) for v in self.product([self._times_root(v) for v in vectors])]

    def _times_root(self, vector: Vector) -> dict[str, Tensor]:
        return {name: g if self.roots is None else g * self.roots[name] for name, g in vector.items()}

    def _over_root(self, name: str, part: Tensor) -> Tensor:
        return part if self.roots is None else torch.where(self.roots[name] > 0, part / self.roots[name], 0.0)


def _functions(rate: float) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    return partial(_integrated, rate), partial(_before, rate)


def _integrated(rate: float, values: Tensor) -> Tensor:
    """(1 − e^(−aσ)) / σ, a at 0."""
    x = rate * values
    return rate * torch.where(x > 0, -torch.expm1(-x) / x, 1.0)


def _before(rate: float, values: Tensor) -> Tensor:
    return torch.exp(-rate * values)
