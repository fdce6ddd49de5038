"""Pooled hidden states against a loop over samples and positions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from assay.probe import Pooled, Probe
from assay.tasks import CausalLM, Classification


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(11, 6), nn.Linear(6, 11)

    def forward(self, input_ids: Tensor) -> Tensor:
        out: Tensor = self.head(self.embed(input_ids).cumsum(1).tanh())
        return out


def pooled(model: nn.Module, batch: dict[str, Tensor], weights: str) -> Tensor:
    probe = Probe(model, CausalLM(), factors=(), embeddings=Pooled("head", weights))  # type: ignore[arg-type]
    found = probe(batch).embeddings
    assert found is not None
    return found


@pytest.mark.parametrize("weights", ["mean", "position"])
def test_padding_has_no_weight(weights) -> None:
    model = Model()
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0], [7, 0, 0, 0]])
    batch = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    got = pooled(model, batch, weights).numpy()
    for row, own in zip(ids.tolist(), got, strict=True):
        tokens = [token for token in row if token]
        states = model.embed.weight.detach().double()[tokens].cumsum(0).tanh().numpy()
        by = np.arange(1, len(tokens) + 1) if weights == "position" else np.ones(len(tokens))
        np.testing.assert_allclose(own, by @ states / by.sum(), atol=1e-6)


def test_without_a_mask_every_position_counts() -> None:
    model = nn.Sequential(nn.Unflatten(1, (3, 2)), nn.Linear(2, 4), nn.Flatten(), nn.Linear(12, 2))
    x = torch.randn(5, 6)
    probe = Probe(model, Classification(), factors=(), embeddings=Pooled("1", "position"))
    got = probe((x, torch.zeros(5, dtype=torch.long))).embeddings
    assert got is not None
    expected = np.array([1, 2, 3]) @ x.view(5, 3, 2).double().numpy() / 6
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-6)
