"""The per-sample gradient of one parameter, kept as factors and never multiplied out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from assay.ops import Sketch
from assay.probe.experts import Experts
from assay.probe.head import Head
from assay.probe.packing import Packed
from assay.probe.terms import Convolution, Dense, Outer, Pulled, Scatter, Term, sum_of
from assay.tasks.base import wide

# Gradients are multiplied out at most this many numbers at a time.
_ELEMENTS = 1 << 24
# So much more memory than its factors a gradient may take that is multiplied out to be used several times.
_WORTH = 2
# Of a gradient that is multiplied out for several uses at once so many numbers are made at a time, to stay in a cache.
_TILE = 1 << 20
# Positions from which on that costs less than a product with the factors for every use.
_LONG = 32
# Terms that cancel below this share of their own squared norms are multiplied out, one sample at a time.
_CANCELLED = 1e-2


@dataclass(frozen=True)
class PerSampleGradient:
    """The exact gradient of every sample's loss in *one* parameter, summed over all uses of the parameter.

    Attributes:
        shape: the parameter's shape.
        terms: what it is the sum of, each in the parameter's own orientation. At most one of a kind: several
            uses are laid end to end along T; where one is dense, all are.
        by_position: a direction of the parameter's shape -> each position's part of ``dot``, (B, T).

    Results are (B,) float32, or float64 where a factor is float64.
    """

    shape: torch.Size
    terms: Sequence[Term]
    by_position: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        if not self.terms:
            raise ValueError("a PerSampleGradient needs at least one term; a parameter without uses has gradient 0")
        object.__setattr__(self, "shape", torch.Size(self.shape))  # a value that stands in for a parameter has a tuple
        object.__setattr__(self, "terms", _merge(self.terms, self.shape))

    def dot(self, direction: Tensor) -> Tensor:
        """⟨gradient of sample b, direction⟩, for a direction of the parameter's shape -> (B,).

        Raises:
            ValueError: the direction has another shape.
        """
        self.check_direction(direction)
        return sum_of([term.dot(direction) for term in self.terms])

    def check_direction(self, direction: Tensor) -> None:
        """ValueError unless it has the parameter's shape."""
        if direction.shape != self.shape:
            raise ValueError(f"direction of shape {tuple(direction.shape)}; expected {tuple(self.shape)}")

    def dot_by_position(self, direction: Tensor) -> Tensor:
        """What each position gives of ``dot``, (B, T), in the task's positions.

        Raises:
            ValueError: a use of the parameter has other positions, or none.
        """
        if self.by_position is None:
            raise ValueError("the positions of this gradient are not known any more")
        return self.by_position(direction)

    def sqnorm(self) -> Tensor:
        """‖gradient of sample b‖² -> (B,), with every cross term between uses and positions."""
        if isinstance(self.terms[0], Head) and isinstance(self.terms[-1], Scatter):
            return self.terms[0].sqnorm(self.terms[-1].grads, self.terms[-1].ids)
        own = sum_of([term.sqnorm() for term in self.terms])
        if len(self.terms) == 1:
            return own
        outer, scatter = self.terms
        assert isinstance(outer, Outer)  # the two kinds that are not merged, beside Head and Scatter above
        assert isinstance(scatter, Scatter)
        total = own + 2 * _outer_scatter(outer, scatter)
        for b in torch.nonzero(total < _CANCELLED * own).flatten().tolist():
            one = slice(b, b + 1)
            total[b] = sum_of([term.part(one).dense(self.shape) for term in (outer, scatter)]).square().sum()
        return total

    @property
    def samples(self) -> int:
        """B."""
        return self.terms[0].samples

    def split(self, samples: int) -> Iterator[PerSampleGradient]:
        """The same for so many samples at a time."""
        for start in range(0, self.samples, samples):
            yield self.part(slice(start, start + samples))

    def part(self, samples: slice) -> PerSampleGradient:
        """The same of these samples alone."""
        return PerSampleGradient(self.shape, [term.part(samples) for term in self.terms])

    def outer(self) -> Outer | None:
        """The outer products of which the gradient of a matrix is the sum; None: it is none.

        The weight of an ungrouped convolution is a matrix too, over unfolded windows (1602.01407). A fused output
        layer's residuals are made.
        """
        term = self.terms[0]
        if len(self.terms) > 1 or len(self.shape) < 2:
            return None
        if isinstance(term, Convolution):
            return term.outer() if term.groups == 1 else None
        if isinstance(term, Head):
            return Outer(term.residual(), term.hidden)
        return term if isinstance(term, Outer) and len(self.shape) == 2 else None

    def total(self) -> tuple[Tensor, Tensor]:
        """The sum over the samples with a finite gradient, of the parameter's shape, and which those are, (B,) bool."""
        totals, finite = [], []
        for part in self.split(max(1, _ELEMENTS // self.shape.numel())):
            term = part.terms[0]
            if isinstance(term, Outer) and len(part.terms) == 1:  # one product for all samples
                fine = term.finite()
                left, right = (wide(side[fine].flatten(0, 1)) for side in (term.left, term.right))
                totals.append((left.T @ right).reshape(self.shape))
            else:
                dense = part.dense()
                fine = dense.isfinite().reshape(len(dense), -1).all(1)
                totals.append(dense[fine].sum(0))
            finite.append(fine)
        return sum_of(totals), torch.cat(finite)

    def scaled(self, factors: Tensor) -> PerSampleGradient:
        """Sample b's gradient times ``factors`` (B,)."""
        return PerSampleGradient(self.shape, [term.scaled(factors) for term in self.terms])

    def weighted(self, factors: Tensor) -> Tensor:
        """Σ_b factors_b · gradient of sample b, of the parameter's shape: a gradient as autograd gives it."""
        return sum_of([term.weighted(factors, self.shape) for term in self.terms])

    def multiplied_out(self) -> PerSampleGradient:
        """The same as matrices where these are not much larger than their factors: for who looks at it several times.

        A product with a direction then costs no matrix product of its own, nor does a weighted sum.
        """
        outer, *rest = self.terms
        if isinstance(outer, Packed):
            return PerSampleGradient(self.shape, [outer.multiplied_out()])
        if not isinstance(outer, Outer) or outer.left.dtype != torch.float32 or outer.right.dtype != torch.float32:
            return self
        length, rows, columns = *outer.left.shape[1:], outer.right.shape[2]
        if rows * columns > _WORTH * length * (rows + columns):
            return self
        values = outer.dense((rows, columns))
        for scatter in rest:  # of at most one other kind
            if not isinstance(scatter, Scatter):
                return self
            sample = torch.arange(len(values), device=values.device)[:, None].expand_as(scatter.ids)
            values.index_put_((sample, scatter.ids), wide(scatter.grads).to(values), accumulate=True)
        return PerSampleGradient(self.shape, [Dense(values.reshape(-1, *self.shape))])

    @property
    def has_rows(self) -> bool:
        """Whether ``by_rows`` can be asked for, and costs less than two products with the factors."""
        outer, *rest = self.terms
        if not isinstance(outer, Outer) or not all(isinstance(term, Scatter) for term in rest):
            return False
        fine = outer.left.dtype == outer.right.dtype == wide(outer.left[:0]).dtype
        return fine and outer.left.shape[1] >= _LONG

    @property
    def device(self) -> torch.device:
        """Of what ``by_rows`` gives: another than the losses', where a model lies on several."""
        assert isinstance(self.terms[0], Outer)
        return self.terms[0].right.device

    def empty(self) -> Tensor:
        """Room for a sum of what ``by_rows`` gives, of the parameter's shape."""
        assert isinstance(self.terms[0], Outer)
        return self.terms[0].right.new_empty(self.shape)

    def by_rows(self, total: Tensor | None = None) -> Iterator[tuple[slice, slice, Tensor]]:
        """The gradient multiplied out piece by piece, for several uses while a piece is in a cache.

        Gives rows of the parameter (its first dimension), samples, and their gradients there, (samples, rows, …), which
        the next piece overwrites. All samples of some rows come one after the other.

        Args:
            total: of the parameter's shape; gets the sum over the samples.
        """
        outer, *scatters = self.terms
        assert isinstance(outer, Outer)
        height, width = outer.left.shape[2], outer.right.shape[2]
        step = min(height, max(1, _TILE // width))
        together = min(self.samples, max(1, _TILE // (step * width)))
        buffer = outer.right.new_empty(together * step * width)
        scattered = [term.pieces(height, step, together) for term in scatters if isinstance(term, Scatter)]
        for first in range(0, height, step):
            rows = slice(first, min(first + step, height))
            for b in range(0, self.samples, together):
                samples = slice(b, min(b + together, self.samples))
                shape = (samples.stop - b, rows.stop - first, width)
                place = buffer[: math.prod(shape)] if total is None or b or together > 1 else total[rows]
                values = torch.bmm(outer.left[samples, :, rows].mT, outer.right[samples], out=place.view(shape))
                for pieces in scattered:
                    sample, row, grads = next(pieces)
                    values.index_put_((sample, row), grads.to(values.dtype), accumulate=True)
                yield rows, samples, values.view(*shape[:2], *self.shape[1:])
                if total is not None and (b or together > 1):
                    own, so_far = values.sum(0) if shape[0] > 1 else values[0], total[rows].view(shape[1:])
                    so_far.add_(own) if b else so_far.copy_(own)

    def sketch(self, sketch: Sketch) -> Tensor:
        """A projection of the gradient -> (B, sketch.dim): the uses' sketches, summed, for sketching is linear."""
        return sum_of([term.sketch(sketch, self.shape) for term in self.terms])

    def dense(self) -> Tensor:
        """The gradient multiplied out, (B, *shape): for small parameters and for tests."""
        return sum_of([term.dense(self.shape) for term in self.terms])


def _merge(terms: Sequence[Term], shape: Sequence[int]) -> tuple[Term, ...]:
    if len(terms) == 1:
        return tuple(terms)
    if any(isinstance(term, Dense | Experts | Packed | Pulled) for term in terms):
        return (Dense(sum_of([term.dense(shape) for term in terms])),)
    merged: list[Term] = []
    terms = [term.outer() if isinstance(term, Convolution) else term for term in terms]
    heads = [term for term in terms if isinstance(term, Head)]
    if heads and any(isinstance(term, Outer) for term in terms):  # a weight that other layers use as well
        terms = [Outer(term.residual(), term.hidden) if isinstance(term, Head) else term for term in terms]
    elif heads:
        merged.append(reduce(Head.join, heads))
    if outers := [term for term in terms if isinstance(term, Outer)]:
        merged.append(Outer(_join([o.left for o in outers]), _join([o.right for o in outers])))
    if scatters := [term for term in terms if isinstance(term, Scatter)]:
        merged.append(Scatter(_join([s.ids for s in scatters]), _join([s.grads for s in scatters])))
    return tuple(merged)


def _outer_scatter(outer: Outer, scatter: Scatter) -> Tensor:
    """⟨outer, scatter⟩ = Σ_ts left[b, t, ids[b,s]] (right[b,t] · grads[b,s]) -> (B,).

    One sample at a time: picking the columns of all samples at once would copy a tensor of the logits' size.
    """
    products = []
    for left, right, ids, grads in zip(outer.left, outer.right, scatter.ids, scatter.grads, strict=True):
        dtype = torch.promote_types(wide(right).dtype, grads.dtype)
        gram = right.to(dtype) @ grads.to(dtype).T
        products.append((gram * left[:, ids]).sum())
    return torch.stack(products)


def _join(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), 1)
