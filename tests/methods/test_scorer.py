"""The scorer runs every model once per batch, and assay.score makes tables."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

import assay
from assay.methods import Ensemble, GradMimic, Method, Scorer, ensemble_scores
from assay.tasks import CausalLM, Classification
from tests.methods.data import mlp, noisy_digits, train


class Counting(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        out: torch.Tensor = self.inner(x)
        return out


def test_each_model_runs_once_per_batch() -> None:
    data = noisy_digits(0.3, size=200)
    start = mlp(0)
    model = Counting(start)
    reference = Counting(train(start, data.x, data.true, 3))
    task = Classification()
    methods: list[Method] = [
        GradMimic(model, reference, task),
        GradMimic(model, reference, task, "inner.2", name="head"),
        Ensemble([model, reference], task),
    ]
    batches = list(zip(data.x.split(50), data.given.split(50), strict=True))
    table = assay.score(batches, methods, verify=False)
    assert (model.calls, reference.calls) == (4, 4)
    assert table.num_rows == 200
    assert {"mimic", "head", "head_loss", "ensemble_nll"} <= set(table.column_names)
    alone = assay.score(batches, [GradMimic(model, reference, task, "inner.2", name="head")], verify=False)
    np.testing.assert_allclose(table["head"].to_numpy(), alone["head"].to_numpy(), rtol=1e-5, atol=1e-7)
    want = ensemble_scores([model(data.x), reference(data.x)], data.given)
    np.testing.assert_allclose(table["ensemble_nll"].to_numpy(), want["nll"].numpy(), rtol=1e-4, atol=1e-5)


def test_table_ids_directions_and_metadata() -> None:
    data = noisy_digits(0.3, size=60)
    method = Ensemble([mlp(0), mlp(1)], Classification(), weights=[1, 3])
    table = assay.score([(data.x, data.given)], [method], ids=[f"d{i}" for i in range(60)])
    assert table["id"][3].as_py() == "d3"
    assert table.schema.field("ensemble_margin").metadata[b"keep"] == b"high"
    assert table.schema.field("ensemble_nll").metadata[b"keep"] == b"low"
    assert table.schema.field("ensemble_mutual_information").metadata[b"keep"] == b"none"
    assert json.loads(table.schema.metadata[b"assay"])["methods"]["ensemble.models"] == "2"
    assert isinstance(method, Method)
    with pytest.raises(ValueError, match="ids: expected one per sample, 60, got 2"):
        assay.score([(data.x, data.given)], [method], ids=["a", "b"])
    assert assay.score([], [method]).num_rows == 0


def test_name_clash_is_an_error() -> None:
    model = mlp(0)
    with pytest.raises(ValueError, match=r"ensemble_nll.*another name="):
        Scorer([Ensemble([model], Classification()), Ensemble([model], Classification())])


class TinyLM(nn.Module):
    def __init__(self, vocabulary: int = 23) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, 8)
        self.head = nn.Linear(8, vocabulary)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.embed(input_ids).cumsum(1))
        return out


def test_text_gets_the_mean_over_predicted_tokens() -> None:
    torch.manual_seed(0)
    models = [TinyLM(), TinyLM()]
    ids = torch.randint(23, (3, 7))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    mask[2, 1:] = 0  # one token: nothing to predict
    table = assay.score([{"input_ids": ids, "attention_mask": mask}], [Ensemble(models, CausalLM())])
    for row, length in ((0, 7), (1, 4)):
        logits = torch.stack([m(ids[row : row + 1, :length])[0, :-1] for m in models])
        want = assay.ops.ensemble_stats(logits, ids[row, 1:length])
        assert table["ensemble_nll"][row].as_py() == pytest.approx(float(want.nll.mean()), rel=1e-5)
        assert table["ensemble_entropy"][row].as_py() == pytest.approx(float(want.entropy.mean()), rel=1e-5)
    assert np.isnan(table["ensemble_nll"][2].as_py())
    assert "ensemble_prediction" not in table.column_names
