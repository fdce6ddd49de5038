"""Observed training is plain training: bit for bit, or by sums of the samples' own gradients, which cost no product."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.methods import GradMimic, GraNd
from assay.probe import gradient, terms
from assay.tasks import CausalLM, Classification
from assay.train import Reweighter
from tests.train.small_models import moved

LENGTH = 40  # positions: enough for gradients to be multiplied out


class Language(nn.Module):
    """A causal model whose output layer is its embedding."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(29, 8)
        self.block = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.head = nn.Linear(8, 29, bias=not tied)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        h = self.embedding(input_ids)
        return self.head(h + self.block(h.cumsum(1) / 5))


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several pieces, which are cut between samples and rows."""
    monkeypatch.setattr(gradient, "_TILE", 80)


def losses_of(model: nn.Module, ids: Tensor) -> Tensor:
    logits = model(ids)[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1).mean(1)


def observed(start: nn.Module, reference: nn.Module, batches: list[Tensor], **settings: Any) -> tuple[nn.Module, Any]:
    """The model after two micro-batches, whose gradients add up, and its table."""
    model = copy.deepcopy(start)
    layers, bfloat16, norms = settings.pop("layers"), settings.pop("bfloat16", False), settings.pop("norms", True)
    method = GradMimic(model, reference, CausalLM(), layers, cosine=norms, grad_norm=norms)
    reweighter = Reweighter(model, method, "observe", **settings)
    for i, ids in enumerate(batches):
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            losses = losses_of(model, ids)
        reweighter.backward(losses, range(len(ids)), scale=0.25 + i)
    return model, reweighter.table()


def plain(start: nn.Module, batches: list[Tensor], bfloat16: bool) -> nn.Module:
    model = copy.deepcopy(start)
    for i, ids in enumerate(batches):
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            losses = losses_of(model, ids)
        ((0.25 + i) * losses).mean().backward()
    return model


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("layers", [None, "head", "block.*"])
@pytest.mark.parametrize("tied", [True, False])
def test_gradients_are_autograds_and_scores_the_same(tied: bool, layers: str | None, bfloat16: bool) -> None:
    start = Language(tied)
    reference, batches = moved(start, by=0.1), [torch.randint(29, (3, LENGTH)), torch.randint(29, (2, LENGTH))]
    expected = plain(start, batches, bfloat16)
    same, table = observed(start, reference, batches, layers=layers, bfloat16=bfloat16)
    for own, other in zip(same.parameters(), expected.parameters(), strict=True):
        assert torch.equal(own.grad, other.grad)
    summed, found = observed(start, reference, batches, layers=layers, bfloat16=bfloat16, exact=False)
    for (name, own), other in zip(summed.named_parameters(), expected.parameters(), strict=True):
        error = float((own.grad - other.grad).abs().max() / other.grad.abs().max())
        assert error < (1e-2 if bfloat16 else 1e-6), f"{name}: {error:.1e}"
    for name in ("mimic", "mimic_cosine", "grad_norm", "loss"):
        first, second = (torch.tensor(t[name].to_pylist()) for t in (table, found))
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6, msg=name)
    assert set(found["weight"].to_pylist()) == {1.0}


def test_no_product_is_made_but_for_the_gradients_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    start, batches = Language(), [torch.randint(29, (3, LENGTH))]
    reference = moved(start, by=0.1)

    def refused(*arguments: Any) -> Tensor:
        raise AssertionError("a product")

    monkeypatch.setattr(terms, "grad_dot", refused)
    monkeypatch.setattr(terms.Outer, "weighted", refused)
    observed(start, reference, batches, layers="head", norms=False, exact=False, verify=False)
    with pytest.raises(AssertionError, match="a product"):
        observed(start, reference, batches, layers="head", norms=False, verify=False)


def test_exact_is_about_observing() -> None:
    model = Language()
    for settings in ({}, {"mode": "filter", "keep": 0.5}, {"mode": "observe", "recompute": True}):
        with pytest.raises(ValueError, match=r"Reweighter: exact=False with mode '.*; expected mode 'observe'"):
            Reweighter(model, GraNd(model, CausalLM()), **settings, exact=False)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layer(x)[1][0])
        return logits


def test_a_recurrent_layer_is_not_observed_to_the_last_bit() -> None:
    torch.manual_seed(0)
    model, task = Recurrent(), Classification()
    with pytest.raises(ValueError, match=r"layer 'layer' \(GRU\) runs step by step .* pass exact=False"):
        Reweighter(model, GraNd(model, task), "observe")
    x, y = torch.randn(5, 6, 3), torch.arange(5) % 3
    for layers, exact in ((None, False), ("head", True)):
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        reweighter = Reweighter(model, GraNd(model, task, layers), "observe", exact=exact)
        reweighter.backward(F.cross_entropy(model(x), y, reduction="none"), range(5))
        for name, p in model.named_parameters():
            tolerance = 0.0 if exact else 1e-6
            torch.testing.assert_close(p.grad, expected[name], rtol=tolerance, atol=tolerance)
        reweighter.detach()
