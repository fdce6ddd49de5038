"""ASTRA: the solution that conjugate gradients find, and runs that run away."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from assay.methods import ASTRA, EKFACCG
from assay.tasks import Classification
from tests.methods.contract import texts
from tests.methods.small_problem import POOL


@pytest.mark.parametrize(("rows", "error"), [(POOL, 0.01), (20, 0.2)])
def test_it_descends_to_what_conjugate_gradients_find(problem: Any, rows: int, error: float) -> None:
    """Over all samples at once it settles; random batches differ, and leave it moving."""
    models, (x, y), target = problem
    targets, task = {"a": [target], "b": [(x[:2], y[:2])]}, Classification()
    batches = [(x[i : i + rows], y[i : i + rows]) for i in range(0, POOL, rows)]
    method = ASTRA(models[0], task, targets, steps=60, step_size=0.12).fit(batches)
    solved = EKFACCG(models[0], task, targets, iterations=60).fit(batches)
    begun = EKFACCG(models[0], task, targets, iterations=1).fit(batches)
    for target_name in targets:
        got, want, start = (flat(m._directions[target_name]) for m in (method, solved, begun))
        assert float((got - want).norm() / want.norm()) < error < float((start - want).norm() / want.norm())
    facts = method.metadata()
    assert float(facts["residual"]) < 2 * error
    assert facts["steps"] == "60"
    assert "warning" not in facts


def test_it_begins_where_ekfac_is(problem: Any) -> None:
    models, pool, target = problem
    small = ASTRA(models[0], Classification(), {"t": [target]}, steps=1, step_size=1e-9).fit([pool])
    along = EKFACCG(models[0], Classification(), {"t": [target]}, iterations=1).fit([pool])
    got, want = (flat(m._directions["t"]) for m in (small, along))
    assert float(torch.corrcoef(torch.stack([got, want]))[0, 1]) > 0.999999


def flat(direction: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([part.flatten() for part in direction.values()])


def test_its_draws_follow_from_the_seed(problem: Any) -> None:
    models, (x, y), target = problem
    batches = [(x[:20], y[:20]), (x[20:], y[20:])]

    def direction(seed: int) -> torch.Tensor:
        method = ASTRA(models[0], Classification(), {"t": [target]}, steps=5, step_size=0.2, seed=seed).fit(batches)
        return method._directions["t"]["0.weight"]

    assert torch.equal(direction(0), direction(0))
    assert not torch.equal(direction(0), direction(1))


def test_batches_are_drawn_by_their_samples_with_a_loss() -> None:
    """Texts of a token have none; a batch of them has no curvature to descend on."""
    world = texts()
    nothing = world.collate([world.broken, world.broken])
    several = world.make(ASTRA, steps=40).fit([*world.pool, nothing])._directions["a"]
    torch.testing.assert_close(several, world.make(ASTRA, steps=40).fit(world.pool)._directions["a"])


def test_what_runs_away_is_refused_and_leaves_the_last_fit(problem: Any) -> None:
    models, pool, target = problem
    method = ASTRA(models[0], Classification(), {"t": [target]}, steps=5).fit([pool])
    before = method._directions["t"]["0.weight"].clone()
    method.step_size, method.rate_sum, method.steps = 1.0, 1e6, 100
    with pytest.raises(ValueError, match=r"astra: diverged: after \d+ steps of step_size 1 x is longer than .* take a"):
        method.fit([pool])
    assert torch.equal(method._directions["t"]["0.weight"], before)


def test_what_is_refused(problem: Any) -> None:
    models, _, target = problem
    for words, options in (
        ("step_size: expected a number above 0 and at most 1, got 0", {"step_size": 0}),
        ("step_size: expected a number above 0 and at most 1, got nan", {"step_size": float("nan")}),
        ("steps: expected a finite number of at least 1, got 0", {"steps": 0}),
        ("astra: expected damping or rate_sum", {"damping": 1.0, "rate_sum": 1.0}),
    ):
        with pytest.raises(ValueError, match=words):
            ASTRA(models[0], Classification(), {"t": [target]}, **options)
