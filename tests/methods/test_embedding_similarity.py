"""Embedding similarity against cosines in float64, on digits' pixels and with a language model's states."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

import assay
from assay.methods import EmbeddingSimilarity, RDSPlus
from assay.methods.embedding import Embedder
from assay.methods.sums import unit
from assay.tasks import CausalLM, Classification
from tests.methods.data import noisy_digits


def pixels() -> nn.Module:
    """A model whose last hidden state is its input."""
    torch.manual_seed(0)
    return nn.Linear(64, 10)


def cosines(x: Tensor, targets: Tensor) -> np.ndarray:
    a, b = x.double().numpy(), targets.double().numpy()
    return (a / np.linalg.norm(a, axis=1)[:, None]) @ (b / np.linalg.norm(b, axis=1)[:, None]).T


@pytest.mark.parametrize("across", ["mean", "max"])
@pytest.mark.parametrize("within", ["mean", "max"])
def test_equals_cosines_in_float64(within, across) -> None:
    data = noisy_digits(0.0, size=60)
    x, y = data.x, data.true
    targets = {"a": [(x[40:47], y[40:47]), (x[47:50], y[47:50])], "b": [(x[50:], y[50:])]}
    method = EmbeddingSimilarity(pixels(), Classification(), targets, within=within, across=across).fit()
    table = assay.score([(x[:30], y[:30]), (x[30:40], y[30:40])], [method])
    each = [getattr(cosines(x[:40], x[part]), within)(1) for part in (slice(40, 50), slice(50, 60))]
    for name, expected in zip("ab", each, strict=True):
        np.testing.assert_allclose(table[f"embedding_similarity_{name}"].to_numpy(), expected, atol=1e-6)
    expected = getattr(np.stack(each, 1), across)(1)
    np.testing.assert_allclose(table["embedding_similarity"].to_numpy(), expected, atol=1e-6)


def test_finds_the_targets_classes() -> None:
    data = noisy_digits(0.0)
    pool, held = slice(0, 1500), slice(1500, None)
    wanted = data.true[held] == 3
    target = {"three": [(data.x[held][wanted], data.true[held][wanted])]}
    table = assay.score(
        [(data.x[pool], data.true[pool])], [EmbeddingSimilarity(pixels(), Classification(), target).fit()]
    )
    right = (data.true[pool] == 3).numpy()
    scores = table["embedding_similarity"].to_numpy()
    assert roc_auc_score(right, scores) > 0.95
    assert right[np.argsort(-scores)[:150]].mean() > 0.7 > 3 * right.mean()


def test_lengths_beyond_the_type_and_directions_that_are_none() -> None:
    x = torch.ones(6, 64)
    x[1] *= 1e30
    x[2] *= 1e-30
    x[3], x[4, 0], x[5, 0] = 0, torch.inf, torch.nan
    y = torch.zeros(6, dtype=torch.long)
    method = EmbeddingSimilarity(pixels(), Classification(), {"t": [(x, y)]}).fit()
    scores = assay.score([(x, y)], [method])["embedding_similarity"].to_numpy()
    np.testing.assert_allclose(scores[:3], 1, atol=1e-6)
    assert np.isnan(scores[3:]).all()
    assert unit(torch.empty(0, 3)).shape == (0, 3)


class States(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.other, self.embed, self.out, self.last = (
            nn.Linear(6, 6),
            nn.Embedding(11, 6),
            nn.Linear(6, 11),
            nn.Linear(6, 6),
        )

    def get_output_embeddings(self) -> nn.Module:
        return self.out

    def forward(self, input_ids: Tensor) -> Tensor:
        out: Tensor = self.out(self.embed(input_ids).cumsum(1).tanh())
        return out


def test_rds_plus_weighs_states_by_position_and_takes_the_nearest_query() -> None:
    model, rng = States(), np.random.default_rng(0)
    texts = [rng.integers(1, 11, length).tolist() for length in (2, 5, 3, 7, 4, 6)]

    def batch(chosen: list[list[int]]) -> dict[str, Tensor]:
        ids = nn.utils.rnn.pad_sequence([torch.tensor(text) for text in chosen], batch_first=True)
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}

    states = [model.embed.weight.detach().double()[text].cumsum(0).tanh() for text in texts]
    pooled = torch.stack([torch.arange(1.0, len(s) + 1).double() @ s / (len(s) * (len(s) + 1) / 2) for s in states])
    method = RDSPlus(model, CausalLM(), {"t": [batch(texts[4:])]}).fit()
    assert method.metadata()["embedding"] == "input of layer 'out', position over positions"
    for size in (1, 4):
        batches = [batch(texts[start : start + size]) for start in range(0, 4, size)]
        got = assay.score(batches, [method])["rds_plus"].to_numpy()
        np.testing.assert_allclose(got, cosines(pooled[:4], pooled[4:]).max(1), atol=1e-6)


def test_mistakes() -> None:
    x, y = torch.ones(2, 64), torch.zeros(2, dtype=torch.long)
    for options, message in (
        ({"within": "min"}, "embedding_similarity: within 'min'; expected 'mean' or 'max'"),
        ({"pooling": "last"}, "embedding_similarity: pooling 'last'"),
        ({"at": "nothing"}, "'nothing' matches no layer"),
        ({"targets": {}}, "expected at least one target"),
    ):
        with pytest.raises(ValueError, match=message):
            EmbeddingSimilarity(**{"model": pixels(), "task": Classification(), "targets": {"t": [(x, y)]}} | options)
    with pytest.raises(ValueError, match="target 't' has no sample with a finite embedding"):
        EmbeddingSimilarity(pixels(), Classification(), {"t": [(0 * x, y)]}).fit()
    for nothing in ([], [(x[:0], y[:0])]):
        with pytest.raises(ValueError, match="target 't' has no sample"):
            EmbeddingSimilarity(pixels(), Classification(), {"t": nothing}).fit()
    with pytest.raises(ValueError, match="Flatten has no output layer"):
        Embedder("m", nn.Flatten(), Classification())
    unknown = EmbeddingSimilarity(nn.Sequential(pixels(), nn.Tanh()), Classification(), {"t": [(x, y)]}, at="1")
    with pytest.raises(ValueError, match="layer '1' does not tell how long its input is"):
        _ = unknown.kept
