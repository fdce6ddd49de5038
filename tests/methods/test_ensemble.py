"""Ensembles of regressors and taggers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import assay
from assay.methods import Ensemble
from assay.methods.ensemble import STATISTICS, regression_scores
from assay.tasks import CausalLM, Classification, Regression
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


class _Padded(nn.Module):
    """A language model of 7 tokens whose output layer has ``rows``."""

    def __init__(self, rows: int, bias: bool) -> None:
        super().__init__()
        self.embed, self.head, self.tells = nn.Embedding(7, 4), nn.Linear(4, rows, bias=bias), True

    def get_output_embeddings(self) -> nn.Linear | None:
        return self.head if self.tells else None

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.embed(input_ids))
        return logits


@pytest.mark.parametrize("fused", [True, False])
def test_each_model_keeps_its_own_softmax_where_a_vocabulary_is_padded_differently(fused: bool) -> None:
    torch.manual_seed(0)
    models = [_Padded(rows, bias) for rows, bias in ((7, False), (12, True), (9, True))]
    ids, w = torch.randint(0, 7, (5, 6)), torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    got = assay.score([{"input_ids": ids}], [Ensemble(models, CausalLM(fused=fused), w.tolist())])
    p = torch.zeros(3, 5, 5, 12, dtype=torch.float64)
    for own, model in zip(p, models, strict=True):
        own[..., : model.head.out_features] = model.double()(ids)[:, :-1].detach().softmax(-1)
    label, mix = ids[:, 1:, None], (w[:, None, None, None] * p).sum(0)
    others = mix.scatter(-1, label, -1.0).amax(-1)
    onehot = torch.zeros_like(mix).scatter(-1, label, 1.0)
    entropy = -torch.special.xlogy(mix, mix).sum(-1)
    expected_entropy = -torch.einsum("k,kbtc->bt", w, torch.special.xlogy(p, p))
    true = p.gather(-1, label.expand(3, -1, -1, -1))[..., 0]
    expected = {
        "nll": -mix.gather(-1, label)[..., 0].log(),
        "mean_nll": -torch.einsum("k,kbt->bt", w, true.log()),
        "margin": mix.gather(-1, label)[..., 0] - others,
        "agreement": torch.einsum("k,kbt->bt", w, (p.argmax(-1) == label[..., 0]).double()),
        "el2n": (mix - onehot).norm(dim=-1),
        "entropy": entropy,
        "expected_entropy": expected_entropy,
        "mutual_information": entropy - expected_entropy,
        "confidence": mix.amax(-1),
    }
    assert set(expected) == {column.name for column in STATISTICS} - {"vote_entropy"}
    for name, values in expected.items():
        np.testing.assert_allclose(got[f"ensemble_{name}"].to_numpy(), values.mean(1), rtol=2e-5, atol=1e-6)
    assert np.isfinite(got["ensemble_vote_entropy"].to_numpy()).all()


def test_output_layers_that_differ_by_more_than_padding_are_refused() -> None:
    models = [_Padded(7, False), _Padded(9, False)]
    with pytest.raises(ValueError, match="output layers of 7, 9 classes"):
        Ensemble(models, Classification())
    models[1] = _Padded(7 + 1025, False)
    with pytest.raises(ValueError, match="output layers of 7, 1032 classes"):
        Ensemble(models, CausalLM())
    models[0].tells = models[1].tells = False
    silent = Ensemble(models, CausalLM())
    with pytest.raises(ValueError, match="output layers of 7, 1032 classes"):
        assay.score([{"input_ids": torch.zeros(1, 3, dtype=torch.long)}], [silent])
