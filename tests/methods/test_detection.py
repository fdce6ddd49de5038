"""Do the scores find wrong labels? Digits, out-of-fold ensemble and mimic, 20/40/60 % noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import KNeighborsClassifier

import assay
from assay.methods import GradMimic, ensemble_scores
from assay.retrain import out_of_fold
from assay.tasks import Classification
from tests.methods.data import mlp, noisy_digits, train


def auroc(wrong: np.ndarray, score: torch.Tensor | np.ndarray) -> float:
    """Of finding wrong labels by a low score."""
    return float(roc_auc_score(wrong, -np.asarray(score)))


@pytest.mark.parametrize(("noise", "target"), [(0.2, 0.995), (0.4, 0.99), (0.6, 0.97)])
def test_out_of_fold_ensemble(noise: float, target: float) -> None:
    data = noisy_digits(noise)
    members = [
        LogisticRegression(max_iter=300, C=0.05),
        RandomForestClassifier(100, random_state=0),
        KNeighborsClassifier(15),
    ]
    predictions = out_of_fold(members, data.x.numpy(), data.given.numpy())
    scores = ensemble_scores(predictions.logits, data.given)
    found = {name: auroc(data.wrong, value) for name, value in scores.items()}
    assert found["normalized_margin"] >= target
    assert found["margin"] >= target
    singles = [auroc(data.wrong, ensemble_scores([z], data.given)["normalized_margin"]) for z in predictions.logits]
    assert found["normalized_margin"] >= max(singles) - 0.001, "the ensemble is worse than its best model"
    for name in ("entropy", "mutual_information", "vote_entropy", "expected_entropy"):
        assert abs(found[name] - 0.5) < 0.06, f"{name} never sees the label and must be at chance"


def test_in_sample_predictions_hide_the_noise() -> None:
    """Why out_of_fold exists."""
    data = noisy_digits(0.2, size=600)
    held_out = out_of_fold(
        [lambda x, y: train(mlp(0), x, torch.as_tensor(y), epochs=60)], data.x, data.given.numpy()
    ).logits
    memorised = train(mlp(0), data.x, data.given, epochs=60)
    with torch.no_grad():
        in_sample = memorised(data.x)
    honest = auroc(data.wrong, ensemble_scores(held_out, data.given)["agreement"])
    fooled = auroc(data.wrong, ensemble_scores([in_sample], data.given)["agreement"])
    assert honest > 0.85
    assert fooled < 0.55, "a model that has memorised the wrong labels agrees with all of them"


@pytest.mark.parametrize("noise", [0.2, 0.4, 0.6])
def test_mimic_with_a_clean_reference(noise: float) -> None:
    data = noisy_digits(noise)
    pool, clean = slice(0, 900), slice(900, None)
    start = mlp(0)
    model = train(start, data.x[pool], data.given[pool], epochs=2, lr=0.01)
    reference = train(start, data.x[clean], data.true[clean], epochs=20)
    method = GradMimic(model, reference, Classification())
    batches = zip(data.x[pool].split(128), data.given[pool].split(128), strict=True)
    table = assay.score(batches, [method])
    assert auroc(data.wrong[pool], table["mimic"].to_numpy()) >= 0.99
    assert auroc(data.wrong[pool], -table["reference_loss"].to_numpy()) >= 0.99  # the control
    assert float(method.metadata()["lineage_correlation"]) > 0.7


def test_unrelated_reference_warns_in_the_log_and_in_the_table(caplog: pytest.LogCaptureFixture) -> None:
    data = noisy_digits(0.4)
    model = train(mlp(0), data.x[:900], data.given[:900], epochs=2, lr=0.01)
    stranger = train(mlp(99), data.x[900:], data.true[900:], epochs=20)
    with caplog.at_level("WARNING", logger="assay"):
        table = assay.score([(data.x[:900], data.given[:900])], [GradMimic(model, stranger, Classification())])
    assert auroc(data.wrong[:900], table["mimic"].to_numpy()) < 0.5, "below chance, as the papers' reviewers found"
    assert "direction to this reference means little" in caplog.text
    assert b"direction to this reference means little" in table.schema.metadata[b"assay"]
