"""Leverages against the kernel's matrix, refits without a sample, and what they find."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

import assay
from assay.methods import Leverage
from assay.tasks import Classification
from tests.methods.data import noisy_digits
from tests.methods.test_embedding_similarity import pixels


def leverages(x: Tensor, pool: Tensor | None = None, damping: float = 1e-3) -> tuple[np.ndarray, dict[str, str]]:
    def batch(x: Tensor) -> tuple[Tensor, Tensor]:
        return x, torch.zeros(len(x), dtype=torch.long)

    fitted = x if pool is None else pool
    method = Leverage(pixels(), Classification(), damping=damping).fit([batch(fitted[:7]), batch(fitted[7:])])
    return assay.score([batch(x)], [method])["leverage"].to_numpy(), method.metadata()


def test_equals_the_kernels_diagonal_and_sums_to_the_degrees_of_freedom() -> None:
    x = noisy_digits(0.0, size=90).x
    phi = np.concatenate([x.double().numpy(), np.ones((90, 1))], 1)
    gram = phi @ phi.T
    hat = gram @ np.linalg.inv(gram + 1e-3 * np.trace(gram) * np.eye(90))
    got, facts = leverages(x)
    np.testing.assert_allclose(got, np.diag(hat), rtol=1e-5)
    assert abs(got.sum() - float(facts["degrees_of_freedom"])) < 1e-3
    assert facts["samples"] == "90"
    target = np.random.default_rng(0).normal(size=90)
    residual = target - hat @ target
    ridge = 1e-3 * np.trace(gram)
    for i in (0, 17):  # r_i / (1 − h_i) is the residual of a regression that has not seen the sample
        rest = np.arange(90) != i
        weights = np.linalg.solve(phi[rest].T @ phi[rest] + ridge * np.eye(65), phi[rest].T @ target[rest])
        np.testing.assert_allclose(residual[i] / (1 - got[i]), target[i] - phi[i] @ weights, rtol=1e-4)


def test_finds_what_is_unlike_the_pool() -> None:
    data = noisy_digits(0.0, size=1000)
    x = data.x.clone()
    odd = np.random.default_rng(0).random(1000) < 0.05
    x[odd] = x[odd][:, torch.randperm(64, generator=torch.Generator().manual_seed(0))]
    assert roc_auc_score(odd, leverages(x)[0]) > 0.85
    assert abs(roc_auc_score(odd, np.random.default_rng(1).random(1000)) - 0.5) < 0.1


def test_rows_of_which_nothing_is_known_and_mistakes() -> None:
    x = noisy_digits(0.0, size=30).x
    odd = x.clone()
    odd[3, 5], odd[4, 5] = torch.nan, torch.inf
    got = leverages(odd, x)[0]
    assert np.isnan(got[[3, 4]]).all()
    np.testing.assert_allclose(np.delete(got, [3, 4]), np.delete(leverages(x)[0], [3, 4]), rtol=1e-6)
    np.testing.assert_allclose(leverages(x[:8] * 0)[0], 1 / 8, rtol=2e-3)  # only the constant is left
    with pytest.raises(ValueError, match="leverage: damping: expected a finite number of at least 1e-12, got 0"):
        Leverage(nn.Linear(2, 2), Classification(), damping=0)
    with pytest.raises(ValueError, match=r"leverage: fit\(\) needs samples of the pool"):
        Leverage(pixels(), Classification()).fit([])
