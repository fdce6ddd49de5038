"""Label-quality scores equal cleanlab's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cleanlab.rank import get_label_quality_ensemble_scores, get_label_quality_scores

from assay.methods import Ensemble, ensemble_scores, label_quality, model_weights
from assay.tasks import Classification

METHODS = ["self_confidence", "normalized_margin", "confidence_weighted_entropy"]
WEIGHTS = {"uniform": "uniform", "accuracy": "accuracy", "log_loss": "log_loss_search"}


def predictions(k: int = 3, n: int = 200, c: int = 7) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Models of different skill on the same labels."""
    labels = torch.randint(c, (n,))
    skill = torch.nn.functional.one_hot(labels, c).float()
    return [torch.randn(n, c) + (1 + 2 * i) * skill for i in range(k)], labels


@pytest.mark.parametrize("method", METHODS)
def test_single_model_equals_cleanlab(method: str) -> None:
    (z, *_), labels = predictions()
    want = get_label_quality_scores(labels.numpy(), z.double().softmax(1).numpy(), method=method)
    np.testing.assert_allclose(label_quality([z], labels)[method].numpy(), want, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_ensemble_equals_cleanlab(method: str, weights: str) -> None:
    logits, labels = predictions()
    want = get_label_quality_ensemble_scores(
        labels.numpy(),
        [z.double().softmax(1).numpy() for z in logits],
        method=method,
        weight_ensemble_members_by=WEIGHTS[weights],
        verbose=False,
    )
    got = label_quality(logits, labels, weights)  # type: ignore[arg-type]
    np.testing.assert_allclose(got[method].numpy(), want, rtol=1e-4, atol=2e-6)


def test_weights_favour_the_better_model() -> None:
    logits, labels = predictions()
    for by in ("accuracy", "log_loss"):
        weights = model_weights(logits, labels, by)  # type: ignore[arg-type]
        assert weights[2] > weights[0]
        assert sum(weights) == pytest.approx(1)
    with pytest.raises(ValueError, match="accurcy"):
        model_weights(logits, labels, "accurcy")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="labelled rows"):
        model_weights(logits, torch.full_like(labels, -100), "accuracy")


def test_ignored_rows_are_nan_and_columns_match() -> None:
    logits, labels = predictions()
    labels[:5] = -100
    scores = ensemble_scores(logits, labels, [1.0, 2.0, 3.0])
    assert all(bool(v[:5].isnan().all()) for v in scores.values())
    assert all(bool(v[5:].isfinite().all()) for v in scores.values())
    method = Ensemble([torch.nn.Linear(2, 2)] * 3, Classification())
    assert [c.name for c in method.columns] == [f"ensemble_{name}" for name in scores]
