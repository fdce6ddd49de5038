"""TracIn against autograd, and the features that are kept for targets to come."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from assay.methods import Influence, Kernel, TracIn
from assay.tasks import Classification
from tests.methods.small_problem import EXACT, gradients, run


def test_it_is_the_rates_times_the_gradients_products(problem: Any) -> None:
    models, pool, target = problem
    got = run(TracIn(models, Classification(), {"a": [target], "b": [pool]}, [0.5, 2.0]), pool)
    own = [gradients(model, *pool) for model in models]
    a, b = (
        sum(rate * g @ q.mean(0) for rate, g, q in zip((0.5, 2.0), own, aims, strict=True))
        for aims in ([gradients(model, *target) for model in models], own)
    )
    torch.testing.assert_close(got["tracin_a"], a, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got["tracin_b"], b, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got["tracin"], (a + b) / 2, rtol=1e-4, atol=1e-5)


def test_features_that_are_kept_give_the_same(problem: Any) -> None:
    """As the docs say: Influence with weights, whose rates are scaled to sum to 1."""
    models, pool, target = problem
    got = run(TracIn(models, Classification(), {"t": [target]}, [0.5, 2.0]), pool)["tracin"]
    kept = Influence(models, Classification(), {"t": [target]}, Kernel(), EXACT, weights=[0.5, 2.0])
    torch.testing.assert_close(got, 2.5 * run(kept, pool)["influence"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rates", [[1.0], [1.0, 0.0], [1.0, float("inf")], [1.0, float("nan")]])
def test_rates_that_are_none_are_refused(problem: Any, rates: list[float]) -> None:
    models, _, target = problem
    with pytest.raises(ValueError, match="tracin: rates: expected a finite number above 0 for each of the 2 check"):
        TracIn(models, Classification(), {"t": [target]}, rates)


def test_checkpoints_of_other_models_are_refused(problem: Any) -> None:
    models, _, target = problem
    with pytest.raises(ValueError, match=r"tracin: checkpoint 1 differs from checkpoint 0 in parameter '0.weight'"):
        TracIn([models[0], nn.Sequential(nn.Linear(6, 4))], Classification(), {"t": [target]}, [1.0, 1.0])
    with pytest.raises(ValueError, match="tracin: expected at least one checkpoint"):
        TracIn([], Classification(), {"t": [target]}, [])
