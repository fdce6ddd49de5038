"""SAS and SDS in float64, on digits whose classes' means stand for their texts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from assay.methods import clip_powered, sample_diversity, semantic_alignment
from tests.methods.data import noisy_digits


def test_equal_the_definitions_in_float64(monkeypatch) -> None:
    monkeypatch.setattr(clip_powered, "_ROWS", 17)
    data = noisy_digits(0.0, size=120)
    x, y = data.x.double().numpy(), data.true.numpy()
    texts = np.random.default_rng(0).normal(size=(10, 64))
    u, t = x / np.linalg.norm(x, axis=1)[:, None], texts / np.linalg.norm(texts, axis=1)[:, None]
    got = semantic_alignment(data.x, data.true, torch.tensor(texts))
    np.testing.assert_allclose(got.numpy(), (u * t[y]).sum(1), atol=1e-6)
    for k in (3, 50):  # of the latter a class has fewer
        expected = []
        for i in range(120):
            others = [np.linalg.norm(u[i] - u[j]) for j in range(120) if y[j] == y[i] and j != i]
            expected.append(np.mean(sorted(others)[:k]))
        np.testing.assert_allclose(sample_diversity(data.x, data.true, k).numpy(), expected, atol=1e-6)


def test_wrong_labels_are_not_aligned_and_copies_are_not_diverse() -> None:
    data = noisy_digits(0.2, size=1000)
    texts = torch.stack([data.x[data.true == c].mean(0) for c in range(10)])
    assert roc_auc_score(data.wrong, -semantic_alignment(data.x, data.given, texts).numpy()) > 0.95
    copies = torch.cat([data.x[:300], data.x[:100] + 0.01])
    labels = torch.cat([data.true[:300], data.true[:100]])
    is_copied = np.r_[np.ones(100), np.zeros(200), np.ones(100)]
    assert roc_auc_score(is_copied, -sample_diversity(copies, labels, 1).numpy()) > 0.99


def test_rows_of_which_nothing_is_known_and_mistakes() -> None:
    x, y = torch.eye(4), torch.tensor([0, 0, 1, 1])
    x[3] = torch.nan
    diversity = sample_diversity(x, y)
    np.testing.assert_allclose(diversity[:2].numpy(), np.sqrt(2), rtol=1e-6)
    assert bool(diversity[2:].isnan().all())  # alone, and unknown
    assert semantic_alignment(x, y, torch.eye(4)[:2]).isnan().tolist() == [False, False, False, True]
    assert semantic_alignment(x[:0], y[:0], x).shape == sample_diversity(x[:0], y[:0]).shape == (0,)
    for call, message in (
        (lambda: semantic_alignment(x, y, torch.eye(4)[:1]), r"labels: expected classes in \[0, 1\), got 0 to 1"),
        (lambda: semantic_alignment(x, y, torch.eye(3)), r"texts: expected \(classes, 4\)"),
        (lambda: sample_diversity(x, y.float()), "an integer class of each"),
        (lambda: sample_diversity(x, y, 0), "k: expected a finite number of at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
