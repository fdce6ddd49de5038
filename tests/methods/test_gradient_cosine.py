"""The gradient cosine against autograd's gradients, multiplied out, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import assay
from assay.methods import GradientCosine
from assay.tasks import Classification
from tests.methods.data import noisy_digits


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 10))


def gradients(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """(B, parameters), one sample at a time."""
    model = model.double()
    rows = []
    for i in range(len(x)):
        loss = nn.functional.cross_entropy(model(x[i : i + 1].double()), y[i : i + 1])
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    return torch.stack(rows)


def test_equals_the_cosine_of_whole_gradients():
    data = noisy_digits(0.3, size=60)
    x, y = data.x[:40], data.given[:40]
    targets = {
        "a": [(data.x[40:47], data.true[40:47]), (data.x[47:50], data.true[47:50])],
        "b": [(data.x[50:], data.true[50:])],
    }
    method = GradientCosine(network(), Classification(), targets).fit()
    table = assay.score([(x[:30], y[:30]), (x[30:], y[30:])], [method])
    own = nn.functional.normalize(gradients(network(), x, y), dim=1)
    expected = []
    for name, rows in (("a", slice(40, 50)), ("b", slice(50, 60))):
        mean = gradients(network(), data.x[rows], data.true[rows]).mean(0)
        expected.append(own @ nn.functional.normalize(mean, dim=0))
        np.testing.assert_allclose(table[f"gradient_cosine_{name}"].to_numpy(), expected[-1], atol=2e-6)
    np.testing.assert_allclose(table["gradient_cosine"].to_numpy(), torch.stack(expected).mean(0), atol=2e-6)


def test_what_has_no_direction_is_refused():
    data = noisy_digits(0.3, size=10)
    with pytest.raises(ValueError, match="expected at least one target"):
        GradientCosine(network(), Classification(), {})
    with pytest.raises(ValueError, match="target 't' has no samples"):
        GradientCosine(network(), Classification(), {"t": []}).fit()
    even = nn.Linear(4, 2)
    even.load_state_dict({name: torch.zeros_like(p) for name, p in even.state_dict().items()})
    with pytest.raises(ValueError, match="the gradients of target 't' add up to 0"):
        GradientCosine(even, Classification(), {"t": [(torch.ones(2, 4), torch.arange(2))]}).fit()
    with pytest.raises(RuntimeError, match="call fit"):
        assay.score([(data.x, data.given)], [GradientCosine(network(), Classification(), {"t": [(data.x, data.true)]})])
