"""Residuals have the sign of what the prediction lacks, and are read off a regression's own forward pass."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from assay import Probe
from assay.tasks import Classification, Regression, Residual
from assay.tasks.base import base_task


@pytest.mark.parametrize("shape", [(6,), (6, 1)])
def test_targets_less_predictions(shape) -> None:
    model = nn.Sequential(nn.Linear(3, 1), *([nn.Flatten(0)] if len(shape) == 1 else []))
    x, y = torch.randn(6, 3), torch.randn(shape)
    with Probe(model, Residual(Regression()), factors=()) as probe, torch.no_grad():
        torch.testing.assert_close(probe((x, y)).losses, (y - model(x)).flatten())
    assert base_task(Residual(Regression())) == Regression()


def test_it_is_squared_the_regressions_loss() -> None:
    model, x, y = nn.Linear(3, 1), torch.randn(5, 3), torch.randn(5, 1)
    residual, loss = (task.forward(model, (x, y)).losses for task in (Residual(Regression()), Regression()))
    torch.testing.assert_close(residual.square(), loss)


def test_what_has_no_residual() -> None:
    with pytest.raises(ValueError, match="Residual: Classification has no prediction to subtract; expected Regression"):
        Residual(Classification())
    with pytest.raises(ValueError, match=r"predictions of shape \(2, 4\); expected one number per sample"):
        Residual(Regression()).forward(nn.Linear(3, 4), (torch.randn(2, 3), torch.randn(2, 4)))
