"""Every method that is exported keeps the contract (``contract.py``)."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from assay.methods import ASTRA, Column, Method, Need, TracIn
from assay.tasks import Task
from tests.methods.contract import (
    CHECKS,
    WORLDS,
    any_batching_gives_the_same_scores,
    classification,
    exported,
    lives_in,
    metadata_is_text,
)

# Whose every part but fit is another's that is held to it in both worlds: EKFACCG's and SOURCE's.
_ALIKE = {ASTRA, TracIn}


def _life(method: type[Method], world: str) -> Any:
    marks = [pytest.mark.slow] if method in _ALIKE and world == "texts" else []
    return pytest.param(method, world, id=f"{method.__name__}-{world}", marks=marks)


LIVES = [_life(method, world) for method in exported() for world in WORLDS if lives_in(method, world)]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize(("method", "world"), LIVES)
def test_contract(method, world, check) -> None:
    check(method, WORLDS[world]())


def test_all_methods_are_held_to_it() -> None:
    names = {method.__name__ for method in exported()}
    assert {"Ensemble", "GradMimic", "TRAK", "DsDm", "LESS", "LoGra", "TrackStar", "EKFAC"} <= names


class Relative(Method):
    """Depends on its batch."""

    def __init__(self, model: nn.Module, task: Task, name: str = "relative") -> None:
        self.name, self._need = name, Need(model, task)
        self.columns = [Column("relative", "high", "loss above the batch's mean")]

    def needs(self):
        return {"model": self._need}

    def score(self, signals):
        losses = signals["model"].losses
        return {"relative": losses - losses.nanmean()}


def test_it_can_fail() -> None:
    world = classification()
    metadata_is_text(Relative, world)
    with pytest.raises(AssertionError, match="relative"):
        any_batching_gives_the_same_scores(Relative, world)
