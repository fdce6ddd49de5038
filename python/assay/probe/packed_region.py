"""Values that all samples share, where the samples lie end to end in rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from assay.probe import products
from assay.probe.gradient import PerSampleGradient
from assay.probe.packing import Group, Packed, Packing
from assay.probe.shared import Region, Shared, _Border
from assay.probe.terms import Term
from assay.tasks.base import wide


@dataclass(eq=False)
class PackedRegion(Region):
    """A value meets the samples where it meets all positions; what it is spread over otherwise is no sample's."""

    packing: Packing = field(kw_only=True)
    _group: Group | None = None  # of samples, whose part of a weight's gradient is made

    def _lead(self, shape: Sequence[int], value: Tensor) -> int:
        lead = self.packing.lead(shape)
        aligned = (1,) * (len(shape) - value.ndim) + value.shape
        return lead if all(n == 1 for n in aligned[:lead]) else 0

    def _expand(self, func: Any, leaves: list[Any], spec: Any, value: Shared) -> Tensor | None:
        return None

    def _catch(self, value: Shared, start: Tensor, copies: Tensor) -> None:
        """Let the gradients of ``copies``, one for each position, arrive at the value."""
        if not self.recording:
            return
        self.see(copies)
        self.leaves.append(start)
        border = self._borders.setdefault(id(value), _Border(value))
        shape = tuple(value.shape)
        for source in value.sources:
            source.loose = True
            self.patterns.add((source.parameters, "spread", copies.ndim, self.packing.lead(copies.shape)))

        def arrived(grads: Tensor) -> None:
            if not self._closed:
                flat = wide(self.packing.flat(grads.detach()))
                rows = flat.reshape(*self.packing.seq_idx.shape, *flat.shape[1:])
                border.add(self.packing.sums(rows).reshape(self.size, *shape))

        copies.register_hook(arrived)  # type: ignore[no-untyped-call]

    def _arrange(self, lead: Sequence[int]) -> products.Arrange | None:
        n = len(lead)
        if self._second or not self.packing.lead(lead):
            return None

        def rows(x: Tensor) -> Tensor:
            assert self._group is not None
            own = self._group.rows(self.packing.flat(x))
            return own.reshape(len(own), -1, *x.shape[n:])

        return rows

    def _batched(self, inputs: Tensor) -> bool:
        return False

    def _term(self, of: Callable[[Tensor], Term], grads: Tensor, shape: Sequence[int]) -> Term:
        each = []
        for group in self.packing.groups:
            self._group = group
            each.append((group.samples, PerSampleGradient(shape, [of(grads)])))  # type: ignore[arg-type]
        return Packed(each, self.size)
