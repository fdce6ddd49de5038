"""GraNd: how long is the gradient of a sample's loss?

*Deep Learning on a Data Diet: Finding Important Examples Early in Training*, 2107.07075, definition 2.1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from assay.methods.base import Column, Method, Need
from assay.probe import Signals, SqNorm, tapped_parameters
from assay.tasks import Task


class GraNd(Method):
    """‖∇ℓ_i‖ over the chosen layers: keep high, early in training and where labels are clean.

    Columns: ``grand``; ``loss``, the control. A wrong label has a long gradient too, so that with noisy labels the
    high end holds them.

    Args:
        model: the model in training, a few epochs in.
        task: what a sample and its loss are.
        layers: glob or globs of layer names to take the gradient over; None: every supported layer.
        skip_unsupported: score without the layers that cannot be tapped exactly, instead of raising.
        name: name of the first column, and prefix of the other if it is not ``grand``.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        layers: str | Sequence[str] | None = None,
        *,
        skip_unsupported: bool = False,
        name: str = "grand",
    ) -> None:
        self.name = name
        self.model, self.task = model, task
        self.layers, self.skip_unsupported = layers, skip_unsupported
        self.parameters = tapped_parameters(model, layers, skip_unsupported=skip_unsupported)

    @property
    def columns(self) -> Sequence[Column]:
        return [
            Column(self.name, "high", "‖∇ℓ‖ over the chosen layers (GraNd)"),
            Column("loss" if self.name == "grand" else f"{self.name}_loss", "none", "the model's loss (the control)"),
        ]

    def needs(self) -> Mapping[str, Need]:
        reductions = {"sqnorm": SqNorm(tuple(self.parameters))}
        skip = self.skip_unsupported
        return {"model": Need(self.model, self.task, reductions=reductions, layers=self.layers, skip_unsupported=skip)}

    def score(self, signals: Mapping[str, Signals]) -> dict[str, Tensor]:
        model = signals["model"]
        norms = model.reduced["sqnorm"].sqrt().masked_fill(model.losses.isnan(), torch.nan)
        return dict(zip([column.name for column in self.columns], [norms, model.losses], strict=True))
