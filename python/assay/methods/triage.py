"""TRIAGE: does a regression over- or under-estimate this sample, training checkpoint after checkpoint?

*TRIAGE: Characterizing and Auditing Training Data for Improved Regression*, 2310.18970.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
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
from assay.tasks import Regression, Residual

if TYPE_CHECKING:
    from typing_extensions import Self


class TRIAGE(Method):
    """Where a sample's residual stands among those of a calibration set, over training checkpoints.

    T_e is the conformal p-value P(Q ≤ y) at checkpoint e of the scaled residual α = (y − ŷ)/σ, σ the mean |residual| of
    the nearest calibration samples by the checkpoint's embeddings. Every second calibration sample gives σ; of the n
    others' scaled residuals the i-th smallest has T = i/(n + 1), between two of them T lies on the straight line, and
    beyond them it is 1/(n + 1) or n/(n + 1). So where no two are equal, a sample that is exchangeable with them has
    T ≤ i/(n + 1) with the probability i/(n + 1), exactly, for i < n, and T does not jump with the last digit of a
    residual. Equal ones share the middle of their places.

    Columns: ``triage`` = |C − ½|, keep low; ``triage_confidence`` C = mean_e T_e, low where the model over-estimates
    the target and high where it under-estimates it; ``triage_variability``, the T_e's standard deviation (of E, not
    E − 1; 0 of one checkpoint). NaN where an embedding or a residual is not finite.

    The paper calls a sample over-estimated where C ≤ .33 and under-estimated where C ≥ .67, each only with a
    variability of at most the pool's 75th percentile, and keeps the rest: a rule, which ``--where`` writes out.

    ``fit`` must run first: it runs the checkpoints on the calibration samples.

    Args:
        models: E checkpoints of one training, in any order. A forward pass of each is what a sample costs.
        task: ``Regression``, of one number per sample.
        targets: the calibration set, all targets together: samples of the pool's kind which no checkpoint was trained
            on. If it was, T tells little.
        neighbours: that make σ; of fewer samples all.
        at, pooling: as in ``EmbeddingSimilarity``; ``at`` the first layer's name compares inputs.
        name: of the first column, and prefix of the others.

    Raises:
        ValueError: no model, no target, another task, a number below 1, or no such layer.
    """

    gathers: ClassVar[int | None] = 0

    def __init__(
        self,
        models: Sequence[nn.Module],
        task: Regression,
        targets: Targets,
        *,
        neighbours: int = 25,
        at: str | None = None,
        pooling: Pooling = "mean",
        name: str = "triage",
    ) -> None:
        if not models:
            raise ValueError(f"{name}: models: expected at least one checkpoint, got none")
        check_at_least("neighbours", neighbours, 1)
        self.name, self.models, self.neighbours = name, list(models), neighbours
        self.task, self.targets = Residual(task), TargetSet(name, targets).required()
        self.embedders = [Embedder(name, model, self.task, at, pooling) for model in self.models]
        self._calibrations: list[_Calibration] = []
        self._of_targets: list[Folded] = []  # by checkpoint

    @property
    def columns(self) -> Sequence[Column]:
        return [
            Column(self.name, "low", "|confidence − 1/2|: how surely the regression errs to one side"),
            Column(f"{self.name}_confidence", "none", "mean conformal p-value of the target; low is over-estimated"),
            Column(f"{self.name}_variability", "none", "standard deviation of the p-value over the checkpoints"),
        ]

    def needs(self) -> Mapping[str, Need]:
        return {str(e): embedder.need() for e, embedder in enumerate(self.embedders)}

    def fit(self, pool: Iterable[Any] = ()) -> Self:
        """Run the checkpoints on the calibration samples; the pool is not looked at.

        Raises:
            ValueError: fewer than four calibration samples have a finite embedding and residual: two to give σ, two
                to rank.
        """
        found = [self._calibrate(e) for e in range(len(self.models))]
        self._calibrations, self._of_targets = [own for own, _ in found], [folded for _, folded in found]
        return self

    def _calibrate(self, e: int) -> tuple[_Calibration, Folded]:
        found, folded = list[tuple[Tensor, Tensor]](), Folded()
        for batches in self.targets.batches.values():
            for signals in self.embedders[e].run(batches):
                x, r = self.embedders[e].embeddings(signals).double(), signals.losses.double()
                fine = _are_finite(x, r)
                folded.note(signals, fine)
                found.append((x[fine], r[fine]))
        if (count := sum(len(r) for _, r in found)) < 4:
            raise ValueError(
                f"{self.name}: {count} of the {folded.samples} calibration samples ({self.targets}) have a finite "
                f"embedding and residual under model {e}; expected at least 4, and some hundred to tell much"
            )
        x, r = (torch.cat(parts) for parts in zip(*found, strict=True))
        return _Calibration.of(x, r, self.neighbours), folded

    def score(self, signals: Mapping[str, Signals]) -> dict[str, Tensor]:
        if not self._calibrations:
            raise RuntimeError(f"{self.name}: call fit() before scoring")
        places = []
        for e, (embedder, calibration) in enumerate(zip(self.embedders, self._calibrations, strict=True)):
            own = signals[str(e)]
            places.append(calibration.place(embedder.embeddings(own).double(), own.losses.double()))
        each = torch.stack([place.to(places[0].device) for place in places])
        confidence = each.mean(0)
        return {
            self.name: (confidence - 0.5).abs(),
            f"{self.name}_confidence": confidence,
            f"{self.name}_variability": each.std(0, correction=0),
        }

    def metadata(self) -> dict[str, str]:
        pooled = self.embedders[0].pooled
        facts = {
            "calibration": str(self.targets),
            "embedding": f"input of layer {pooled.layer!r}, {pooled.weights} over positions",
            "targets_left_out": samples_left_out(*self._of_targets),
        }
        if self._calibrations:
            counts = [len(c.held) + len(c.ranked) for c in self._calibrations]
            facts["calibration_samples"] = ", ".join(map(str, counts))
        return facts


# Of the mean |residual|, added to every σ: as much as keeps a neighbourhood of exact predictions from dividing by 0.
_LEAST = 0.01


@dataclass(frozen=True)
class _Calibration:
    """What one checkpoint makes of the calibration samples, float64.

    Attributes:
        held, errors: the m samples that give σ, and their |residuals| (m,).
        ranked: (n,) ascending scaled residuals of the others.
    """

    held: Held
    errors: Tensor
    ranked: Tensor
    neighbours: int

    @classmethod
    def of(cls, x: Tensor, residuals: Tensor, neighbours: int) -> _Calibration:
        """x (M, D) and residuals (M,), finite: the first, third, … sample gives σ."""
        made = cls(Held.of(x[::2]), residuals[::2].abs(), residuals[:0], neighbours)
        return replace(made, ranked=(residuals[1::2] / made.scale(x[1::2])).sort().values)

    def scale(self, x: Tensor) -> Tensor:
        """(B, D) finite -> σ, (B,)."""
        _, near = self.held.nearest(x, self.neighbours)
        return self.errors[near].mean(1) + (float(self.errors.mean()) * _LEAST or 1.0)

    def place(self, x: Tensor, residuals: Tensor) -> Tensor:
        """(B, D) and (B,) -> the p-values T (B,); NaN where not all is finite."""
        fine = _are_finite(x, residuals)
        found = torch.full_like(residuals, torch.nan)
        found[fine] = _among(self.ranked, residuals[fine] / self.scale(x[fine]))
        return found


def _are_finite(x: Tensor, residuals: Tensor) -> Tensor:
    return residuals.isfinite() & x.isfinite().all(1)


def _among(ranked: Tensor, values: Tensor) -> Tensor:
    """(n,) ascending and (B,) -> (B,) in (0, 1): ranks over n + 1, in between on the straight line."""
    last = len(ranked) - 1
    below, upto = (torch.searchsorted(ranked, values, side=side) for side in ("left", "right"))
    low, high = ranked[(below - 1).clamp(0, last)], ranked[below.clamp(0, last)]
    between = below + (values - low) / torch.where(high > low, high - low, 1.0)
    rank = torch.where(upto > below, (below + upto + 1) / 2, between)
    return rank.clamp(1, len(ranked)) / (len(ranked) + 1)
