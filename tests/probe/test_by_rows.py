"""Reductions that look at a gradient a few rows at a time give what they give of its factors."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from assay.methods.direction import Moving
from assay.probe import Dot, Outer, PerSampleGradient, Reduction, SqNorm, gradient
from assay.probe.reductions import Reduced

LENGTH = 40  # positions: enough for gradients to be multiplied out


def gradient_of(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> PerSampleGradient:
    """Two samples'."""
    left, right = (torch.randn(2, LENGTH, size, dtype=dtype) for size in shape)
    return PerSampleGradient(torch.Size(shape), [Outer(left, right)])


def by_rows(own: PerSampleGradient, reductions: dict[str, Reduction], device: str = "cpu") -> dict[str, Tensor]:
    assert own.has_rows
    reduced = Reduced(2, reductions, torch.zeros(2, device=device), scale=torch.ones(2, device=device))
    reduced.add("weight", own)
    return reduced.values


def test_a_direction_of_another_shape_is_an_error() -> None:
    for shape in ((6, 1), (8, 5), (1, 5)):
        reductions = {"dot": Dot({"weight": torch.ones(shape)}), "sqnorm": SqNorm(["weight"])}
        with pytest.raises(
            ValueError, match=rf"weight: direction of shape \({shape[0]}, {shape[1]}\); expected \(6, 5\)"
        ):
            by_rows(gradient_of((6, 5)), reductions)


@pytest.mark.parametrize("size", [30, 300])
def test_gradients_in_double_are_not_rounded_to_a_direction_in_single(size: int) -> None:
    own, direction = gradient_of((size, size), torch.float64), torch.randn(size, size)
    found = by_rows(own, {"dot": Dot({"weight": direction}), "sqnorm": SqNorm(["weight"])})["dot"]
    expected = (own.dense() * direction).sum((1, 2))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13 * float(own.sqnorm().sqrt().max()) * size)


def test_readers_of_one_moving_direction_do_not_add_up_its_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient, "_TILE", 10)
    model = nn.Linear(5, 6)
    reference = copy.deepcopy(model)
    with torch.no_grad():
        reference.weight += 1
    moving = Moving(model, reference, ["weight"])
    found = by_rows(gradient_of((6, 5)), {"one": Dot(moving), "other": Dot(moving)})
    assert torch.equal(found["one"], found["other"])
    assert moving.norm() == pytest.approx(math.sqrt(30), rel=1e-6)


def test_a_layer_may_lie_on_another_device_than_the_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, Tensor] = {}
    monkeypatch.setattr(Reduced, "_add", lambda self, key, name, value: found.update({key: value}))
    own, direction = gradient_of((6, 5)), torch.randn(6, 5)
    by_rows(own, {"dot": Dot({"weight": direction}), "sqnorm": SqNorm(["weight"])}, device="meta")
    torch.testing.assert_close(found, {"dot": own.dot(direction), "sqnorm": own.sqnorm()})
