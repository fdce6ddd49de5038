"""Round-robin and robust weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from assay import select


def table(**scores) -> pa.Table:
    return pa.table({name: pa.array(np.asarray(values, np.float32)) for name, values in scores.items()})


def test_round_robin_takes_turns_and_no_row_twice() -> None:
    # Both want row 0 most; whoever comes second takes its next best.
    scores = table(a=[9, 8, 1, 0, 2], b=[900, 0, 800, 100, 200])
    taken = {tuple(select.round_robin(scores, ["a", "b"], 2, seed, "high").indices) for seed in range(20)}
    assert taken == {(0, 1), (0, 2)}
    four = select.round_robin(scores, ["a", "b"], 4, 0, "high")
    assert four.indices.tolist() == [0, 1, 2, 4]
    assert set(four.reasons[four.mask]) == {"kept: taken by a", "kept: taken by b"}
    assert four.reasons[3] == "dropped: taken by no target"


def test_round_robin_shares_evenly_whatever_the_scales() -> None:
    rng = np.random.default_rng(0)
    scores = table(a=rng.normal(size=300), b=1000 * rng.normal(size=300), c=rng.normal(size=300) - 50)
    chosen = select.round_robin(scores, ["a", "b", "c"], 0.2, 1, "high")
    reasons, counts = np.unique(chosen.reasons[chosen.mask], return_counts=True)
    assert counts.tolist() == [20, 20, 20]
    assert len(reasons) == 3
    again = select.round_robin(scores, ["a", "b", "c"], 0.2, 1, "high")
    assert (again.mask == chosen.mask).all()


def test_round_robin_by_one_target_is_its_top() -> None:
    scores = table(a=np.random.default_rng(1).normal(size=50))
    one = select.round_robin(scores, ["a"], 17, 0, "low")
    assert (one.mask == select.top(scores, "a", 17, "low").mask).all()


def test_round_robin_and_nan() -> None:
    nan = float("nan")
    scores = table(a=[1, nan, nan, 3], b=[nan, 2, nan, nan])
    chosen = select.round_robin(scores, ["a", "b"], 4, 0, "high")
    assert chosen.mask.tolist() == [True, True, False, True]
    assert chosen.reasons[2] == "dropped: every score is NaN"
    assert chosen.scored.tolist() == [True, True, False, True]
    with pytest.raises(ValueError, match="got none"):
        select.round_robin(scores, [], 1, 0)


def test_queries_take_turns_as_in_the_paper() -> None:
    rng = np.random.default_rng(0)
    rankings = np.stack([rng.permutation(40)[:15] for _ in range(6)])
    for amount in (0, 1, 7, 30):
        taken: list[int] = []
        for place in range(15):
            for query in range(6):
                row = rankings[query, place]
                if row not in taken and len(taken) < amount:
                    taken.append(row)
        assert select.in_turns(rankings, amount, 40).indices.tolist() == sorted(taken)
    assert select.in_turns(np.array([[2, -1], [2, 0]]), 2, 3).indices.tolist() == [0, 2]
    assert select.in_turns(np.empty((0, 3), int), 0, 3).mask.sum() == 0
    with pytest.raises(ValueError, match="amount=3: 2 rankings of 2 rows name 2 in all"):
        select.in_turns(np.array([[2, -1], [2, 0]]), 3, 3)
    with pytest.raises(ValueError, match=r"rankings: expected \(queries, k\) integers from -1 to 2"):
        select.in_turns(np.array([[3]]), 1, 3)
    fractions: Any = np.array([[0.5]])
    with pytest.raises(ValueError, match=r"got float64 of shape \(1, 1\), 0\.5 to 0\.5"):
        select.in_turns(fractions, 1, 3)
    with pytest.raises(ValueError, match=r"amount=0\.5: expected a number of rows"):
        select.in_turns(rankings, 0.5, 40)


@pytest.mark.parametrize("k", [1, 5, 49])
def test_robust_weights_are_the_optimum_on_the_exact_top(k) -> None:
    p = np.random.default_rng(k).normal(size=50)
    scores = table(p=p)
    p = scores["p"].to_numpy().astype(np.float64)
    chosen = select.robust(scores, "p", k, "high")
    weights = chosen.weights
    assert (chosen.mask == select.top(scores, "p", k, "high").mask).all()
    assert ((weights > 0) == chosen.mask).all()
    assert weights.sum() == pytest.approx(k)
    # The optimality conditions: p_i − λ w_i equals μ on the support and nothing outside is above it.
    best = np.sort(p)[::-1]
    mu, spread = best[k], best[:k].mean() - best[k]
    np.testing.assert_allclose(p[chosen.mask] - spread * weights[chosen.mask], mu, atol=1e-9)
    assert (p[~chosen.mask] <= mu).all()


def test_robust_weights_at_the_edges() -> None:
    scores = table(p=[3, 1, 2, float("nan")])
    everything = select.robust(scores, "p", 3, "high")
    assert everything.weights.tolist() == [1, 1, 1, 0]
    low = select.robust(scores, "p", 1, "low")
    assert low.weights.tolist() == [0, 1, 0, 0]
    assert low.threshold == 1
    tied = select.robust(table(p=[2, 2, 2, 5]), "p", 2, "high")
    assert tied.weights.tolist() == [0, 0, 0, 1]
    assert select.robust(scores, "p", 0, "high").mask.sum() == 0
    with pytest.raises(ValueError, match="infinite scores"):
        select.robust(table(p=[float("inf"), 1, 0]), "p", 2, "high")
