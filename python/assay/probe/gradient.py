"""The per-sample gradient of one parameter, kept as factors and never multiplied out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from assay.ops import Kronecker, Mask, Rademacher, Sketch, grad_dot, grad_sketch, grad_sqnorm, project
from assay.probe.experts import Experts
from assay.probe.head import Head
from assay.tasks.base import wide

# Gradients are multiplied out at most this many numbers at a time.
_ELEMENTS = 1 << 24
# Terms that cancel below this share of their own squared norms are multiplied out, one sample at a time.
_CANCELLED = 1e-2


@dataclass(frozen=True)
class Outer:
    """Σ_t left[b,t]ᵀ right[b,t], viewed as the parameter. ``left`` (B, T, R), ``right`` (B, T, C)."""

    left: Tensor
    right: Tensor

    def dot(self, direction: Tensor) -> Tensor:
        matrix = direction.reshape(self.left.shape[-1], self.right.shape[-1])
        return grad_dot(self.right, self.left, matrix)

    def sqnorm(self) -> Tensor:
        return grad_sqnorm(self.right, self.left)

    def sketch(self, sketch: Sketch, shape: Sequence[int]) -> Tensor:
        return grad_sketch(self.right, self.left, sketch)

    def dense(self, shape: Sequence[int]) -> Tensor:
        return (wide(self.left).mT @ wide(self.right)).reshape(-1, *shape)

    def finite(self) -> Tensor:
        """(B,) bool: the samples whose sum is finite. It is multiplied out only where its bound says nothing."""
        left, right = (F.pad(wide(side.flatten(1)).abs(), (0, 1)).amax(1) for side in (self.left, self.right))
        finite = (left * right * self.left.shape[1]).isfinite()
        for b in torch.nonzero(~finite & left.isfinite() & right.isfinite()).flatten().tolist():
            finite[b] = self.part(slice(b, b + 1)).dense(()).isfinite().all()
        return finite

    @property
    def samples(self) -> int:
        return len(self.left)

    def part(self, samples: slice) -> Outer:
        return Outer(self.left[samples], self.right[samples])


@dataclass(frozen=True)
class Scatter:
    """Row ``ids[b,t]`` of the parameter gets ``grads[b,t]``. ``ids`` (B, T) int64, ``grads`` (B, T, D)."""

    ids: Tensor
    grads: Tensor

    def dot(self, direction: Tensor) -> Tensor:
        return (wide(direction[self.ids]) * wide(self.grads)).sum((1, 2))

    def sqnorm(self) -> Tensor:
        # Equal ids of a sample land on the same row. index_put_ adds in a fixed order on every device.
        base = torch.arange(len(self.ids), device=self.ids.device)[:, None]
        stride = self.ids.max() + 1 if self.ids.numel() else 1
        keys, place = torch.unique(base * stride + self.ids, return_inverse=True)
        grads = wide(self.grads)
        rows = grads.new_zeros(len(keys), grads.shape[-1])
        rows.index_put_((place.flatten(),), grads.flatten(0, 1), accumulate=True)
        return grads.new_zeros(len(grads)).index_put_((keys // stride,), rows.square().sum(1), accumulate=True)

    def sketch(self, sketch: Sketch, shape: Sequence[int]) -> Tensor:
        if isinstance(sketch, Kronecker):  # a row's signs are the projection of its unit vector
            signs = sketch.output_side(shape[0], self.grads.device)
            left = signs.T[self.ids].to(wide(self.grads).dtype)  # (B, T, rows)
            right = wide(self.grads) @ sketch.input_side(shape[1], self.grads.device).T.to(left.dtype)
            return (left.mT @ right).flatten(1)
        # One sample at a time: its gradient is as large as the weight.
        one = [self.part(slice(b, b + 1)) for b in range(len(self.ids))]
        return torch.cat([Dense(sample.dense(shape)).sketch(sketch, shape) for sample in one])

    def dense(self, shape: Sequence[int]) -> Tensor:
        grads = wide(self.grads)
        sample = torch.arange(len(grads), device=grads.device)[:, None].expand_as(self.ids)
        return grads.new_zeros(len(grads), *shape).index_put_((sample, self.ids), grads, accumulate=True)

    @property
    def samples(self) -> int:
        return len(self.ids)

    def part(self, samples: slice) -> Scatter:
        return Scatter(self.ids[samples], self.grads[samples])


@dataclass(frozen=True)
class Dense:
    """The gradient itself, (B, *shape): for parameters as small as a bias."""

    values: Tensor

    def dot(self, direction: Tensor) -> Tensor:
        return (wide(self.values) * wide(direction)).reshape(self.samples, -1).sum(1)

    def sqnorm(self) -> Tensor:
        return wide(self.values).square().reshape(self.samples, -1).sum(1)

    def sketch(self, sketch: Sketch, shape: Sequence[int]) -> Tensor:
        shape = shape or (1,)
        values = wide(self.values).reshape(-1, shape[0], math.prod(shape[1:]))
        if not isinstance(sketch, Kronecker | Mask):
            return project(values.flatten(1), sketch)
        if len(shape) > 1:  # these look at both sides of a matrix, as they do where it comes as factors
            outer = _against_units(values)
            return grad_sketch(outer.right, outer.left, sketch)
        if isinstance(sketch, Kronecker):  # a vector has one side
            sketch = Rademacher(sketch.dim, seed=sketch.seed, name=sketch.name)
        return project(values.flatten(1), sketch)

    @property
    def samples(self) -> int:
        return len(self.values)

    def part(self, samples: slice) -> Dense:
        return Dense(self.values[samples])

    def dense(self, shape: Sequence[int]) -> Tensor:
        return wide(self.values).reshape(-1, *shape)


@dataclass(frozen=True)
class Convolution:
    """The weight gradient of a convolution, a view of its input at every position.

    ``inputs`` (B, I, *S), padded already; ``grads`` (B, O, *L); the rest as in ``torch.nn.Conv2d``.
    """

    inputs: Tensor
    grads: Tensor
    kernel_size: Sequence[int]
    stride: Sequence[int]
    dilation: Sequence[int]
    groups: int

    def dot(self, direction: Tensor) -> Tensor:
        if self.inputs.device.type != "cpu":
            return self.outer().dot(direction)  # cuDNN may round to TF32
        # A convolution is linear in its weight: run it with the direction as the weight, and nothing is
        # unfolded.
        convolve = (F.conv1d, F.conv2d, F.conv3d)[len(self.kernel_size) - 1]
        inputs, grads = wide(self.inputs), wide(self.grads)
        weight, options = direction.to(inputs.dtype), (self.stride, 0, self.dilation, self.groups)
        return (convolve(inputs, weight, None, *options) * grads).flatten(1).sum(1)

    def sqnorm(self) -> Tensor:
        return self.outer().sqnorm()

    def sketch(self, sketch: Sketch, shape: Sequence[int]) -> Tensor:
        return self.outer().sketch(sketch, shape)

    @property
    def samples(self) -> int:
        return len(self.grads)

    def part(self, samples: slice) -> Convolution:
        return replace(self, inputs=self.inputs[samples], grads=self.grads[samples])

    def dense(self, shape: Sequence[int]) -> Tensor:
        return self.outer().dense(shape)

    def outer(self) -> Outer:
        """Unfolded: one position per output position, or fewer where the weight is small."""
        windows = self.inputs
        spans = zip(self.kernel_size, self.stride, self.dilation, strict=True)
        for axis, (size, stride, dilation) in enumerate(spans, start=2):
            windows = windows.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
        n = len(self.kernel_size)
        windows = windows.permute(0, *range(2, 2 + n), 1, *range(2 + n, 2 + 2 * n))  # (B, *L, I, *kernel)
        positions = (len(windows), self.grads[0, 0].numel())
        grads = self.grads.flatten(2).mT
        if self.groups == 1:
            return Outer(grads, windows.reshape(*positions, -1))
        by_group = (*positions, self.groups, -1)
        return _grouped(grads.reshape(by_group), windows.reshape(by_group))


def _against_units(values: Tensor) -> Outer:
    """Matrices (B, R, C) as factors: along the shorter side, against unit vectors."""
    _, rows, columns = values.shape
    unit = torch.eye(min(rows, columns), dtype=values.dtype, device=values.device).expand(len(values), -1, -1)
    return Outer(unit, values) if rows <= columns else Outer(values.mT, unit)


def _grouped(left: Tensor, right: Tensor) -> Outer:
    """The weight gradient (g·O, I) of g groups: ``left`` (B, T, g, O), ``right`` (B, T, g, I), a sum per
    group.

    There are two exact ways to write it as one sum of outer products; the smaller is taken. Either the
    gradient is multiplied out and "summed" against the I unit vectors, or every (t, group) becomes a position
    whose output gradient is zero outside of the group.
    """
    size, length, groups, height = left.shape
    width = right.shape[3]
    if width <= length * groups:
        dtype = torch.promote_types(wide(right[:0]).dtype, left.dtype)
        matrix = torch.einsum("btgi,btgo->bigo", right.to(dtype), left.to(dtype)).flatten(2)
        return Outer(matrix, torch.eye(width, dtype=dtype, device=matrix.device).expand(size, -1, -1))
    own = torch.eye(groups, dtype=left.dtype, device=left.device)[:, :, None]
    placed = (left[:, :, :, None, :] * own).reshape(size, length * groups, groups * height)
    return Outer(placed, right.flatten(1, 2))


Term = Outer | Scatter | Dense | Convolution | Head | Experts


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
        if direction.shape != self.shape:
            raise ValueError(f"direction of shape {tuple(direction.shape)}; expected {tuple(self.shape)}")
        return sum_of([term.dot(direction) for term in self.terms])

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
            yield PerSampleGradient(self.shape, [term.part(slice(start, start + samples)) for term in self.terms])

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

    def sketch(self, sketch: Sketch) -> Tensor:
        """A projection of the gradient -> (B, sketch.dim): the uses' sketches, summed, for sketching is linear."""
        return sum_of([term.sketch(sketch, self.shape) for term in self.terms])

    def dense(self) -> Tensor:
        """The gradient multiplied out, (B, *shape): for small parameters and for tests."""
        return sum_of([term.dense(self.shape) for term in self.terms])


def _merge(terms: Sequence[Term], shape: Sequence[int]) -> tuple[Term, ...]:
    if len(terms) == 1:
        return tuple(terms)
    if any(isinstance(term, Dense | Experts) for term in terms):
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


def sum_of(tensors: Sequence[Tensor]) -> Tensor:
    return sum(tensors[1:], start=tensors[0])
