"""TRIAGE's p-values: exactly uniform of exchangeable samples, by the formula written out; and what they find."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp
from sklearn.datasets import make_friedman1
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

import assay
from assay.curate import RuleOptions, curate
from assay.methods import TRIAGE
from assay.tasks import Classification, Regression
from tests.small_scores import make_scores


class Zero(nn.Module):
    """Predicts 0, so that residuals are targets; inputs are embeddings."""

    def __init__(self, size: int = 3) -> None:
        super().__init__()
        self.head = nn.Linear(size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)[:, 0]


def columns(method: TRIAGE, x: Tensor, y: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    table = assay.score([(x, y)], [method])
    return tuple(table[f"triage{end}"].to_numpy() for end in ("", "_confidence", "_variability"))


def data(rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 3, generator=generator)
    return x, torch.randn(rows, generator=generator) * (0.1 + x[:, 0].abs())


def test_equals_the_formula_written_out() -> None:
    x, y = data(41)
    got = columns(
        TRIAGE([Zero()], Regression(), {"a": [(x[:6], y[:6])], "b": [(x[6:], y[6:])]}, neighbours=4).fit(), *data(9, 1)
    )
    u, v = x.double().numpy(), y.double().numpy()
    known, spread = u[::2], u[::2].std(0)

    def alpha(rows: np.ndarray, residuals: np.ndarray) -> np.ndarray:
        apart = np.linalg.norm((rows[:, None] - known[None]) / spread, axis=2)
        near = np.abs(v[::2])[np.argsort(apart, 1)[:, :4]].mean(1)
        return residuals / (near + 0.01 * np.abs(v[::2]).mean())

    calibrated, own = alpha(u[1::2], v[1::2]), alpha(*(part.double().numpy() for part in data(9, 1)))
    expected = np.interp(own, np.sort(calibrated), np.arange(1, 21) / 21)
    np.testing.assert_allclose(got[1], expected, rtol=1e-6)
    np.testing.assert_allclose(got[0], np.abs(expected - 0.5), rtol=1e-6)
    assert (got[2] == 0).all()


def test_of_exchangeable_samples_every_place_is_as_likely() -> None:
    """The sample that is judged and those that rank it may change places: each lies once between each two of them."""
    x, y = data(24)
    ranked = list(range(1, 24, 2))
    places = []
    for left_out in ranked:
        others = [i for i in ranked if i != left_out]
        order = [i for pair in zip(range(0, 22, 2), others, strict=True) for i in pair]  # σ's samples stay the same
        method = TRIAGE([Zero()], Regression(), {"a": [(x[order], y[order])]}).fit()
        places.append(float(columns(method, x[[left_out]], y[[left_out]])[1][0]))
    ends = np.clip(np.arange(13), 1, 11) / 12
    assert (np.sort(places) >= ends[:-1] - 1e-6).all()
    assert (np.sort(places) <= ends[1:] + 1e-6).all()


def test_a_target_moved_up_is_under_estimated_and_mirrored_data_are_mirrored() -> None:
    x, y = data(400)
    method = TRIAGE([Zero()], Regression(), {"a": [(x[:200], y[:200])]}).fit()
    clean, moved, fallen = (columns(method, x[200:], y[200:] + by)[1] for by in (0.0, 50.0, -50.0))
    assert (clean <= moved).all()
    assert (moved > 0.95).all()
    assert (fallen < 0.05).all()
    mirrored = TRIAGE([Zero()], Regression(), {"a": [(x[:200], -y[:200])]}).fit()
    np.testing.assert_allclose(columns(mirrored, x[200:], -y[200:])[1], 1 - clean, atol=1e-6)
    scaled = TRIAGE([Zero()], Regression(), {"a": [(x[:200], 1e-4 * y[:200])]}).fit()
    np.testing.assert_allclose(columns(scaled, x[200:], 1e-4 * y[200:])[1], clean, atol=0.03)  # float32 ties apart


def test_scaled_residuals_of_new_samples_are_spread_like_those_that_rank_them() -> None:
    """By a test of two samples: against the uniform distribution the places of many samples differ, because one
    calibration set ranks them all."""
    rejected = 0
    for seed in range(40):
        x, y = data(300, seed)
        method = TRIAGE([Zero()], Regression(), {"a": [(x[:200], y[:200])]}).fit()
        (calibration,) = method._calibrations
        alpha = y[200:].double() / calibration.scale(x[200:].double())
        rejected += ks_2samp(alpha.numpy(), calibration.ranked.numpy()).pvalue < 0.05
    assert rejected <= 6  # of 40 at 5 %: more than 6 once in 70 times


def friedman() -> tuple[Tensor, Tensor, np.ndarray, list[nn.Module]]:
    """900 samples, 20 % of the first 600's targets moved by two standard deviations; five checkpoints on the 600."""
    u, v = make_friedman1(900, noise=1.0, random_state=0)
    rng = np.random.default_rng(0)
    shifted = np.zeros(900, bool)
    shifted[:600] = rng.random(600) < 0.2
    v = (v - v.mean()) / v.std()
    v[shifted] += 2 * rng.choice([-1, 1], shifted.sum())
    x, y = torch.tensor(u, dtype=torch.float32), torch.tensor(v, dtype=torch.float32)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 1), nn.Flatten(0))
    optimizer, checkpoints = torch.optim.Adam(net.parameters(), 0.02), []
    for step in range(100):
        optimizer.zero_grad()
        (net(x[:600]) - y[:600]).square().mean().backward()
        optimizer.step()
        if step % 20 == 19:
            checkpoints.append(copy.deepcopy(net))
    return x, y, shifted, checkpoints


