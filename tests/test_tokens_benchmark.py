"""The experiment on chosen tokens, at its smallest: noise in a text that a tiny model knows nearly by heart."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
from benchmarks.quality.multiplier.model import Shape
from benchmarks.quality.tokens import KEEP, SPAN, Steps, World, compared, make_world, picks, spoilt, token_losses

TEXT = b"The ore holds gold, and some of it is worth digging for. Not all that glitters is gold; assay first. " * 3
SHAPE, STEPS = Shape(layers=1, width=32), Steps(base=12, reference=24, others=2)


def pieces(count: int, generator: torch.Generator) -> Tensor:
    starts = torch.randint(len(TEXT) - 128, (count, 1), generator=generator)
    return torch.tensor(list(TEXT))[starts + torch.arange(128)]


@pytest.fixture(scope="module")
def world() -> World:
    generator = torch.Generator().manual_seed(0)
    first, _ = spoilt(pieces(64, generator), generator)
    pool, trusted = spoilt(pieces(64, generator), generator), pieces(64, generator)
    return make_world(first, pool, trusted, {"text": pieces(32, generator)}, SHAPE, STEPS, 0)


def test_spans_are_spoilt_and_nothing_else() -> None:
    generator = torch.Generator().manual_seed(1)
    clean = pieces(200, generator)
    dirty, inside = spoilt(clean, generator)
    assert set(inside.sum(1).tolist()) == {0, SPAN}
    assert 70 < int(inside.any(1).sum()) < 130
    assert bool((dirty == clean)[~inside].all())
    assert float((dirty == clean)[inside].float().mean()) < 0.1


def test_all_picks_weigh_alike(world: World) -> None:
    x = world.pool[:16]
    with torch.no_grad():
        losses = token_losses(world.base, x)
        weights = {name: pick(losses, x) for name, pick in picks(world, 0).items()}
    assert torch.equal(weights.pop("all tokens (control)"), torch.ones_like(losses))
    for own in weights.values():
        assert float(own.mean()) == pytest.approx(1, rel=1e-3)
        assert float((own > 0).float().mean()) == pytest.approx(KEEP, abs=1e-3)
    whole = (weights["whole pieces (control)"] > 0).float().mean(1)
    assert int(((whole > 0) & (whole < 1)).sum()) <= 1


def test_noise_is_left_out_where_the_reference_knows_better(world: World) -> None:
    numbers = compared(world, STEPS, 0)
    share = {name: own["planted"] for name, own in numbers.items() if "planted" in own}
    chance = share["random tokens (control)"]
    assert share["all tokens (control)"] == pytest.approx(chance, abs=0.03)
    assert share["Rho-1"] < 0.5 * chance
    assert share["highest loss (control)"] > 1.2 * chance
    losses = {name: own["text"] for name, own in numbers.items()}
    assert losses["the reference"] < losses["the base"]
    assert losses["Rho-1"] < losses["the base"]
