"""Label-quality scores equal cleanlab's own where it keeps to its formulas, and the formulas where it does not."""

from __future__ import annotations

import math
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from cleanlab.rank import get_label_quality_ensemble_scores, get_label_quality_scores
from sklearn.metrics import roc_auc_score

from assay import ops
from assay.methods import Ensemble, ensemble_scores, label_quality, model_weights
from assay.methods.label_quality import _sharp
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


def exact(logits: torch.Tensor, label: int) -> list[float]:
    """The three scores of one row, with as many digits as it takes."""
    with mpmath.workdps(1000):
        z = [mpmath.mpf(float(v)) for v in logits]
        e = [mpmath.exp(v - max(z)) for v in z]
        p = [v / sum(e) for v in e]
        x = -sum(q * mpmath.log(q) for q in p) / mpmath.log(len(p)) / p[label]
        rival = max(q for c, q in enumerate(p) if c != label)
        return [float(p[label]), float((p[label] - rival + 1) / 2), float(mpmath.log(1 + x) / x)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [2, 10])
@pytest.mark.parametrize("lead", [0.0, 1.0, 15.0, 20.0, 30.0, 40.0, 100.0, 800.0])
def test_sure_rows_have_the_values_of_the_formulas(lead: float, classes: int, dtype: torch.dtype) -> None:
    z = torch.zeros(2, classes, dtype=dtype)
    z[:, 1] = lead
    z[:, 0] = 0.25
    labels = torch.tensor([1, 0])
    got = torch.stack(list(label_quality([z], labels).values()), 1)
    want = torch.tensor([exact(z[i], int(y)) for i, y in enumerate(labels)])
    torch.testing.assert_close(got, want, rtol=2e-6, atol=1e-12)


def test_a_sure_right_label_ranks_above_a_sure_wrong_one() -> None:
    """cleanlab's floors give .06 to the first and .97 to the second."""
    z = torch.zeros(200, 2)
    z[:, 0] = torch.linspace(14, 24, 200)
    labels = (torch.arange(200) % 4 == 0).long()
    score = label_quality([z], labels)["confidence_weighted_entropy"]
    assert roc_auc_score(labels == 0, score) == 1.0
    assert score[labels == 0].min() > 0.999
    assert score[labels == 1].max() < 0.16


def test_labels_that_a_model_rules_out() -> None:
    inf = torch.inf
    z = torch.tensor([[0.0, -inf, -inf], [0.0, -inf, -inf], [0.0, 0.0, -inf], [0.0, -3e38, -3e38], [-inf] * 3])
    got = label_quality([z], torch.tensor([0, 1, 2, 1, 0]))["confidence_weighted_entropy"]
    torch.testing.assert_close(got[:4], torch.tensor([1.0, 0.0, 0.0, 0.0]))
    assert got[4].isnan()  # no probabilities at all
    one_class = label_quality([torch.zeros(2, 1)], torch.zeros(2, dtype=torch.int64))
    assert all(torch.equal(v, torch.ones(2)) for v in one_class.values())


