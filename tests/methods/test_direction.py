"""A direction whose two ends move: what it costs to look at it, and its length."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from assay.methods import direction
from assay.methods.direction import Moving, direction_towards, square_of_length


def test_a_moving_direction_is_made_when_it_is_read_and_by_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    moving = Moving(nn.Linear(3, 2), nn.Linear(3, 2), ["weight", "bias"])
    with monkeypatch.context() as patched:
        patched.setattr(direction, "_step", lambda *_: pytest.fail("a direction was made"))
        assert "weight" in moving
        assert "weight" in moving.keys()  # noqa: SIM118  (what Dot.parameters gives)
        assert "other" not in moving
        assert list(moving) == ["weight", "bias"]
    assert moving["weight"].shape == (2, 3)


@pytest.mark.parametrize("shape", [(), (0,), (3, 5), (256,), (7, 11, 13), (300, 1000)])
def test_the_length_is_that_of_double(shape: tuple[int, ...]) -> None:
    step = torch.randn(shape) * torch.randn(shape).exp()
    found = square_of_length(step)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, step.double().square().sum(), rtol=1e-6, atol=0)
    torch.testing.assert_close(square_of_length(step.mT if len(shape) == 2 else step), found, rtol=1e-6, atol=0)


def test_a_reference_that_is_near_in_float64() -> None:
    """The difference is rounded to float32, and not the weights that it is of."""
    model, reference = nn.Linear(3, 2).double(), nn.Linear(3, 2).double()
    step = torch.randn(2, 3, dtype=torch.float64) * 1e-9
    reference.weight.data = model.weight.data + step
    exact = reference.weight.data - model.weight.data
    for found in (direction_towards(model, reference, ["weight"]).steps, Moving(model, reference, ["weight"])):
        torch.testing.assert_close(found["weight"], exact.float(), rtol=1e-6, atol=0)
