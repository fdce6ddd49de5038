"""Folds of a parameter's per-sample gradient to a few numbers per sample, while the backward pass runs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from assay.ops import Sketch
from assay.probe.gradient import PerSampleGradient
from assay.probe.terms import Dense


@runtime_checkable
class Reduction(Protocol):
    """Called once per parameter that it names; the probe adds up the results over the parameters.

    A parameter that a batch does not use has gradient zero, and the reduction is not called for it (see ``Displaced``).
    """

    @property
    def parameters(self) -> Collection[str]:
        """The names of the parameters wanted, as in ``model.named_parameters()``."""
        ...

    def __call__(self, parameter: str, gradient: PerSampleGradient) -> Tensor:
        """This parameter's share, (B,)."""
        ...


@runtime_checkable
class Homogeneous(Reduction, Protocol):
    """A reduction f with f(c·g) = c^degree f(g)."""

    degree: ClassVar[int]


Look = Callable[[slice, slice, Tensor], Tensor]
"""Of some rows, some samples, and their gradients (b, …) there: what these give, (b,)."""


@runtime_checkable
class ByRows(Homogeneous, Protocol):
    """A reduction that adds up over a parameter's rows, and can look at a gradient as ``PerSampleGradient.by_rows``
    gives it."""

    def by_rows(self, parameter: str, gradient: PerSampleGradient) -> Look | Tensor:
        """What looks at the gradient's pieces; or, of one reduction, a tensor for their sum: its share is 0."""
        ...


@runtime_checkable
class Feature(Reduction, Protocol):
    """A reduction to ``size`` numbers per sample, (B, size); each parameter's are added up in its ``place``."""

    @property
    def size(self) -> int: ...

    def place(self, parameter: str) -> slice:
        """Where this parameter's numbers go: places of its own, or the same for several, which are then summed."""
        ...


@runtime_checkable
class Displaced(Feature, Protocol):
    """A feature that is not 0 where the gradient is, an optimiser's step say. It is asked for every parameter that no
    sample of the batch reaches, so that a sample's feature is the same in any batch."""

    def at_zero(self, parameter: str) -> Tensor:
        """What a sample whose gradient in this parameter is 0 gets in its ``place``, (width,)."""
        ...


@runtime_checkable
class MadeByRows(Protocol):
    """Directions by parameter that can be made without ever being whole."""

    def by_rows(self, parameter: str) -> Callable[[slice], Tensor]:
        """What makes some rows of one; it is asked for all of them, once, in their order."""
        ...


@dataclass(frozen=True)
class _Along:
    """Something of the gradient along a direction, by parameter."""

    direction: Mapping[str, Tensor]
    degree: ClassVar[int] = 1

    @property
    def parameters(self) -> Collection[str]:
        return self.direction.keys()


@dataclass(frozen=True)
class Dot(_Along):
    """⟨gradient of sample b, direction⟩ over the parameters that ``direction`` names."""

    def __call__(self, parameter: str, gradient: PerSampleGradient) -> Tensor:
        with _naming(parameter):
            return gradient.dot(self.direction[parameter])

    def by_rows(self, parameter: str, gradient: PerSampleGradient) -> Look:
        whole = self.direction
        if isinstance(whole, MadeByRows):
            along = whole.by_rows(parameter)
        else:
            direction = whole[parameter]
            with _naming(parameter):
                gradient.check_direction(direction)
            along = direction.__getitem__
        some = torch.empty(0)

        def dot(rows: slice, samples: slice, values: Tensor) -> Tensor:
            nonlocal some
            if samples.start == 0:
                some = along(rows)
            return Dense(values).dot(some)

        return dot


