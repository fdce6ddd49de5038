"""Pooled hidden states against a loop over samples and positions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from assay.probe import Jvp, Pooled, Probe
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


class Steps(nn.Module):
    """An output layer on (T, B, D) or, ``first``, on (B, T, D)."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.first, self.body, self.head = first, nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x if self.first else x.transpose(0, 1)).tanh())
        return out.mean(1 if self.first else 0)


@pytest.mark.parametrize("what", ["embeddings", "reductions"])
@pytest.mark.parametrize("samples", [3, 4])
def test_a_layer_whose_samples_lie_in_the_second_dimension_is_refused(what: str, samples: int) -> None:
    """Also where there are as many as positions, which the shape does not tell."""
    found = {"embeddings": "head", "reductions": {"moved": Jvp([{"body.weight": torch.ones(5, 4)}], at="head")}}
    batch = (torch.randn(samples, 4, 4), torch.zeros(samples, dtype=torch.long))
    with pytest.raises(RuntimeError, match=rf"input of layer 'head' has shape \(4, {samples}, 5\) in a batch of"):
        Probe(Steps(first=False), Classification(), factors=(), **{what: found[what]})(batch)  # type: ignore[arg-type]


def test_as_many_positions_as_samples() -> None:
    model, batch = Steps(first=True), (torch.randn(4, 4, 4), torch.zeros(4, dtype=torch.long))
    moved = Jvp([{"body.weight": torch.ones(5, 4)}], at="head")
    probe = Probe(model, Classification(), factors=(), embeddings="head", reductions={"moved": moved})
    found, alone = probe(batch), [probe((x[None], y[None])) for x, y in zip(*batch, strict=True)]
    assert found.embeddings is not None
    torch.testing.assert_close(found.embeddings, torch.cat([one.embeddings for one in alone]))  # type: ignore[misc]
    torch.testing.assert_close(found.reduced["moved"], torch.cat([one.reduced["moved"] for one in alone]))
