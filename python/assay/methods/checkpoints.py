"""What TracIn and SOURCE share: several checkpoints of one training run, and a direction for the gradients at each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from assay.methods.base import Column, Method, Need
from assay.methods.checks import difference
from assay.methods.sums import Folded, Sums, fold, samples_left_out
from assay.methods.targets import Targets, TargetSet
from assay.probe import Dot, Signals, tapped_parameters
from assay.tasks import Task

Gradients = Mapping[str, Mapping[str, Tensor]]
"""By target: by parameter, of the parameter's shape."""


class AlongTraining(Method):
    """Σ_k ⟨u_k, ∇ℓ_i(θ_k)⟩ over checkpoints θ_k of one run, with u_k what ``fit`` makes of the target's gradient.

    Args:
        models: checkpoints, in the order of training.
        task: its loss is differentiated.
        targets: batches by name.
        rates: of each checkpoint the learning rates of the steps that it stands for, added up, and divided by
            1 − momentum.
        layers, name, skip_unsupported: as in ``Influence``.

    Raises:
        ValueError: no model, no target, models of different parameters, or rates that are not a finite number above 0
            for each.
    """

    gathers: ClassVar[int | None] = 0
    kind: ClassVar[str]
    """What the columns' descriptions begin with."""

    def __init__(
        self,
        models: Sequence[nn.Module],
        task: Task,
        targets: Targets,
        rates: Sequence[float],
        *,
        layers: str | Sequence[str] | None,
        name: str,
        skip_unsupported: bool,
    ) -> None:
        self.name, self.models, self.task, self.rates = name, list(models), task, [float(rate) for rate in rates]
        self.layers, self.skip_unsupported = layers, skip_unsupported
        if not self.models:
            raise ValueError(f"{name}: expected at least one checkpoint, got none")
        if len(self.rates) != len(self.models) or not all(0 < rate < math.inf for rate in self.rates):
            raise ValueError(
                f"{name}: rates: expected a finite number above 0 for each of the {len(self.models)} checkpoints, got "
                f"{self.rates}"
            )
        self.targets = TargetSet(name, targets).required()
        self.parameters = tapped_parameters(self.models[0], layers, skip_unsupported=skip_unsupported)
        for k, model in enumerate(self.models[1:], 1):
            if other := difference(self.models[0], model, self.parameters):
                raise ValueError(
                    f"{name}: checkpoint {k} differs from checkpoint 0 in parameter {other.parameter!r}: expected it "
                    f"{other.expected}, found {other.actual}"
                )
        self.left_out: dict[str, str] = {}  # parameters that could not be tapped after all
        self._of_targets: list[Folded] = []  # samples that fit() went through, by checkpoint
        self._directions: list[Gradients] = []  # by checkpoint: u_k

    @property
    def columns(self) -> Sequence[Column]:
        return self.targets.columns(self.kind)

    def needs(self) -> Mapping[str, Need]:
        if not self._directions:
            raise RuntimeError(f"{self.name}: call fit() before scoring")
        return {
            f"model{k}": Need(
                model,
                self.task,
                reductions={target: Dot(direction) for target, direction in directions.items()},
                layers=self.layers,
                skip_unsupported=self.skip_unsupported,
            )
            for k, (model, directions) in enumerate(zip(self.models, self._directions, strict=True))
        }

    def score(self, signals: Mapping[str, Signals]) -> dict[str, Tensor]:
        total = torch.zeros(())
        for k in range(len(self.models)):
            signal = signals[f"model{k}"]
            each = torch.stack([signal.reduced[target] for target in self.targets.batches], 1)
            total = total.to(each.device) + each.masked_fill(signal.losses.isnan()[:, None], torch.nan)
        return self.targets.scores(total)

    def metadata(self) -> dict[str, str]:
        return {
            "targets": str(self.targets),
            "checkpoints": str(len(self.models)),
            "rates": ", ".join(f"{rate:g}" for rate in self.rates),
            "targets_left_out": samples_left_out(*self._of_targets),
        }

    def _gradients(self, k: int) -> tuple[dict[str, dict[str, Tensor]], Folded]:
        """The targets' mean gradients at checkpoint k, and what their samples are."""
        return self.targets.gradients(lambda sums, batches: self._run(k, sums, batches), self.parameters)

    def _run(self, k: int, sums: Sums, batches: Iterable[Any], drawn: bool = False) -> Folded:
        """``drawn``: each checkpoint's labels are its own, so that a mean over checkpoints is of more draws."""
        seed = k if drawn else None
        return fold(self.models[k], self.task, sums, batches, skip_unsupported=self.skip_unsupported, drawn=seed)