@contextmanager
def _naming(parameter: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{parameter}: {error}") from error


@dataclass(frozen=True)
class TokenDot(_Along):
    """Each token's part of ``Dot``, (B, T): what the positions at which the model reads the token give of the gradient.

    NaN where the task's mask says that there is no token.
    """

    def __call__(self, parameter: str, gradient: PerSampleGradient) -> Tensor:
        try:
            return gradient.dot_by_position(self.direction[parameter])
        except ValueError as error:
            raise ValueError(f"{parameter}: {error}; scores per token need another choice of layers") from error


@dataclass(frozen=True)
class SqNorm:
    """‖gradient of sample b‖² over ``parameters``."""

    parameters: Collection[str]
    degree: ClassVar[int] = 2

    def __call__(self, parameter: str, gradient: PerSampleGradient) -> Tensor:
        return gradient.sqnorm()

    def by_rows(self, parameter: str, gradient: PerSampleGradient) -> Look:
        return lambda rows, samples, values: Dense(values).sqnorm()


@dataclass(frozen=True)
class Projected:
    """Where random projections of something by parameter go: each has one of its own, keyed by the parameter's name.

    Attributes:
        shapes: by parameter.
        sketch: the projection, under any name.
        together: every parameter's projection is summed into the same ``sketch.dim`` numbers (the projection of the
            whole gradient, as in TRAK). Otherwise they are laid end to end, and a parameter with no more than
            ``sketch.dim`` elements is kept as it is.
    """

    shapes: Mapping[str, Sequence[int]]
    sketch: Sketch
    together: bool = False

    @property
    def parameters(self) -> Collection[str]:
        return self.shapes.keys()

    @property
    def size(self) -> int:
        return self.sketch.dim if self.together else sum(map(self._width, self.shapes))

    def place(self, parameter: str) -> slice:
        if self.together:
            return slice(0, self.sketch.dim)
        before = itertools.takewhile(lambda name: name != parameter, self.shapes)
        start = sum(map(self._width, before))
        return slice(start, start + self._width(parameter))

    def _width(self, parameter: str) -> int:
        return min(math.prod(self.shapes[parameter]), self.sketch.dim)

    def keeps(self, parameter: str) -> bool:
        """Whether it is not projected, but kept as it is."""
        return not self.together and math.prod(self.shapes[parameter]) <= self.sketch.dim


@dataclass(frozen=True)
class Sketched(Projected):
    """A random projection of the per-sample gradient: inner products of features are unbiased for those of gradients.

    No parameter's is scaled, so that the features' inner product stands for the whole gradient's, whatever the layers'
    shapes.
    """

    degree: ClassVar[int] = 1

    def __call__(self, parameter: str, gradient: PerSampleGradient) -> Tensor:
        if self.keeps(parameter):
            return gradient.dense().reshape(gradient.samples, -1)
        return gradient.sketch(self.sketch.named(parameter))


@dataclass
class Reduced:
    """What reductions have given so far, (B,), (B, width) or (B, positions) by key.

    ``scale`` (B,): what each sample's gradient comes multiplied with; ``unscaled`` takes it out again. What a single
    reduction uses, it uses as it comes.
    """

    size: int
    reductions: Mapping[str, Reduction]
    like: Tensor
    positions: int | None = None
    scale: Tensor | None = None
    values: dict[str, Tensor] = field(default_factory=dict)
    touched: set[str] = field(default_factory=set)  # parameters in which a sample has a gradient

    def __post_init__(self) -> None:
        self._features = {key: r for key, r in self.reductions.items() if isinstance(r, Feature)}
        for key, reduction in self.reductions.items():
            width = (self._features[key].size,) if key in self._features else ()
            if isinstance(reduction, TokenDot):
                if self.positions is None:
                    raise ValueError(f"reduction {key!r} is by token, and the task does not tell how many there are")
                width = (self.positions,)
            self.values[key] = self.like.new_zeros(self.size, *width)

    def wants(self, name: str) -> bool:
        return any(name in reduction.parameters for reduction in self.reductions.values())

    def add(self, name: str, gradient: PerSampleGradient) -> None:
        self.touched.add(name)
        wanting = {key: reduction for key, reduction in self.reductions.items() if name in reduction.parameters}
        if self.scale is not None and len(wanting) > 1:
            by_rows = {key: reduction for key, reduction in wanting.items() if isinstance(reduction, ByRows)}
            if gradient.has_rows and len(by_rows) == len(wanting):
                self._add_by_rows(name, gradient, by_rows)
                return
            gradient = gradient.multiplied_out()
        for key, reduction in wanting.items():
            own = gradient
            if self.scale is not None and not isinstance(reduction, Homogeneous):
                own = gradient.scaled(self.scale.reciprocal())
            self._add(key, name, reduction(name, own))

    def _add_by_rows(self, name: str, gradient: PerSampleGradient, reductions: Mapping[str, ByRows]) -> None:
        """All of them in one pass."""
        looks: dict[str, Look] = {}
        total = None
        for key, reduction in reductions.items():
            look = reduction.by_rows(name, gradient)
            if isinstance(look, Tensor):
                total = look
            else:
                looks[key] = look
        found = {key: torch.zeros(self.size, dtype=torch.float64, device=gradient.device) for key in looks}
        for rows, samples, values in gradient.by_rows(total):
            for key, look in looks.items():
                found[key][samples] += look(rows, samples, values)
        for key, value in found.items():
            self._add(key, name, value.to(values.dtype))

    def add_untouched(self, tapped: Collection[str]) -> None:
        """What features make of a gradient of 0 in the tapped parameters that no sample reaches."""
        for key, reduction in self.reductions.items():
            if isinstance(reduction, Displaced):
                for name in [n for n in reduction.parameters if n in tapped and n not in self.touched]:
                    self._add(key, name, reduction.at_zero(name).expand(self.size, -1))

    def unscaled(self) -> dict[str, Tensor]:
        """The values of the samples' own gradients."""
        values = dict(self.values)
        for key, reduction in self.reductions.items():
            if self.scale is not None and isinstance(reduction, Homogeneous):
                by_sample = self.scale.to(values[key]).reshape(-1, *[1] * (values[key].ndim - 1))
                values[key] = values[key] / by_sample**reduction.degree
        return values

    def _add(self, key: str, name: str, value: Tensor) -> None:
        total = self.values[key]
        total = total.to(torch.promote_types(total.dtype, value.dtype))
        place = total[:, self._features[key].place(name)] if key in self._features else total
        if value.shape != place.shape:
            found, expected = tuple(value.shape), tuple(place.shape)
            raise ValueError(f"reduction {key!r} gave shape {found} for parameter {name!r}; expected {expected}")
        place += value.to(total.device)
        self.values[key] = total
