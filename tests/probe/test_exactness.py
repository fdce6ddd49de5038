"""What is made of gradients is made in float32, whatever the caller allows for the products of the model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from assay.methods import GradMimic
from assay.probe import Outer, PerSampleGradient, Probe
from assay.tasks import CausalLM, Classification
from assay.train import Reweighter
from tests.precision import NEEDS_SETTINGS, WAYS, allow, restore, state
from tests.train.small_models import moved
from tests.train.test_observing import Language, losses_of

pytestmark = NEEDS_SETTINGS


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    restore()


class Watching:
    """A reduction that notes what it may multiply in."""

    def __init__(self, parameters: Collection[str]) -> None:
        self.parameters, self.seen = parameters, list[tuple[str, ...]]()

    def __call__(self, parameter: str, gradient: PerSampleGradient) -> Tensor:
        assert not torch.is_autocast_enabled("cpu")
        self.seen.append(state())
        return gradient.sqnorm()


@pytest.mark.parametrize("way", WAYS)
def test_reductions_multiply_exactly(way: str) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    watching = Watching([name for name, _ in model.named_parameters()])
    allow(way)
    before = state()
    with torch.autocast("cpu", torch.bfloat16):
        Probe(model, Classification(), reductions={"r": watching})((torch.randn(6, 4), torch.randint(3, (6,))))
    assert len(watching.seen) == len(watching.parameters)
    assert {word for seen in watching.seen for word in seen} <= {"ieee", "none"}
    assert state() == before


def noting(run: Callable[..., Any], seen: list[tuple[str, ...]]) -> Callable[..., Any]:
    return lambda *args, **kwargs: (seen.append(state()), run(*args, **kwargs))[1]


@pytest.mark.parametrize(("length", "product"), [(40, "bmm"), (20, "dense")])
def test_gradients_are_multiplied_out_exactly(length: int, product: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By rows, of long sequences, and whole."""
    seen: list[tuple[str, ...]] = []
    whole: Any = torch if product == "bmm" else Outer
    monkeypatch.setattr(whole, product, noting(getattr(whole, product), seen))
    model = Language(tied=False)
    method = GradMimic(model, moved(model, by=0.1), CausalLM(), cosine=True)
    reweighter = Reweighter(model, method, "observe", exact=False)
    allow("in general")
    before = state()
    reweighter.backward(losses_of(model, torch.randint(29, (3, length))))
    assert seen
    assert {word for each in seen for word in each} <= {"ieee", "none"}
    assert state() == before
