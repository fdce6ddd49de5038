"""Mimic scores equal their definition, and stay the same however the samples are batched."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import assay
from assay.methods import GradMimic, LoGra, grad_mimic
from assay.methods.grad_mimic import direction_towards
from assay.tasks import Classification
from tests.methods.data import mlp, noisy_digits, train


def models() -> tuple[nn.Module, nn.Module, torch.Tensor, torch.Tensor]:
    data = noisy_digits(0.3, size=300)
    model = train(mlp(0), data.x, data.given, 1, lr=0.01)
    return model, train(model, data.x, data.true, 5), data.x, data.given


def autograd_scores(
    model: nn.Module, reference: nn.Module, x: torch.Tensor, y: torch.Tensor, names: list[str]
) -> dict[str, list[float]]:
    """One backward pass per sample."""
    parameters = dict(model.named_parameters())
    v = {n: (dict(reference.named_parameters())[n] - parameters[n]).detach() for n in names}
    norm = sum(d.square().sum() for d in v.values()).sqrt()
    out: dict[str, list[float]] = {"mimic": [], "mimic_cosine": [], "grad_norm": []}
    for i in range(len(x)):
        loss = nn.functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
        grads = torch.autograd.grad(loss, [parameters[n] for n in names])
        m = -sum((g * v[n]).sum() for n, g in zip(names, grads, strict=True)) / norm
        g_norm = sum(g.square().sum() for g in grads).sqrt()
        out["mimic"].append(float(m))
        out["mimic_cosine"].append(float(m / g_norm))
        out["grad_norm"].append(float(g_norm))
    return out


@pytest.mark.parametrize(
    ("layers", "names"), [(None, ["0.weight", "0.bias", "2.weight", "2.bias"]), ("2", ["2.weight", "2.bias"])]
)
def test_equals_autograd_per_sample(layers: str | None, names: list[str]) -> None:
    model, reference, x, y = models()
    want = autograd_scores(model, reference, x[:20], y[:20], names)
    method = GradMimic(model, reference, Classification(), layers, cosine=True, grad_norm=True)
    table = assay.score([(x[:13], y[:13]), (x[13:20], y[13:20])], [method])
    for name, values in want.items():
        np.testing.assert_allclose(table[name].to_numpy(), values, rtol=1e-4, atol=1e-6)
    ce = nn.functional.cross_entropy
    np.testing.assert_allclose(
        table["loss"].to_numpy(), ce(model(x[:20]), y[:20], reduction="none").detach(), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(
        table["rho"].to_numpy(), table["loss"].to_numpy() - table["reference_loss"].to_numpy(), atol=1e-6
    )


def test_scale_and_sign_of_the_direction() -> None:
    model, reference, x, y = models()
    batches = [(x[:40], y[:40])]

    def towards(scale: float) -> np.ndarray:
        target = copy.deepcopy(reference)
        with torch.no_grad():
            for p, start in zip(target.parameters(), model.parameters(), strict=True):
                p.copy_(start + scale * (p - start))
        return assay.score(batches, [GradMimic(model, target, Classification())])["mimic"].to_numpy()

    np.testing.assert_allclose(towards(0.25), towards(1.0), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(towards(-1.0), -towards(1.0), rtol=1e-3, atol=1e-5)


def test_is_the_first_order_term_of_the_excess_loss() -> None:
    """‖v‖·m → loss − reference loss as v → 0."""
    model, reference, x, y = models()
    near = copy.deepcopy(model)
    with torch.no_grad():
        for p, q in zip(near.parameters(), reference.parameters(), strict=True):
            p.add_(1e-2 * (q - p))
    method = GradMimic(model, near, Classification())
    table = assay.score([(x, y)], [method])
    first_order, excess = table["mimic"].to_numpy() * method.norm, table["rho"].to_numpy()
    assert np.corrcoef(first_order, excess)[0, 1] > 0.999


def test_few_samples_tell_nothing_of_the_reference() -> None:
    model, reference, x, y = models()

    def facts(rows: int) -> dict[str, str]:
        method = GradMimic(model, reference, Classification())
        assay.score([(x[:rows], y[:rows])], [method])
        return method.metadata()

    for rows in (1, 2, 15):
        assert facts(rows).keys() == {"direction_norm", "direction_share"}
    assert -1 <= float(facts(16)["lineage_correlation"]) <= 1


def test_share_of_the_direction_and_refresh() -> None:
    model, reference, _, _ = models()
    head = GradMimic(model, reference, Classification(), "2")
    whole = GradMimic(model, reference, Classification())
    assert whole.share == pytest.approx(1)
    assert head.share == pytest.approx((head.norm / whole.norm) ** 2)
    with torch.no_grad():
        for p, q in zip(model.parameters(), reference.parameters(), strict=True):
            p.add_(0.5 * (q - p))
    whole.refresh()
    assert whole.norm == pytest.approx(2 * head.norm / head.share**0.5 / 4, rel=1e-3)


def test_wrong_references_are_named() -> None:
    model, reference, _, _ = models()
    with pytest.raises(ValueError, match=r"parameter 0\.weight of shape \(64, 64\).*\(32, 64\)"):
        GradMimic(model, mlp(0, width=32), Classification())
    with pytest.raises(ValueError, match="no such parameter"):
        GradMimic(model, nn.Sequential(nn.Linear(64, 64)), Classification())
    with pytest.raises(ValueError, match="equals the model"):
        GradMimic(model, copy.deepcopy(model), Classification())
    with pytest.raises(ValueError, match="head"):
        GradMimic(model, reference, Classification(), "head.*")
    parameters = ["2.bias"]
    direction = direction_towards(model, reference, parameters)
    assert list(direction.steps) == parameters
    assert direction.norm > 0
    assert 0 < direction.share < 1


class Tied(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(10, 10, bias=False), nn.Linear(10, 10, bias=False)
        if tied:
            self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.second(self.first(x).relu())
        return out


def test_a_model_and_a_reference_that_tie_other_weights_are_refused_both_ways() -> None:
    torch.manual_seed(0)
    models = {tied: Tied(tied) for tied in (True, False)}
    messages = {True: r"first\.weight tied to second\.weight as in the model, found untied"}
    messages[False] = r"first\.weight untied as in the model, found tied to second\.weight"
    for tied, message in messages.items():
        with pytest.raises(ValueError, match=message):
            GradMimic(models[tied], models[not tied], Classification())
        with pytest.raises(ValueError, match=r"checkpoint 1 differs from checkpoint 0 in parameter 'first\.weight'"):
            LoGra([models[tied], models[not tied]], Classification(), {"t": []})
        GradMimic(models[tied], Tied(tied), Classification())
    v = GradMimic(models[True], Tied(True), Classification()).direction
    assert list(v) == ["first.weight"]


def test_a_reference_with_parameters_of_its_own_is_refused_both_ways() -> None:
    small, large = (nn.Sequential(nn.Linear(4, 3, bias=bias)) for bias in (False, True))
    with pytest.raises(ValueError, match=r"expected parameter 0\.bias absent as in the model, found shape \(3,\)"):
        GradMimic(small, large, Classification())
    with pytest.raises(ValueError, match=r"expected parameter 0\.bias of shape \(3,\) as in the model, found no such"):
        GradMimic(large, small, Classification())


def test_the_constructor_copies_no_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    model, reference, x, y = models()
    monkeypatch.setattr(grad_mimic, "direction_towards", lambda *_: pytest.fail("the direction was taken"))
    method = GradMimic(model, reference, Classification())
    monkeypatch.undo()
    assert float(assay.score([(x[:4], y[:4])], [method])["mimic"].to_numpy().std()) > 0


class Mixed(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.known, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        self.mix = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(torch.einsum("bi,io->bo", self.known(x).tanh(), self.mix))
        return out


def test_a_layer_that_turns_out_not_to_be_tapped_is_no_part_of_the_direction() -> None:
    model, reference, batch = Mixed(0), Mixed(1), (torch.randn(8, 4), torch.randint(3, (8,)))
    columns = ("mimic", "mimic_cosine", "grad_norm")

    def scores(method: GradMimic) -> list[np.ndarray]:
        table = assay.score([batch], [method])
        return [table[name].to_numpy() for name in columns]

    options = {"cosine": True, "grad_norm": True}
    late = GradMimic(model, reference, Classification(), skip_unsupported=True, **options)
    never = GradMimic(model, reference, Classification(), ["known", "head"], **options)
    assert late.share == pytest.approx(1)
    for got, want in zip(scores(late), scores(never), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)
    facts = [method.metadata() for method in (late, never)]
    assert facts[0] == facts[1]
    assert list(late.direction) == list(never.direction)


def test_a_gradient_beyond_float32_has_no_cosine() -> None:
    model, reference, x = nn.Linear(4, 3), nn.Linear(4, 3), torch.randn(3, 4)
    x[1] *= 1e25
    scores = assay.score([(x, model(x).argmin(1))], [GradMimic(model, reference, Classification(), cosine=True)])
    assert np.isnan(scores["mimic_cosine"].to_numpy()).tolist() == [False, True, False]
    assert np.isfinite(scores["mimic"].to_numpy()).all()
