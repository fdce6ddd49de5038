"""The nearest of some samples that are held, by embeddings in units of the held ones' spread."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# So many distances are made at once.
_DISTANCES = 1 << 22
# Of a coordinate's size: what spreads less is the rounding of float32, which another batch makes otherwise.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Held:
    """Samples that others are compared with, float64.

    Attributes:
        spread: (D,) by which embeddings are divided: the held ones' standard deviation, 1 where they agree but for
            float32's rounding.
        points: (m, D), the embeddings divided by it.
    """

    spread: Tensor
    points: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Held:
        """x: (m, D) finite, at least one."""
        wide = x.double()
        spread = wide.std(0, correction=0)
        spread = torch.where(spread > _ROUNDING * wide.abs().amax(0), spread, 1.0)
        return cls(spread, wide / spread)

    def __len__(self) -> int:
        return len(self.points)

    def nearest(self, x: Tensor, count: int, but_itself: bool = False) -> tuple[Tensor, Tensor]:
        """Distances and places of the ``count`` nearest held samples, of fewer all; of equally near ones the earlier.

        Args:
            x: (B, D) finite embeddings. What is found of one does not depend on the others.
            but_itself: ``x`` are the held samples, in their order, and none is its own neighbour.

        Returns:
            (B, k) float64, ascending, and (B, k) int64.
        """
        k, start = min(count, len(self) - but_itself), 0
        distances, places = [], []
        standard = x.double() / self.spread
        for part in torch.split(standard, max(1, _DISTANCES // len(self))):
            # No matrix product: its sums would depend on the batch, and lose the digits of what is near.
            apart = torch.cdist(part, self.points, compute_mode="donot_use_mm_for_euclid_dist")
            if but_itself:
                rows = torch.arange(len(part), device=x.device)
                apart[rows, start + rows] = torch.inf
                start += len(part)
            found = apart.sort(dim=1, stable=True)
            distances.append(found.values[:, :k].clone())
            places.append(found.indices[:, :k].clone())
        if not distances:
            return self.points.new_empty(0, k), torch.empty(0, k, dtype=torch.long, device=x.device)
        return torch.cat(distances), torch.cat(places)