def rows_around_the_border(classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of every sharpness, with labels of high, low and no probability."""
    rows = torch.randn(600, classes) * torch.linspace(1, 30, 600)[:, None]
    tied = torch.randint(2, (100, classes)) * torch.linspace(0, 30, 100)[:, None]
    peaked = torch.zeros(200, classes)
    peaked[:, 0] = torch.linspace(0, 100, 200)
    masked = rows[:200].where(torch.rand(200, classes) < 0.7, -torch.inf)
    masked[:, 0] = 0.0
    z = torch.cat([rows, tied, peaked, masked])
    return z, torch.where(torch.rand(len(z)) < 0.5, z.argmax(1), torch.randint(classes, (len(z),)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("classes", [1, 2, 3, 10, 300])
def test_the_short_way_agrees_with_the_formulas(classes: int, dtype: torch.dtype) -> None:
    z, labels = rows_around_the_border(classes)
    z = z.to(dtype)
    stats = ops.ensemble_stats([z], labels, fields=("nll", "entropy"))
    assert stats.nll is not None
    assert stats.entropy is not None
    sharp = _sharp(stats.nll, stats.entropy)
    assert bool((~sharp).any())
    assert bool(sharp.any()) == (classes > 1)
    got = torch.stack(list(label_quality([z], labels).values()))
    formulas = torch.stack(list(label_quality([z.double()], labels).values()))  # float64 takes them throughout
    torch.testing.assert_close(got, formulas, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got[:, sharp], formulas[:, sharp], rtol=2e-7, atol=0)
    ensemble = label_quality([z, z.flip(0)], labels, [3.0, 1.0]).values()
    flipped = torch.stack(list(label_quality([z.double().flip(0)], labels).values()))
    torch.testing.assert_close(torch.stack(list(ensemble)), (3 * formulas + flipped) / 4, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_of_huge_logits(dtype: torch.dtype) -> None:
    """A lead that overflows, a tie beside a class ruled out, all equal."""
    z = torch.tensor([[3e38, -3e38, 0.0], [3e38, 3e38, -torch.inf], [-3e38, -3e38, -3e38]], dtype=dtype)
    tie, flat = 2 * math.log(2) / math.log(3), 3.0  # x
    tie, flat = math.log1p(tie) / tie, math.log1p(flat) / flat
    got = torch.stack(list(label_quality([z], torch.tensor([0, 0, 0])).values()), 1)
    torch.testing.assert_close(got, torch.tensor([[1, 1, 1], [1 / 2, 1 / 2, tie], [1 / 3, 1 / 2, flat]]))
    got = torch.stack(list(label_quality([z], torch.tensor([1, 2, 2])).values()), 1)
    torch.testing.assert_close(got, torch.tensor([[0, 0, 0], [0, 1 / 4, 0], [1 / 3, 1 / 2, flat]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_without_probabilities_are_nan(dtype: torch.dtype) -> None:
    z = torch.zeros(6, 3, dtype=dtype)
    z[0, 1], z[1, 2], z[2], z[3, 0] = torch.nan, torch.inf, -torch.inf, -torch.inf
    for adjust in (False, True):
        scores = label_quality(
            [z, torch.zeros(6, 3)], torch.tensor([0, 1, 2, 1, -100, 0]), [0.0, 1.0], adjust_pred_probs=adjust
        )
        for score in scores.values():
            assert score.isnan().tolist() == [True, True, True, False, True, False]


def test_blocks_of_rows_are_as_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = predictions()
    labels[::7] = -100
    logits[1][5] = torch.nan
    whole = label_quality(logits, labels, [1.0, 2.0, 0.0])
    assert all(bool(v.isnan()[5]) and not bool(v.isnan()[6]) for v in whole.values())
    monkeypatch.setitem(label_quality.__globals__, "_BLOCK", 17 * 3 * 7)
    for name, score in label_quality(logits, labels, [1.0, 2.0, 0.0]).items():
        torch.testing.assert_close(score, whole[name], rtol=2e-7, atol=0, equal_nan=True)


@pytest.mark.parametrize("method", METHODS[:2])
@pytest.mark.parametrize("missing", [False, True])
def test_adjusted_probabilities_equal_cleanlab(method: str, missing: bool) -> None:
    logits, labels = predictions()
    if missing:
        labels = labels.where(labels != 3, 4)
    want = get_label_quality_ensemble_scores(
        labels.numpy(),
        [z.double().softmax(1).numpy() for z in logits],
        method=method,
        adjust_pred_probs=True,
        weight_ensemble_members_by="uniform",
        verbose=False,
    )
    ignored = torch.cat([labels, torch.full((3,), -100)])  # rows without a label have no say in the thresholds
    got = label_quality([torch.cat([z, z[:3]]) for z in logits], ignored, adjust_pred_probs=True)
    assert list(got) == METHODS[:2]
    np.testing.assert_allclose(got[method][:-3].numpy(), want, rtol=1e-6, atol=1e-7)
    assert bool(got[method][-3:].isnan().all())


def test_log_loss_weights_of_sure_models_are_of_the_log_loss() -> None:
    """Two models with every label wrong by a lead of 20 and of 40: cleanlab's floor makes them equal."""
    z = torch.zeros(8, 2)
    z[:, 0] = 20.0
    labels = torch.ones(8, dtype=torch.int64)
    weights = model_weights([z, 2 * z], labels, "log_loss")
    assert weights[0] == pytest.approx(1.0)
    ruled_out = z.clone()
    ruled_out[0, 1] = -torch.inf
    assert model_weights([z, ruled_out], labels, "log_loss") == [1.0, 0.0]
    with pytest.raises(ValueError, match="every model gives some label probability 0"):
        model_weights([ruled_out, ruled_out], labels, "log_loss")


def test_rows_without_probabilities_have_no_say_in_the_weights() -> None:
    logits, labels = predictions()
    broken = [torch.cat([z, torch.full((1, 7), torch.nan if k else 1.0)]) for k, z in enumerate(logits)]
    for by in ("accuracy", "log_loss"):
        more = model_weights(broken, torch.cat([labels, labels[:1]]), by)  # type: ignore[arg-type]
        assert more == model_weights(logits, labels, by)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ([0.0, 0.0, 0.0], "weights: expected finite, not negative, with a positive sum"),
        ([1.0, -1.0, 1.0], "weights: expected finite, not negative"),
        ([1.0, float("nan"), 1.0], "weights: expected finite"),
        ([1.0, float("inf"), 1.0], "weights: expected finite"),
        ([1.0, 1.0], r"weights: expected one weight per model, shape \(3,\), got \(2,\)"),
        ([[1.0], [1.0], [1.0]], "weights: expected one weight per model"),
        (["a", "b", "c"], "weights: expected one weight per model, 3 numbers"),
        ([None, 1.0, 1.0], "weights: expected one weight per model, 3 numbers"),
    ],
)
def test_wrong_weights(weights: Any, words: str) -> None:
    logits, labels = predictions()
    with pytest.raises(ValueError, match=words):
        label_quality(logits, labels, weights)
    with pytest.raises(ValueError, match=words):
        Ensemble([torch.nn.Linear(2, 2)] * 3, Classification(), weights)


