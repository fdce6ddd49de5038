"""Cross-fitting: nobody predicts what it was trained on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.naive_bayes import GaussianNB

from assay.retrain import out_of_fold
from tests.methods.data import mlp, noisy_digits, train


def test_every_sample_is_predicted_by_a_model_that_did_not_see_it() -> None:
    data = noisy_digits(0.2, size=150)
    seen: list[set[bytes]] = []

    def fit(x: Any, y: Any) -> torch.nn.Module:
        seen.append({row.numpy().tobytes() for row in x})
        return train(mlp(0), x, torch.as_tensor(y), 1)

    out = out_of_fold([fit, GaussianNB()], data.x, data.given.numpy(), folds=4, seed=3)
    assert out.logits.shape == (2, 150, 10)
    assert bool(out.logits.isfinite().all())
    assert len(seen) == 4
    for row, fold in zip(data.x, out.folds, strict=True):
        assert row.numpy().tobytes() not in seen[fold]
    with torch.no_grad():
        for i in (0, 77):
            torch.testing.assert_close(out.logits[0, i], out.models[0][out.folds[i]](data.x[i : i + 1])[0])
    again = out_of_fold([GaussianNB()], data.x, data.given.numpy(), folds=4, seed=3)
    assert torch.equal(again.logits[0], out.logits[1])
    assert set(np.bincount(out.folds)) <= {37, 38}


def test_trained_models_are_taken_as_they_are() -> None:
    data = noisy_digits(0.2, size=90)
    folds = np.arange(90) % 3
    models = [train(mlp(f), data.x[folds != f], data.given[folds != f], 1) for f in range(3)]
    out = out_of_fold([models], data.x, data.given.numpy(), folds=folds)
    with torch.no_grad():
        torch.testing.assert_close(out.logits[0, folds == 1], models[1](data.x[folds == 1]))


@pytest.mark.parametrize(
    ("members", "folds", "y", "words"),
    [
        ([[mlp(0)]], 3, None, "one trained model per fold, 3, got 1"),
        ([GaussianNB()], 1, None, "folds: expected 2 to 30"),
        ([GaussianNB()], np.zeros(30, int), None, "at least two different folds"),
        ([GaussianNB()], np.zeros(3, int), None, r"folds: expected one per sample, shape \(30,\)"),
        ([GaussianNB()], 3, np.full(30, -1), "integer labels"),
        ([GaussianNB()], 3, np.zeros(4, int), r"y: expected one label per sample, shape \(30,\)"),
    ],
)
def test_wrong_arguments(members: list[Any], folds: Any, y: Any, words: str) -> None:
    data = noisy_digits(0.2, size=30)
    labels = data.given.numpy() if y is None else y
    with pytest.raises(ValueError, match=words):
        out_of_fold(members, data.x, labels, folds=folds)
