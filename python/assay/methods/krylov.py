"""Functions of a symmetric matrix times vectors, by products with it alone: the method of Lanczos."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Vector = Mapping[str, Tensor]
"""One vector in parts by name."""
Function = Callable[[Tensor], Tensor]
"""Of eigenvalues, element by element."""

# What another product changes of a result, relative: less changes no rank.
_ENOUGH = 1e-3


def functions_of(
    product: Callable[[Sequence[Vector]], Sequence[Vector]],
    vectors: Sequence[Vector],
    functions: Sequence[Function],
    iterations: int,
) -> tuple[list[list[dict[str, Tensor]]], float, int]:
    """f(M)v for each function and vector, from each vector's own Krylov space: as many vectors as iterations are kept.

    Args:
        product: vectors -> M times each; M is symmetric and has no eigenvalue below 0.
        vectors: v.
        functions: f.
        iterations: products at most; fewer where one more would change no result by a thousandth.

    Returns:
        By function and vector; by how much the last product changed a result, relative, at most; the products made.
    """
    spaces = [_Space.of(vector) for vector in vectors]
    change, made = 1.0, 0
    while made < iterations and change > _ENOUGH:
        moved = product([space.basis[-1] for space in spaces])
        for space, own in zip(spaces, moved, strict=True):
            space.grow(own)
        made += 1
        change = max((space.change(f) for space in spaces for f in functions), default=0.0)
    return [[space.result(f) for space in spaces] for f in functions], change, made


@dataclass
class _Space:
    """Orthonormal vectors in which M is tridiagonal; the first is along the start, of length ``norm``."""

    norm: float
    basis: list[dict[str, Tensor]]
    diagonal: list[float] = field(default_factory=list)
    beside: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, start: Vector) -> _Space:
        norm = dot(start, start) ** 0.5
        return cls(norm, [_over(start, norm)])

    def grow(self, moved: Vector) -> None:
        """Add M times the last vector."""
        self.diagonal.append(dot(moved, self.basis[-1]))
        rest, before = dict(moved), dot(moved, moved) ** 0.5
        for _ in range(2):  # once leaves rounding that grows
            for vector in self.basis:
                rest = add(rest, vector, -dot(rest, vector))
        length = dot(rest, rest) ** 0.5
        exhausted = not length > 1e-6 * before  # the space is all that M makes of the start
        self.beside.append(0.0 if exhausted else length)
        self.basis.append(_over(rest, 0.0 if exhausted else length))

    def change(self, function: Function) -> float:
        """Of a result by the last product, relative to it."""
        if len(self.diagonal) < 2:
            return 0.0 if not self.beside[0] else 1.0
        now, before = self._coordinates(function, len(self.diagonal)), self._coordinates(function, -1)
        length = float(now.norm())
        return float((now - torch.nn.functional.pad(before, (0, 1))).norm()) / length if length else 0.0

    def result(self, function: Function) -> dict[str, Tensor]:
        found = {name: torch.zeros_like(part) for name, part in self.basis[0].items()}
        for c, vector in zip(self._coordinates(function, len(self.diagonal)).tolist(), self.basis, strict=False):
            found = add(found, vector, self.norm * c)
        return found

    def _coordinates(self, function: Function, size: int) -> Tensor:
        """f(T)e₁ in float64, T the leading block of ``size``."""
        diagonal = torch.tensor(self.diagonal[:size], dtype=torch.float64)
        beside = torch.tensor(self.beside[: len(diagonal) - 1], dtype=torch.float64)
        matrix = torch.diag(diagonal) + torch.diag(beside, 1) + torch.diag(beside, -1)
        values, vectors = torch.linalg.eigh(matrix)
        found: Tensor = vectors @ (function(values.clamp(min=0)) * vectors[0])
        return found


def _over(a: Vector, length: float) -> dict[str, Tensor]:
    """a / length, 0 if that is 0. Divided: the inverse of a tiny length is beyond float32."""
    return {name: part / length if length > 0 else torch.zeros_like(part) for name, part in a.items()}


def add(a: Vector, b: Vector, times: float) -> dict[str, Tensor]:
    """a + times · b."""
    return {name: part.add(b[name], alpha=times) for name, part in a.items()}


def dot(a: Vector, b: Vector) -> float:
    """⟨a, b⟩ in float64."""
    return float(torch.stack([(part.double() * b[name].double()).sum() for name, part in a.items()]).sum())
