"""Hashed kernel sums against the kernel itself, summed over all pairs, and what inverse-propensity draws do."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import assay
from assay.methods import Density
from assay.methods.density import KernelSums
from assay.methods.sums import unit
from assay.select import random, sample
from assay.tasks import Classification
from tests.methods.data import noisy_digits
from tests.methods.test_embedding_similarity import pixels

WIDTH = 0.6


def exact(x: Tensor, others: Tensor) -> Tensor:
    """Σ_j p(‖x − x_j‖)², p the probability of sharing a cell, by its own integral: cells at a distance t overlap."""
    steps = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000 * WIDTH
    distances = torch.cdist(x.double(), others.double(), compute_mode="donot_use_mm_for_euclid_dist")
    density = 2 / math.sqrt(2 * math.pi) * torch.exp(-0.5 * (steps / distances[..., None].clamp(min=1e-9)) ** 2)
    p = (density / distances[..., None].clamp(min=1e-9) * (1 - steps / WIDTH)).mean(-1) * WIDTH
    return torch.where(distances < 1e-6, 1.0, p).square().sum(1)


def test_sums_have_no_bias_and_the_error_that_is_promised() -> None:
    x = unit(noisy_digits(0.0, size=60).x)
    expected = exact(x[:20], x)
    seeds, errors = 40, {}
    for repetitions in (16, 64):
        runs = []
        for seed in range(seeds):
            sums = KernelSums(64, WIDTH, repetitions, 30, seed)  # so few buckets that chance meetings are common
            for part in x.split(7):
                sums.add(part)
            runs.append(sums(x[:20]))
        error = torch.stack(runs) - expected
        deviation = error.std(0) / math.sqrt(seeds)
        assert bool((error.mean(0).abs() < 4.5 * deviation).all())
        # A repetition's sum lies between 0 and n = 60; so much its deviation can be at most.
        errors[repetitions] = float(error.square().mean().sqrt())
        assert errors[repetitions] < 30 / math.sqrt(repetitions)
    assert 1.6 < errors[16] / errors[64] < 2.5  # 1/√R


def copied() -> tuple[Tensor, Tensor, np.ndarray]:
    """600 digits and 600 copies of the zeros, almost the same; which are zeros."""
    data = noisy_digits(0.0, size=600)
    zeros = torch.nonzero(data.true == 0)[:, 0]
    generator = torch.Generator().manual_seed(0)
    chosen = zeros[torch.randint(len(zeros), (600,), generator=generator)]
    x = torch.cat([data.x, data.x[chosen] + 0.02 * torch.randn(600, 64, generator=generator)])
    y = torch.cat([data.true, data.true[chosen]])
    return x, y, (y == 0).numpy()


def test_copies_are_drawn_less() -> None:
    x, y, zero = copied()
    method = Density(pixels(), Classification(), repetitions=100, buckets=5000).fit(
        [(x[:700], y[:700]), (x[700:], y[700:])]
    )
    table = assay.score([(x, y)], [method])
    np.testing.assert_allclose(table["density_weight"].to_numpy(), 1 / table["density"].to_numpy(), rtol=1e-6)
    shares = [zero[sample(table, "density_weight", 0.5, seed).mask].mean() for seed in range(5)]
    control = [zero[random(table, 0.5, seed).mask].mean() for seed in range(5)]
    inverse = [zero[sample(table, "density", 0.5, seed, keep="high").mask].mean() for seed in range(5)]
    assert np.mean(shares) < np.mean(control) - 0.1 < np.mean(inverse) - 0.15


def test_what_is_alone_and_what_is_nothing() -> None:
    x, y, _ = copied()
    method = Density(pixels(), Classification(), repetitions=50, buckets=20000, bandwidth=1e-3)
    method.fit([(x, y), (x[:1], y[:1])])
    rows = torch.cat([-x[:1] * 1e30, x[:1], torch.zeros(1, 64), torch.full((1, 64), torch.nan)])
    density = assay.score([(rows, y[:4])], [method])["density"].to_numpy()
    assert density[0] == np.float32(1 / 1201)  # nobody is near: as if it were in the pool by itself
    assert 1.9 / 1201 < density[1] < 2.5 / 1201
    assert np.isnan(density[2:]).all()
    same = Density(pixels(), Classification(), repetitions=5).fit([(x[:1].expand(4, 64), y[:4])])
    np.testing.assert_allclose(assay.score([(x[:1], y[:1])], [same])["density"].to_numpy(), 1, rtol=1e-4)


def test_batches_without_samples_and_rows_that_only_rounding_tells_apart() -> None:
    x, y, _ = copied()
    near = x[:1] * (1 + 1e-6 * torch.randn(20, 64, generator=torch.Generator().manual_seed(0)))
    method = Density(pixels(), Classification(), repetitions=50, buckets=1000).fit([(near[:0], y[:0]), (near, y[:20])])
    np.testing.assert_allclose(assay.score([(near, y[:20])], [method])["density"].to_numpy(), 1, rtol=1e-3)


def test_mistakes() -> None:
    x, y, _ = copied()
    for options in ({"repetitions": 0}, {"buckets": 1}, {"bandwidth": 0.0}, {"bandwidth": math.nan}):
        with pytest.raises(ValueError, match="density: expected at least 1 repetition"):
            Density(pixels(), Classification(), **options)
    with pytest.raises(ValueError, match="take 37 GiB, more than 4 GiB; take fewer"):
        Density(pixels(), Classification(), repetitions=10**5, buckets=10**5)
    for pool in ([], [(0 * x, y)]):
        with pytest.raises(ValueError, match=r"density: fit\(\) needs samples of the pool"):
            Density(pixels(), Classification()).fit(pool)
