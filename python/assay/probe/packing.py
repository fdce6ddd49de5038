"""Packed batches: many samples end to end in a row, which position is whose, and gradients cut by it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from assay.ops import Sketch
from assay.tasks.base import wide

# Samples of one group are at least this share of its longest: what is padded is less than what is there.
_ALIKE = 0.5


@dataclass(frozen=True)
class Group:
    """Samples of about the same length.

    Attributes:
        samples: (n,) int64, ascending.
        places: (n, L) int64, each sample's positions in their order, among all R·T; −1 behind a shorter one's last.
    """

    samples: Tensor
    places: Tensor

    def rows(self, tensor: Tensor) -> Tensor:
        """(R·T, …) -> (n, L, …), 0 where there is no position."""
        places = self.places.to(tensor.device)
        found = tensor[places.clamp(min=0)]
        nothing = (places < 0).reshape(*self.places.shape, *[1] * (tensor.ndim - 1))
        return found.masked_fill_(nothing, 0)


@dataclass(frozen=True)
class Packing:
    """Which sample each position belongs to.

    Attributes:
        seq_idx: (R, T) int64, from 0 on; −1 where a position is nobody's.
        size: B.
        groups: all samples, by their lengths.
    """

    seq_idx: Tensor
    size: int
    groups: Sequence[Group]

    @classmethod
    def of(cls, seq_idx: Tensor) -> Packing:
        """ValueError unless it is (R, T) of integers from −1 on, with a position for each of the samples 0 … B − 1."""
        whole = not seq_idx.is_floating_point() and seq_idx.dtype != torch.bool
        if seq_idx.ndim != 2 or not whole:
            raise ValueError(
                f"seq_idx: expected (R, T) of int64, the sample of each position, found {tuple(seq_idx.shape)} of "
                f"{seq_idx.dtype}"
            )
        owner = seq_idx.detach().long()
        flat = owner.flatten()
        low, size = (int(flat.min()), int(flat.max()) + 1) if flat.numel() else (0, 0)
        lengths = torch.bincount(flat[flat >= 0], minlength=size).tolist()
        if size == 0 or low < -1 or 0 in lengths:
            what = f"a sample {low}" if low < -1 else f"no position of sample {lengths.index(0)}" if size else "none"
            raise ValueError(f"seq_idx: expected samples 0 … B − 1, each with a position, and −1, found {what}")
        return cls(owner, size, _groups(flat, lengths))

    @property
    def has_company(self) -> bool:
        """Whether some row holds two samples or more."""
        return any(len(torch.unique(row[row >= 0])) > 1 for row in self.seq_idx)

    def lead(self, shape: Sequence[int]) -> int:
        """How many of a tensor's first dimensions are all positions: 2 of (R, T, …), 1 of (R·T, …), else 0."""
        if tuple(shape[:2]) == tuple(self.seq_idx.shape):
            return 2
        return int(tuple(shape[:1]) == (self.seq_idx.numel(),))

    def flat(self, tensor: Tensor) -> Tensor:
        """(R·T, …) of a tensor with a ``lead``."""
        return tensor.reshape(-1, *tensor.shape[2:]) if self.lead(tensor.shape) == 2 else tensor

    def sums(self, values: Tensor) -> Tensor:
        """(R, T, …) -> (B, …) float32 or wider, differentiable, in a fixed order; what is nobody's is not in it.

        T may be less than the rows', of which the last positions are then left out.
        """
        own, values = self.seq_idx[:, : values.shape[1]].to(values.device), wide(values)
        mine = own >= 0
        return values.new_zeros(self.size, *values.shape[2:]).index_put((own[mine],), values[mine], accumulate=True)


def _groups(flat: Tensor, lengths: Sequence[int]) -> list[Group]:
    order = flat.argsort(stable=True)[-sum(lengths) :]  # all positions of sample 0, then of 1, …
    starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
    longest_first = sorted(range(len(lengths)), key=lambda b: -lengths[b])
    groups, first = [], 0
    while first < len(longest_first):
        longest = lengths[longest_first[first]]
        last = first
        while last < len(longest_first) and lengths[longest_first[last]] >= _ALIKE * longest:
            last += 1
        samples = torch.tensor(sorted(longest_first[first:last]))
        within = torch.arange(longest)
        places = (starts[samples, None] + within).clamp(max=len(order) - 1).to(order.device)
        beyond = (within >= torch.tensor(lengths)[samples, None]).to(order.device)
        groups.append(Group(samples.to(order.device), order[places].masked_fill_(beyond, -1)))
        first = last
    return groups


class Gradients(Protocol):
    """What is said of the gradients of a group; ``PerSampleGradient`` does."""

    def dot(self, direction: Tensor) -> Tensor: ...
    def sqnorm(self) -> Tensor: ...
    def sketch(self, sketch: Sketch) -> Tensor: ...
    def dense(self) -> Tensor: ...
    def scaled(self, factors: Tensor) -> Gradients: ...
    def weighted(self, factors: Tensor) -> Tensor: ...
    def multiplied_out(self) -> Gradients: ...
    def part(self, samples: slice) -> Gradients: ...


@dataclass(frozen=True)
class Packed:
    """The gradients of a packed batch: groups (n,) of samples, each with gradients of its own."""

    groups: Sequence[tuple[Tensor, Gradients]]
    samples: int

    def dot(self, direction: Tensor) -> Tensor:
        return self._gather(lambda own: own.dot(direction))

    def sqnorm(self) -> Tensor:
        return self._gather(lambda own: own.sqnorm())

    def sketch(self, sketch: Sketch, shape: Sequence[int]) -> Tensor:
        return self._gather(lambda own: own.sketch(sketch))

    def dense(self, shape: Sequence[int]) -> Tensor:
        return self._gather(lambda own: own.dense())

    def scaled(self, factors: Tensor) -> Packed:
        return self._each((samples, own.scaled(factors[samples])) for samples, own in self.groups)

    def weighted(self, factors: Tensor, shape: Sequence[int]) -> Tensor:
        first, *rest = (own.weighted(factors[samples]) for samples, own in self.groups)
        return sum(rest, start=first)

    def multiplied_out(self) -> Packed:
        return self._each((samples, own.multiplied_out()) for samples, own in self.groups)

    def part(self, samples: slice) -> Packed:
        start, stop, _ = samples.indices(self.samples)
        groups = []
        for own, gradients in self.groups:
            here = slice(int((own < start).sum()), int((own < stop).sum()))  # they ascend
            if here.start < here.stop:
                groups.append((own[here] - start, gradients.part(here)))
        return Packed(groups, max(stop - start, 0))

    def _each(self, groups: Iterator[tuple[Tensor, Gradients]]) -> Packed:
        return Packed(list(groups), self.samples)

    def _gather(self, of: Callable[[Gradients], Tensor]) -> Tensor:
        """(B, …) of what each group gives (n, …)."""
        parts = [of(own) for _, own in self.groups]
        values = parts[0].new_empty(self.samples, *parts[0].shape[1:])
        for (samples, _), part in zip(self.groups, parts, strict=True):
            values[samples] = part
        return values
