"""LoGra and TrackStar: their blocks and cosines."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from assay.methods import LoGra, TrackStar
from assay.tasks import Classification
from tests.methods.small_problem import EXACT, POOL, gradients, run


def test_logra_blocks_and_trackstar_cosines(problem) -> None:
    models, pool, target = problem
    model = models[0]
    got = run(LoGra([model], Classification(), {"t": [target]}, sketch=EXACT), pool)["logra"]
    phi, query = gradients(model, *pool), gradients(model, *target).mean(0)
    want, start = torch.zeros(POOL).double(), 0
    for p in model.parameters():
        block = slice(start, start := start + p.numel())
        moment = phi[:, block].T @ phi[:, block] / POOL
        moment += 0.1 * moment.diagonal().mean() * torch.eye(len(moment))
        want += phi[:, block] @ torch.linalg.solve(moment, query[block])
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))
    cosines = run(TrackStar([model], Classification(), {"t": [(pool[0][:1], pool[1][:1])]}), pool)["trackstar"]
    assert bool((cosines.abs() <= 1 + 1e-5).all())
    assert abs(float(cosines[0]) - 1) < 1e-4  # a sample with itself


def test_trackstar_does_not_depend_on_the_gradients_scale(problem) -> None:
    models, pool, target = problem
    want = run(TrackStar(models, Classification(), {"t": [target]}), pool)["trackstar"]

    class Scaled(Classification):
        def forward(self, model: nn.Module, batch: Any) -> Any:
            outputs = super().forward(model, batch)
            return outputs.with_losses(outputs.losses * 1e-5)

    got = run(TrackStar(models, Scaled(), {"t": [target]}), pool)["trackstar"]
    torch.testing.assert_close(got, want, rtol=1e-2, atol=2e-3)
