"""Distances to real data against all pairs in float64, and ranks that real data of the same kind spread evenly over."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from scipy.stats import ks_2samp
from torch import Tensor, nn

import assay
from assay.methods import OODFilter
from assay.methods.nearest import Held
from assay.tasks import Regression


def columns(method: OODFilter, *batches: Tensor) -> tuple[np.ndarray, np.ndarray]:
    table = assay.score([(x, torch.zeros(len(x), 2)) for x in batches], [method])
    return table["ood_distance"].to_numpy(), table["ood_distance_rank"].to_numpy()


def fitted(real: Tensor, neighbours: int = 1) -> OODFilter:
    halves = {"a": [(real[:3], torch.zeros(3, 2))], "b": [(real[3:], torch.zeros(len(real) - 3, 2))]}
    return OODFilter(nn.Linear(real.shape[1], 2), Regression(), halves, neighbours=neighbours).fit()


def points(rows: int, seed: int, size: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, size, generator=generator) * torch.tensor([1.0, 100.0, 0.01, 1.0])[:size]


@pytest.mark.parametrize("neighbours", [1, 3])
def test_equals_all_pairs(neighbours) -> None:
    real, other = points(50, 0), points(20, 1)
    u, v = real.double().numpy(), other.double().numpy()
    expected = np.sort(cdist(v / u.std(0), u / u.std(0)), 1)[:, :neighbours].mean(1)
    own = np.sort(cdist(u / u.std(0), u / u.std(0)), 1)[:, 1 : neighbours + 1].mean(1)
    distance, rank = columns(fitted(real, neighbours), other[:1], other[1:])
    np.testing.assert_allclose(distance, expected, rtol=1e-6)
    np.testing.assert_allclose(rank, (own < expected[:, None]).mean(1), atol=1e-6)
    if neighbours == 1:
        copies, lowest = columns(fitted(real), real[:5])
        assert (copies == 0).all()
        assert (lowest == 0).all()
    else:  # blocks, and rows that are not their own neighbours
        held = Held.of(real)
        np.testing.assert_allclose(
            held.nearest(real, 2, but_itself=True)[0].numpy(), np.sort(cdist(u / u.std(0), u / u.std(0)), 1)[:, 1:3]
        )


def test_of_few_real_samples_a_rank_compares_means_over_as_many_neighbours() -> None:
    real, other = points(5, 0), points(20, 1)
    others = columns(fitted(real, 4), other)
    for more in (5, 25):
        np.testing.assert_array_equal(columns(fitted(real, more), other), others)


def test_real_samples_that_were_not_held_are_spread_like_those_that_were() -> None:
    rank = columns(fitted(points(400, 0)), points(400, 1))[1]
    assert ks_2samp(rank, np.arange(400) / 400).pvalue > 0.01
    assert columns(fitted(points(400, 0)), points(400, 1) + points(1, 2) * 4)[1].mean() > 0.95


def test_what_is_trusted_grows_with_the_limit_to_all() -> None:
    x = points(200, 1) * 1.5
    table = assay.score([(x, torch.zeros(200, 2))], [fitted(points(100, 0))])
    schedule = [(1, 0.2), (5, 0.6), (9, 1.0)]
    kept = [assay.select.trust(table, "ood_distance_rank", at, schedule).mask for at in (-3, 1, 2.05, 5, 9, 20)]
    np.testing.assert_array_equal(kept[0], kept[1])
    assert all((less <= more).all() for less, more in itertools.pairwise(kept))
    assert kept[1].sum() < kept[2].sum() < kept[3].sum() < kept[4].sum() == 200
    np.testing.assert_array_equal(kept[2], table["ood_distance_rank"].to_numpy() <= 0.305)
    assert (assay.select.threshold(table, "ood_distance", 1e30).mask).all()  # ε beyond every distance keeps all


def test_rows_of_which_nothing_is_known_and_mistakes() -> None:
    real = points(30, 0)
    odd = points(4, 1)
    odd[1, 0], odd[2, 2] = torch.nan, torch.inf
    distance, rank = columns(fitted(real), odd)
    assert np.isnan(distance[[1, 2]]).all()
    assert np.isnan(rank[[1, 2]]).all()
    assert np.isfinite(distance[[0, 3]]).all()
    holed = real.clone()
    holed[4, 0] = torch.nan
    same = fitted(torch.cat([real[:4], real[5:]]))
    np.testing.assert_allclose(columns(fitted(holed), odd)[0], columns(same, odd)[0])
    flat = fitted(torch.cat([real[:, :3], torch.ones(30, 1)], 1))  # a coordinate that real samples agree in
    assert columns(flat, torch.cat([real[:1, :3], torch.tensor([[3.0]])], 1))[0] == pytest.approx(2)
    with pytest.raises(ValueError, match=r"ood_distance: 1 real samples \(a, b\) have a finite embedding; expected at"):
        fitted(torch.cat([real[:1], torch.full((5, 4), torch.nan)]))
    with pytest.raises(ValueError, match="neighbours: expected a finite number of at least 1, got 0"):
        fitted(real, 0)


class Shares(nn.Module):
    """An embedding of one input and of a sum that is 1 but for float32's rounding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shares, self.head = nn.Linear(4, 50), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.stack([x[:, 0], self.shares(x).softmax(1).sum(1)], 1))


def test_rounding_is_no_distance() -> None:
    real, other = torch.randn(100, 4), torch.randn(20, 4)
    method = OODFilter(Shares(), Regression(), {"a": [(real, torch.zeros(100, 2))]}).fit()
    distance, _ = columns(method, other)
    np.testing.assert_allclose(columns(method, *other.split(1))[0], distance, atol=1e-5)
    first = real[:, 0].double()
    nearest = (other[:, 0, None].double() - first).abs().min(1).values / first.std(correction=0)
    np.testing.assert_allclose(distance, nearest.numpy(), atol=1e-5)


def test_a_row_far_out_does_not_make_the_others_alike() -> None:
    real = torch.cat([torch.randn(30, 2), torch.full((1, 2), 1e20)])
    distance = columns(fitted(real), torch.randn(9, 2))[0]
    assert (distance > 0).all()


def test_a_limit_keeps_the_ranks_that_it_names() -> None:
    """6 of 10 is .6, and no float32 is."""
    table = assay.score([(points(300, 1), torch.zeros(300, 2))], [fitted(points(10, 0))])
    rank = table["ood_distance_rank"].to_numpy()
    for tenth in range(11):
        kept = assay.select.trust(table, "ood_distance_rank", 0, [(0, tenth / 10)]).mask
        np.testing.assert_array_equal(kept, np.round(10 * rank) <= tenth)


@pytest.mark.parametrize(
    ("progress", "schedule", "message"),
    [
        (0, [], "expected pairs of progress and limit, all finite"),
        (0, [(0, 1), (1, float("inf"))], "all finite"),
        (0, [(0, 1), (0, 2)], r"expected progress that ascends, got \[0.0, 0.0\]"),
        (float("nan"), [(0, 1)], "progress=nan"),
    ],
)
def test_schedules_that_are_refused(progress, schedule, message) -> None:
    table = assay.score([(points(3, 0), torch.zeros(3, 2))], [fitted(points(9, 0))])
    with pytest.raises(ValueError, match=message):
        assay.select.trust(table, "ood_distance", progress, schedule)