def test_finds_targets_that_were_moved_and_says_to_which_side() -> None:
    x, y, shifted, checkpoints = friedman()
    method = TRIAGE(checkpoints, Regression(), {"held-out": [(x[600:], y[600:])]}, at="0").fit()
    assert method.metadata()["calibration_samples"] == ", ".join(["300"] * 5)
    score, confidence, variability = columns(method, x[:600], y[:600])
    assert roc_auc_score(shifted[:600], score) > 0.9
    up = shifted[:600] & (y[:600].numpy() > 2)
    assert confidence[up].mean() > 0.9
    each = [
        columns(TRIAGE([c], Regression(), {"h": [(x[600:], y[600:])]}, at="0").fit(), x[:600], y[:600])[1]
        for c in checkpoints
    ]
    np.testing.assert_allclose(confidence, np.mean(each, 0), rtol=1e-5)
    np.testing.assert_allclose(variability, np.std(each, 0), atol=1e-6)
    assert abs(roc_auc_score(shifted[:600], np.random.default_rng(1).random(600)) - 0.5) < 0.08


def test_the_papers_rule_is_a_condition(tmp_path) -> None:
    """docs/methods/triage.md has it: all but the sure ones on either side."""
    pytest.importorskip("duckdb")
    rng = np.random.default_rng(0)
    c, v = rng.random(200).astype(np.float32), rng.random(200).astype(np.float32)
    scores = make_scores(tmp_path, {"a": {"triage_confidence": c, "triage_variability": v}})
    where = "triage_confidence > 0.33 and triage_confidence < 0.67"
    where += " or triage_variability > quantile(triage_variability, 0.75)"
    kept = curate(scores, None, RuleOptions(where=where).rule(), str(tmp_path / "out"), where=where).selection.mask
    sure = v <= np.quantile(v, 0.75, method="lower")
    np.testing.assert_array_equal(kept, ~(((c <= 0.33) | (c >= 0.67)) & sure))


def test_exact_predictions_and_rows_of_which_nothing_is_known() -> None:
    x, y = data(30)
    method = TRIAGE([Zero()], Regression(), {"a": [(x, 0 * y)]}).fit()  # every residual is 0
    odd = y[:5] * 0
    odd[1], odd[2], odd[3] = torch.nan, torch.inf, 1.0
    confidence = columns(method, x[:5], odd)[1]
    assert np.isnan(confidence[[1, 2]]).all()
    np.testing.assert_allclose(confidence[[0, 4]], 0.5)
    assert confidence[3] == np.float32(15 / 16)


def test_what_is_refused() -> None:
    x, y = data(4)
    with pytest.raises(ValueError, match="Classification has no prediction to subtract; expected Regression"):
        TRIAGE([Zero()], Classification(), {"a": []})
    with pytest.raises(ValueError, match="triage: expected at least one target"):
        TRIAGE([Zero()], Regression(), {})
    with pytest.raises(ValueError, match="models: expected at least one checkpoint"):
        TRIAGE([], Regression(), {"a": []})
    with pytest.raises(ValueError, match="neighbours: expected a finite number of at least 1, got 0"):
        TRIAGE([Zero()], Regression(), {"a": []}, neighbours=0)
    with pytest.raises(ValueError, match=r"triage: 3 of the 3 calibration samples \(a\) have a finite embedding"):
        TRIAGE([Zero()], Regression(), {"a": [(x[:3], y[:3])]}).fit()  # one to rank by: all would have the place 1/2
    with pytest.raises(ValueError, match=r"predictions of shape \(4, 2\); expected one number per sample"):
        TRIAGE([nn.Linear(3, 2)], Regression(), {"a": [(x, torch.zeros(4, 2))]}).fit()
