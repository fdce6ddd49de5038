"""Cosine of a sample's gradient with a target's: one checkpoint of TracIn (2002.08484), scaled to length 1."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from assay.methods.base import Column, Method, Need
from assay.methods.sums import Folded, Sums, cosines, fold, samples_left_out
from assay.methods.targets import Targets, TargetSet
from assay.probe import Dot, Reduction, Signals, SqNorm, tapped_parameters
from assay.tasks import Task

if TYPE_CHECKING:
    from typing_extensions import Self


class GradientCosine(Method):
    """cos(∇ℓ_i, g_t) with g_t the mean gradient of target t's samples: keep high.

    Exact, over whole gradients: nothing is projected, and no per-sample gradient is formed. The first-order effect of a
    step on sample i upon the target's loss is ⟨∇ℓ_i, g_t⟩ (TracIn, section 3); at length 1 a loud sample does not win.
    Without a second moment, directions that all samples share count fully: see ``TRAK`` and ``LoGra``.

    Columns: ``gradient_cosine``, and one per target if there are several. NaN for a sample with nothing to predict or
    whose ‖∇ℓ_i‖² is beyond float32, 0 for one whose gradient is 0.

    Args:
        model: the model that the data is to train.
        task: its loss is differentiated.
        targets: batches by name.
        layers: globs of the layers to take gradients of; None: every supported layer.
        name: of the aggregated column, and prefix of the targets'.
        skip_unsupported: leave out layers that cannot be tapped exactly, instead of raising.
    """

    gathers: ClassVar[int | None] = 0

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        targets: Targets,
        *,
        layers: str | Sequence[str] | None = None,
        name: str = "gradient_cosine",
        skip_unsupported: bool = False,
    ) -> None:
        self.name, self.model, self.task = name, model, task
        self.targets = TargetSet(name, targets).required()
        self.layers, self.skip_unsupported = layers, skip_unsupported
        self.parameters = tapped_parameters(model, layers, skip_unsupported=skip_unsupported)
        self.left_out: dict[str, str] = {}  # parameters that could not be tapped after all
        self._directions: dict[str, dict[str, Tensor]] = {}
        self._of_targets = Folded()

    @property
    def columns(self) -> Sequence[Column]:
        return self.targets.columns("cosine of gradients")

    def needs(self) -> Mapping[str, Need]:
        if not self._directions:
            raise RuntimeError(f"{self.name}: call fit() before scoring")
        reductions: dict[str, Reduction] = {t: Dot(direction) for t, direction in self._directions.items()}
        reductions["\0sqnorm"] = SqNorm(tuple(name for name in self.parameters if name not in self.left_out))
        need = Need(
            self.model,
            self.task,
            reductions=reductions,
            layers=self.layers,
            skip_unsupported=self.skip_unsupported,
        )
        return {"model": need}

    def fit(self, pool: Iterable[Any] = ()) -> Self:
        """Take the targets' mean gradients; the pool is not looked at.

        Raises:
            ValueError: a target without samples, without a loss and a finite gradient, or whose gradients cancel to 0.
        """
        gradients, folded = self.targets.gradients(self._run, self.parameters)
        directions = {}
        for target, gradient in gradients.items():
            norm = torch.stack([g.double().square().sum() for g in gradient.values()]).sum().sqrt()
            if not norm > 0:
                raise ValueError(f"{self.name}: the gradients of target {target!r} add up to 0: it has no direction")
            directions[target] = {name: (g / norm).to(g) for name, g in gradient.items()}
        self._directions, self.left_out, self._of_targets = directions, folded.left_out, folded
        return self

    def _run(self, sums: Sums, batches: Iterable[Any]) -> Folded:
        return fold(self.model, self.task, sums, batches, skip_unsupported=self.skip_unsupported)

    def score(self, signals: Mapping[str, Signals]) -> dict[str, Tensor]:
        signal = signals["model"]
        dots = torch.stack([signal.reduced[t] / self._length(t, signal.left_out) for t in self.targets.batches], 1)
        nothing = signal.losses.isnan()[:, None]  # to predict
        return self.targets.scores(cosines(dots, signal.reduced["\0sqnorm"]).masked_fill(nothing, torch.nan))

    def _length(self, target: str, left_out: frozenset[str]) -> float:
        """‖direction‖ over the parameters that samples have gradients in: 1 unless a layer is left out only now."""
        direction = self._directions[target]
        if left_out.isdisjoint(direction):
            return 1.0
        return math.sqrt(sum(float(d.double().square().sum()) for n, d in direction.items() if n not in left_out))

    def metadata(self) -> dict[str, str]:
        return {"targets": str(self.targets), "targets_left_out": samples_left_out(self._of_targets)}
