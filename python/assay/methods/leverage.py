"""Leverage: how much does a ridge regression on frozen features depend on this sample? No label is looked at.

Kernel ridge on frozen features is the inner problem of *Self-Supervised Dataset Distillation for Transfer Learning*,
2310.06511, which scores no sample by it: the leverage is the weight that its prediction of a sample's target gives to
that target.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from assay.methods.base import Column, Method, Need
from assay.methods.checks import check_at_least
from assay.methods.embedding import Embedder, Pooling
from assay.methods.parts import State, states
from assay.methods.sums import Folded, samples_left_out
from assay.probe import Signals
from assay.tasks import Task

if TYPE_CHECKING:
    from typing_extensions import Self


class Leverage(Method):
    """h_i = φ_iᵀ(ΦᵀΦ + λI)⁻¹φ_i with φ = (embedding, 1), Φ the pool's: high is unlike the rest.

    The diagonal of K(K + λI)⁻¹, K = ΦΦᵀ: over the fitted samples h lies in [0, 1] and sums to the regression's degrees
    of freedom, which the metadata gives. A sample that was not fitted may be above 1. NaN for a sample with nothing to
    predict, or whose embedding is not finite.

    Column: ``leverage``; neither end is worth more by itself. ``fit`` must run first: it adds up the pool's second
    moment, (D + 1)² float64.

    Args:
        model: a forward pass of it is what a sample costs, and D² products.
        task: what a sample is.
        damping: λ in units of the trace of K; the paper's is 1e-6.
        at, pooling: as in ``EmbeddingSimilarity``.
        name: of the column.

    Raises:
        ValueError: a damping that is no positive number, or no such layer.
    """

    uses_pool: ClassVar[bool] = True
    gathers: ClassVar[int | None] = 0

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        *,
        damping: float = 1e-6,
        at: str | None = None,
        pooling: Pooling = "mean",
        name: str = "leverage",
    ) -> None:
        self.name, self.model, self.task, self.damping = name, model, task, damping
        check_at_least(f"{name}: damping", damping, 1e-12)  # beyond that float64 has no digits left
        self.embedder = Embedder(name, model, task, at, pooling)
        self._root: Tensor | None = None  # (D + 1, D + 1), L of ΦᵀΦ + λI = LLᵀ
        self._samples, self._freedom, self._of_pool = 0, math.nan, Folded()

    @property
    def columns(self) -> Sequence[Column]:
        return [Column(self.name, "none", "leverage in a ridge regression on the embeddings")]

    def needs(self) -> Mapping[str, Need]:
        return {"model": self.embedder.need()}

    def fit(self, pool: Iterable[Any] = ()) -> Self:
        """Add up the second moment of the pool's embeddings.

        Args:
            pool: the pool or a random sample of it, several times as many samples as embeddings have numbers: of fewer
                all have a high leverage.

        Raises:
            ValueError: no sample has a finite embedding.
        """

        def part(batches: Iterable[Any], first: int) -> State:
            moment, samples, folded = torch.zeros(()), 0, Folded()
            for signals in self.embedder.run(batches):
                features = self.embedder.fitted(signals, folded, _features)
                moment = features.T @ features + moment.to(features)
                samples += len(features)
            return {"moment": moment, "samples": samples, "folded": folded.state()}

        moment, samples, folded = torch.zeros(()), 0, Folded()
        for state in states(pool, part):
            moment, samples = moment.to(state["moment"]) + state["moment"], samples + state["samples"]
            folded.join(state["folded"])
        if not samples:
            raise ValueError(f"{self.name}: fit() needs samples of the pool, found none with a finite embedding")
        damping = self.damping * float(moment.trace())
        values = torch.linalg.eigvalsh(moment).clamp(min=0)
        damped = moment + damping * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
        self._root, self._samples = torch.linalg.cholesky(damped), samples
        self._freedom, self._of_pool = float((values / (values + damping)).sum()), folded
        return self

    def score(self, signals: Mapping[str, Signals]) -> dict[str, Tensor]:
        if self._root is None:
            raise RuntimeError(f"{self.name}: call fit() before scoring")
        features = _features(self.embedder.embeddings(signals["model"])).to(self._root.device)
        fine = features.isfinite().all(1)
        solved = torch.linalg.solve_triangular(self._root, features.masked_fill(~fine[:, None], 0).T, upper=False)
        return {self.name: solved.square().sum(0).masked_fill(~fine, torch.nan)}

    def metadata(self) -> dict[str, str]:
        pooled = self.embedder.pooled
        facts = {
            "embedding": f"input of layer {pooled.layer!r}, {pooled.weights} over positions",
            "left_out": samples_left_out(self._of_pool),
        }
        if self._root is not None:
            facts |= {"samples": str(self._samples), "degrees_of_freedom": f"{self._freedom:.6g}"}
        return facts


def _features(embeddings: Tensor) -> Tensor:
    """(B, D) -> (B, D + 1) float64, with a column of ones."""
    return torch.nn.functional.pad(embeddings.double(), (0, 1), value=1.0)
