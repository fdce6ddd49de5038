"""The experiments on embeddings and on diversity: one seed of the quick ones."""

from __future__ import annotations

import torch

from benchmarks.quality.diversity import POOL, semdedup
from benchmarks.quality.embeddings import kernel, leverage


def test_what_is_unlike_the_rest_is_found() -> None:
    numbers = leverage(0)
    assert numbers["leverage"]["AUROC"] > 0.9
    assert abs(numbers["random (control)"]["AUROC"] - 0.5) < 0.15
    assert numbers["the highest"]["worth of a tenth"] < numbers["drawn by leverage"]["worth of a tenth"]


def test_nearly_every_copy_goes_and_every_digit_stays() -> None:
    numbers = semdedup(0)
    whole = numbers["without clusters"]
    assert whole["digits"] == POOL
    assert whole["copies"] < 30
    assert numbers["as many at random (control)"]["copies"] > 100


def test_the_kernel_of_all_pairs() -> None:
    """Far ones meet themselves alone, near ones nearly always; between, the probability of two grids by quadrature."""
    far = torch.eye(4)
    assert abs(kernel(far, 1e-4)[0] - 0.25) < 1e-6
    assert kernel(far[:1] + torch.tensor([[0.0] * 4, [1e-6] * 4]), 1.0).min() > 0.999
    width, distance = 1.0, 2**0.5
    gaps = torch.linspace(0, width, 20001, dtype=torch.float64)
    normal = torch.distributions.Normal(0.0, distance)
    once = torch.trapezoid(2 * normal.log_prob(gaps).exp() * (1 - gaps / width), gaps)  # a gap g shares a cell 1 − g/w
    assert abs(kernel(far, width)[0] - (1 + 3 * float(once) ** 2) / 4) < 1e-6