def test_weights_of_any_size_and_kind() -> None:
    logits, labels = predictions()
    want = label_quality(logits, labels, [1.0, 2.0, 1.0])
    for weights in ([5e307, 1e308, 5e307], torch.tensor([1, 2, 1]), np.array([1, 2, 1]), (1, 2, 1)):
        got = label_quality(logits, labels, weights)  # type: ignore[arg-type]
        assert all(torch.equal(got[name], want[name]) for name in want)
    stacked = label_quality(torch.stack(logits), labels.tolist(), [1.0, 2.0, 1.0])  # type: ignore[arg-type]
    assert all(torch.equal(stacked[name], want[name]) for name in want)


def test_wrong_arguments() -> None:
    logits, labels = predictions()
    with pytest.raises(ValueError, match="logits: expected at least one model, got none"):
        label_quality([], labels)
    with pytest.raises(ValueError, match=r"logits\[1\]: expected the shape of logits\[0\]"):
        label_quality([logits[0], logits[1][:, :3]], labels)
    with pytest.raises(TypeError, match=r"logits: expected .* got int"):
        label_quality(3, labels)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"logits\[0\]: expected a tensor, got NoneType"):
        label_quality([None], labels)  # type: ignore[list-item]
    with pytest.raises(TypeError, match="labels: expected int64"):
        label_quality(logits, labels[:-1])
    with pytest.raises(IndexError, match=r"labels: expected values in \[0, 7\)"):
        label_quality(logits, labels + 1)
    with pytest.raises(IndexError, match=r"labels: expected values in \[0, 7\)"):
        model_weights(logits, labels + 1, "accuracy")
    with pytest.raises(ValueError, match="no model predicts a single label right"):
        model_weights([torch.eye(2)[[1, 0]]] * 2, torch.tensor([0, 1]), "accuracy")
    assert all(len(v) == 0 for v in label_quality([z[:0] for z in logits], labels[:0]).values())
