"""Fixtures of the methods' tests."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.methods.small_problem import POOL


@pytest.fixture
def problem() -> tuple[list[nn.Module], tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Two checkpoints of a small network, a pool and a target of 5 samples."""
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)) for _ in range(2)]
    pool, target = (torch.randn(POOL, 6), torch.randint(3, (POOL,))), (torch.randn(5, 6), torch.randint(3, (5,)))
    return models, pool, target
