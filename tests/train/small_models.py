"""Models and samples that the tests of training share."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)
ROWS = 24


def moved(model: Model, by: float) -> Model:
    """A copy some way off, which stands for a better checkpoint."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(torch.randn_like(p), alpha=by)
    return other


def classifier() -> nn.Module:
    """Of samples (4,) into three classes."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def samples() -> list[dict[str, Any]]:
    """``ROWS`` of the classifier's."""
    torch.manual_seed(1)
    return [{"x": torch.randn(4), "y": int(torch.randint(3, ())), "id": f"s{i}"} for i in range(ROWS)]
