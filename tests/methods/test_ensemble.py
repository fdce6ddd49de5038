"""Ensembles of regressors and taggers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import assay
from assay.methods import Ensemble
from assay.methods.ensemble import regression_scores
from assay.tasks import Regression
from tests.methods import contract


def _regressors(outputs: int) -> contract.World:
    generator = torch.Generator().manual_seed(2)
    world = contract.classification()
    y = torch.randn(contract.SAMPLES, outputs, generator=generator)
    samples = [(x, own) for (x, _), own in zip(world.samples, y, strict=True)]
    torch.manual_seed(1)
    models = [nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, outputs)) for _ in range(3)]
    return replace(
        world,
        task=Regression(),
        models=models,
        samples=samples,
        broken=(torch.full((5,), torch.nan), y[contract.BROKEN]),
    )


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("weights", [None, [3.0, 1.0]])
def test_regressors_give_mean_variance_and_residual(outputs: int, weights: list[float] | None) -> None:
    world = _regressors(outputs)
    table = assay.score(world.pool, [Ensemble(world.models[:2], world.task, weights)])
    assert table.column_names == ["row", "id", "ensemble_mean", "ensemble_variance", "ensemble_residual"]
    x, y = (torch.stack(side).double() for side in zip(*world.samples, strict=True))
    f = np.stack([model.double()(x).detach().numpy() for model in world.models[:2]])
    mean = np.average(f, axis=0, weights=weights)
    expected = {
        "mean": mean.mean(1),
        "variance": np.average((f - mean) ** 2, axis=0, weights=weights).mean(1),
        "residual": ((mean - y.numpy()) ** 2).mean(1),
    }
    for name, values in expected.items():
        np.testing.assert_allclose(table[f"ensemble_{name}"].to_numpy(), values, rtol=1e-5, atol=1e-7)
    losses = np.average(((f - y.numpy()) ** 2).mean(2), axis=0, weights=weights)
    np.testing.assert_allclose(losses, expected["residual"] + expected["variance"], rtol=1e-9)


def test_one_dimensional_predictions_do_not_mix_samples() -> None:
    world = _regressors(1)
    flat = [nn.Sequential(model, nn.Flatten(0)) for model in world.models[:2]]
    expected = assay.score(world.pool, [Ensemble(world.models[:2], world.task)])
    got = assay.score([(x, y[:, 0]) for x, y in world.pool], [Ensemble(flat, world.task)])
    for name in expected.column_names[2:]:
        np.testing.assert_allclose(got[name].to_numpy(), expected[name].to_numpy(), rtol=1e-6)


@pytest.mark.parametrize(
    "check", [c for c in contract.CHECKS if "recipe" not in c.__name__], ids=lambda check: check.__name__
)
def test_an_ensemble_of_regressors_keeps_the_contract(check: object) -> None:
    check(Ensemble, _regressors(2))  # type: ignore[operator]


def test_a_regressions_target_may_lie_in_any_order():
    torch.manual_seed(0)
    target, predictions = torch.randn(4, 3, 5), [torch.randn(4, 3, 5) for _ in range(2)]
    turned = target.transpose(1, 2).contiguous().transpose(1, 2)
    found, expected = (regression_scores(predictions, each) for each in (turned, target))
    for name in expected:
        assert torch.equal(found[name], expected[name])
