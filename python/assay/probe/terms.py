"""What a parameter's per-sample gradient is the sum of: outer products, scattered rows, folded convolutions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

from assay.ops import Kronecker, Mask, Rademacher, Sketch, grad_dot, grad_sketch, grad_sqnorm, project
from assay.ops._exact import exact
from assay.probe.experts import Experts
from assay.probe.head import Head
from assay.probe.packing import Packed
from assay.tasks.base import wide

_LARGE = 1 << 16  # numbers of a sample's gradient from which on no product is written down


def sum_of(tensors: Sequence[Tensor]) -> Tensor:
    return sum(tensors[1:], start=tensors[0])


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

    def scaled(self, factors: Tensor) -> Outer:
        if self.left.shape[-1] <= self.right.shape[-1]:
            return Outer(_times(self.left, factors), self.right)
        return Outer(self.left, _times(self.right, factors))

    def weighted(self, factors: Tensor, shape: Sequence[int]) -> Tensor:
        own = self.scaled(factors)
        left, right = _alike(own.left.flatten(0, 1), own.right.flatten(0, 1))
        return (left.T @ right).reshape(shape)

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

    def pieces(self, height: int, rows: int, samples: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The gradients by so many rows of the ``height`` and, of each, so many samples: which sample of these, which
        row of these, and what it gets."""
        groups, b = -(-len(self.ids) // samples), torch.arange(len(self.ids), device=self.ids.device)[:, None]
        piece, order = (self.ids // rows * groups + b // samples).flatten().sort(stable=True)
        bounds = torch.searchsorted(piece, torch.arange(1 - (-height // rows) * groups, device=piece.device)).tolist()
        sample, row = (b % samples).expand_as(self.ids).flatten()[order], (self.ids % rows).flatten()[order]
        for own in itertools.starmap(slice, itertools.pairwise(bounds)):
            yield sample[own], row[own], self.grads.flatten(0, 1)[order[own]]

    def scaled(self, factors: Tensor) -> Scatter:
        return Scatter(self.ids, _times(self.grads, factors))

    def weighted(self, factors: Tensor, shape: Sequence[int]) -> Tensor:
        rows = _times(wide(self.grads), factors).flatten(0, 1)
        return rows.new_zeros(*shape).index_put_((self.ids.flatten(),), rows, accumulate=True)

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
        values, along = wide(self.values), wide(direction)
        if values[:1].numel() < _LARGE:
            return (values * along).reshape(self.samples, -1).sum(1)
        dtype = torch.promote_types(values.dtype, along.dtype)
        with exact():
            return values.reshape(self.samples, -1).to(dtype) @ along.flatten().to(dtype)

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

    def scaled(self, factors: Tensor) -> Dense:
        return Dense(_times(self.values, factors))

    def weighted(self, factors: Tensor, shape: Sequence[int]) -> Tensor:
        values = wide(self.values).reshape(self.samples, -1)
        with exact():
            return (factors.to(values) @ values).reshape(shape)

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

    def scaled(self, factors: Tensor) -> Convolution:
        return replace(self, grads=_times(self.grads, factors))

    def weighted(self, factors: Tensor, shape: Sequence[int]) -> Tensor:
        gradient = (conv1d_weight, conv2d_weight, conv3d_weight)[len(self.kernel_size) - 1]
        inputs, grads = _alike(self.inputs, _times(self.grads, factors))
        options = (self.stride, 0, self.dilation, self.groups)
        return gradient(inputs, torch.Size(shape), grads, *options)  # type: ignore[no-untyped-call, no-any-return]

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


def _times(tensor: Tensor, factors: Tensor) -> Tensor:
    """``tensor`` (B, …) times a number per sample, in the tensor's own type."""
    return tensor * factors.to(tensor.device, tensor.dtype).reshape(-1, *[1] * (tensor.ndim - 1))


def _alike(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """In one type: under autocast a layer multiplies in that of the lower precision, and so does its gradient."""
    if one.dtype == other.dtype:
        return one, other
    narrow = min(one.dtype, other.dtype, key=lambda dtype: torch.finfo(dtype).bits)
    return one.to(narrow), other.to(narrow)


def _parts(direction: Tensor, like: Tensor) -> list[Tensor]:
    """What a direction is the sum of in the type of ``like``: bfloat16 holds a third of a float32's bits."""
    parts, rest = [], direction.to(like.device)
    for _ in range(3 if like.dtype in (torch.float16, torch.bfloat16) else 1):
        parts.append(rest.to(like.dtype))
        rest = rest - parts[-1]
    return parts


@dataclass(frozen=True)
class Pulled:
    """The gradient of a parameter from which a weight is computed: terms of the weight's, pulled back sample by sample.

    Attributes:
        terms: what the computed weight's gradient is the sum of.
        value: the weight, at the end of a graph that starts at ``source``.
        source: the parameter, or what stands in for it.
    """

    terms: Sequence[Term]
    value: Tensor
    source: Tensor

    def dot(self, direction: Tensor) -> Tensor:
        """⟨Jᵀ g_b, v⟩ = ⟨g_b, J v⟩, and J v is the derivative of u ↦ ⟨Jᵀ u, v⟩."""
        with torch.enable_grad():
            u = torch.zeros_like(self.value, requires_grad=True)
            pulled = self._pull(u, create_graph=True)
            moved = None
            if pulled.requires_grad:
                for part in _parts(direction, pulled):
                    (more,) = torch.autograd.grad(pulled, u, part, retain_graph=True, allow_unused=True)
                    moved = more if moved is None or more is None else wide(moved) + more
        along = torch.zeros_like(self.value) if moved is None else moved
        return sum_of([term.dot(along.detach()) for term in self.terms])

    def sqnorm(self) -> Tensor:
        return torch.cat([sample.sqnorm() for sample in self._samples()])

    def sketch(self, sketch: Sketch, shape: Sequence[int]) -> Tensor:
        return torch.cat([sample.sketch(sketch, shape) for sample in self._samples()])

    def dense(self, shape: Sequence[int]) -> Tensor:
        return torch.cat([sample.dense(shape) for sample in self._samples()])

    def scaled(self, factors: Tensor) -> Pulled:
        return replace(self, terms=[term.scaled(factors) for term in self.terms])

    def weighted(self, factors: Tensor, shape: Sequence[int]) -> Tensor:
        total = sum_of([term.weighted(factors, self.value.shape) for term in self.terms])
        return self._pull(total.to(self.value.dtype)).detach()

    @property
    def samples(self) -> int:
        return self.terms[0].samples

    def part(self, samples: slice) -> Pulled:
        return replace(self, terms=[term.part(samples) for term in self.terms])

    def _samples(self) -> Iterator[Dense]:
        """Multiplied out one at a time: a gradient is as large as the weight."""
        for b in range(self.samples):
            each = [term.part(slice(b, b + 1)).dense(self.value.shape)[0] for term in self.terms]
            grads = sum_of(each).to(self.value.dtype)
            yield Dense(self._pull(grads).detach()[None])

    def _pull(self, grads: Tensor, create_graph: bool = False) -> Tensor:
        with torch.enable_grad():
            (found,) = torch.autograd.grad(
                self.value, self.source, grads, retain_graph=True, create_graph=create_graph, allow_unused=True
            )
        return torch.zeros_like(self.source) if found is None else found


Term = Outer | Scatter | Dense | Convolution | Head | Experts | Pulled | Packed
