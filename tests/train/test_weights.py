"""Weights are made of a batch's scores: their mean is 1, and what has no score has none."""

from __future__ import annotations

import pytest
import torch

from assay.train.weights import best_share, softmax_weights

NAN, INF = torch.nan, torch.inf


@pytest.mark.parametrize(
    ("scores", "keep", "kept"),
    [
        ([3.0, 1.0, 2.0, 0.0], 0.5, [0, 2]),
        ([1.0, 1.0, 1.0, 2.0], 0.5, [3, 0]),
        ([NAN, -INF, 1.0], 1.0, [1, 2]),
        ([NAN, -INF, NAN, -INF], 0.25, [1]),
        ([-INF, INF, NAN], 0.3, [1]),
        ([NAN, NAN], 1.0, []),
    ],
)
def test_the_best_share_is_never_of_what_has_no_score(scores, keep, kept) -> None:
    weights = best_share(torch.tensor(scores), keep)
    assert weights.nonzero()[:, 0].tolist() == sorted(kept)
    if kept:
        assert float(weights.mean()) == pytest.approx(1)


def test_softmax_weights_are_of_the_samples_with_a_score() -> None:
    weights = softmax_weights(torch.tensor([1.0, NAN, 3.0]), 2.0)
    expected = 3 * torch.tensor([0.5, 1.5]).double().softmax(0)
    torch.testing.assert_close(weights[[0, 2]], expected)
    assert float(weights[1]) == 0


def test_the_best_share_is_never_nobody() -> None:
    assert best_share(torch.tensor([1.0, 3.0, 2.0]), 1e-12).tolist() == [0, 3, 0]
