"""The signed residual of a regression in place of its loss: which side of the prediction the target lies on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from assay.tasks.base import OfTask, Outputs
from assay.tasks.supervised import Regression


@dataclass(frozen=True)
class Residual(OfTask):
    """A regression whose "losses" are the residuals y − ŷ, (B,): above 0 where the prediction is too low.

    Args:
        task: Regression, of one number per sample.

    Raises:
        ValueError: another task; from ``forward`` also of several numbers per sample.
    """

    def __post_init__(self) -> None:
        if not isinstance(self.task, Regression):
            raise ValueError(
                f"Residual: {type(self.task).__name__} has no prediction to subtract; expected Regression, of one "
                "number per sample"
            )

    def forward(self, model: nn.Module, batch: Any) -> Outputs:
        return self.read(self.task.forward(model, batch))

    def read(self, outputs: Outputs) -> Outputs:
        """The residuals of a forward pass of ``task``: it needs no other."""
        prediction, target = outputs.prediction, outputs.target
        assert prediction is not None
        assert target is not None
        if prediction.numel() != len(prediction):
            raise ValueError(
                f"Residual: predictions of shape {tuple(prediction.shape)}; expected one number per sample, (B,) or "
                "(B, 1): a residual of several has no sign"
            )
        return outputs.with_losses((target - prediction).flatten().float())
