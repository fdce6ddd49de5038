"""The out-of-distribution filter of simulated data: how far is a sample from the nearest real ones?

*When to Trust Your Data: Enhancing Dyna-Style Model-Based Reinforcement Learning With Data Filter*, 2410.12160.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from assay.methods.base import Column, Method, Need
from assay.methods.checks import check_at_least
from assay.methods.embedding import Embedder, Pooling
from assay.methods.nearest import Held
from assay.methods.sums import Folded, samples_left_out
from assay.methods.targets import Targets, TargetSet
from assay.probe import Signals
from assay.tasks import Task

if TYPE_CHECKING:
    from typing_extensions import Self


class OODFilter(Method):
    """A sample's distance to real data, in a space that real data standardise, and where it stands among theirs.

    Columns, both keep low: ``ood_distance``, the mean Euclidean distance to the ``neighbours`` nearest real samples, of
    embeddings divided coordinate by coordinate by the real ones' standard deviation; and ``ood_distance_rank``, the
    share of the real samples that are nearer to the *other* real ones than that. A cut of the rank at 0.95 trusts what
    is no farther off than 95 % of real samples are from one another, whatever the units; at 1 it keeps all.
    ``select.trust`` moves it with a schedule, as the paper does. NaN where the embedding is not finite, or there is
    nothing to predict.

    ``fit`` must run first: it holds the embeddings of the real samples, (n, D) float64, and makes n² distances.

    Args:
        model: a forward pass of it, and n distances, are what a sample costs.
        task: what a sample is.
        targets: the real data, all targets together; a copy of one of them has the distance 0.
        neighbours: whose distances are averaged; of fewer other real samples all.
        at, pooling: as in ``EmbeddingSimilarity``. ``at`` the first layer's name compares what the model is given: of a
            dynamics model the pair of state and action, as in the paper.
        name: of the first column, and prefix of the other.

    Raises:
        ValueError: no target, a number below 1, or no such layer.
    """

    gathers: ClassVar[int | None] = 0

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        targets: Targets,
        *,
        neighbours: int = 1,
        at: str | None = None,
        pooling: Pooling = "mean",
        name: str = "ood_distance",
    ) -> None:
        check_at_least("neighbours", neighbours, 1)
        self.name, self.model, self.task, self.neighbours = name, model, task, neighbours
        self.targets = TargetSet(name, targets).required()
        self.embedder = Embedder(name, model, task, at, pooling)
        self._real: Held | None = None
        self._of_targets = Folded()
        self._count = neighbours  # whose distances are averaged indeed
        self._own = torch.empty(0)  # (n,) ascending: real samples' distances to the other real ones

    @property
    def columns(self) -> Sequence[Column]:
        return [
            Column(self.name, "low", "distance of embeddings to the nearest real samples"),
            Column(f"{self.name}_rank", "low", "share of real samples that are nearer to the other real ones"),
        ]

    def needs(self) -> Mapping[str, Need]:
        return {"model": self.embedder.need()}

    def fit(self, pool: Iterable[Any] = ()) -> Self:
        """Hold the real samples' embeddings; the pool is not looked at.

        Raises:
            ValueError: fewer than two real samples have a finite embedding.
        """
        folded = Folded()
        parts = [self.embedder.finite(batches, folded) for batches in self.targets.batches.values()]
        known = torch.cat([part for part in parts if len(part)] or parts[:1])
        if len(known) < 2:
            raise ValueError(
                f"{self.name}: {len(known)} real samples ({self.targets}) have a finite embedding; expected at least 2"
            )
        self._real, self._of_targets = Held.of(known), folded
        self._count = min(self.neighbours, len(known) - 1)  # a real sample has no more others
        own, _ = self._real.nearest(known, self._count, but_itself=True)
        self._own = own.mean(1).sort().values
        return self

    def score(self, signals: Mapping[str, Signals]) -> dict[str, Tensor]:
        if self._real is None:
            raise RuntimeError(f"{self.name}: call fit() before scoring")
        embeddings = self.embedder.embeddings(signals["model"]).to(self._own.device)
        fine = embeddings.isfinite().all(1)
        distance = torch.full((len(embeddings),), torch.nan, dtype=torch.float64, device=embeddings.device)
        distance[fine] = self._real.nearest(embeddings[fine], self._count)[0].mean(1)
        exact = torch.searchsorted(self._own, distance).double() / len(self._own)
        rank = exact.float()  # not above what it rounds: a cut at .6 keeps ranks of 6 in 10
        rank = torch.where(rank > exact, rank.nextafter(torch.zeros_like(rank)), rank)
        return {self.name: distance, f"{self.name}_rank": rank.masked_fill(~fine, torch.nan)}

    def metadata(self) -> dict[str, str]:
        pooled = self.embedder.pooled
        facts = {
            "real": str(self.targets),
            "embedding": f"input of layer {pooled.layer!r}, {pooled.weights} over positions",
            "targets_left_out": samples_left_out(self._of_targets),
        }
        if self._real is not None:
            facts |= {"real_samples": str(len(self._real)), "median_distance": f"{float(self._own.median()):.6g}"}
        return facts
