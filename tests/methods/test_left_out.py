"""A fit says how many samples it could not use: in the pool, and among the targets' samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from assay.methods import (
    BM25,
    DSIR,
    EKFAC,
    EKFACCG,
    LESS,
    SOURCE,
    TRAK,
    TRIAGE,
    AdamState,
    Density,
    DsDm,
    GradientCosine,
    InfluenceDistillation,
    LoGra,
    OODFilter,
    TracIn,
    TrackStar,
    Views,
)
from assay.tasks import CausalLM, Classification, Regression
from tests.methods.contract import LanguageModel, Regressor

TASK = Classification()
POOL = {
    "trak": lambda models, targets: TRAK(models, TASK, targets),
    "dsdm": lambda models, targets: DsDm(models, TASK, targets),
    "logra": lambda models, targets: LoGra(models, TASK, targets),
    "trackstar": lambda models, targets: TrackStar(models, TASK, targets),
    "ekfac": lambda models, targets: EKFAC(models[0], TASK, targets),
    "ekfac_cg": lambda models, targets: EKFACCG(models[0], TASK, targets),
    "source": lambda models, targets: SOURCE(models, TASK, targets, [0.1, 0.1]),
    "source_ekfac": lambda models, targets: SOURCE(models, TASK, targets, [0.1, 0.1], curvature="ekfac"),
    "influence_distillation": lambda models, targets: InfluenceDistillation(models[0], TASK, targets, landmarks=60),
}
TARGETS = {
    "gradient_cosine": lambda models, targets: GradientCosine(models[0], TASK, targets),
    "tracin": lambda models, targets: TracIn(models, TASK, targets, [0.1, 0.1]),
    "less": lambda models, targets: LESS(models, TASK, targets, optimizers=[_moments(model) for model in models]),
}


def _moments(model: Any) -> AdamState:
    ones = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    return AdamState(ones, ones)


@pytest.mark.parametrize("name", [*POOL, *TARGETS])
def test_broken_samples_are_counted(problem: Any, name: str) -> None:
    models, (x, y), (tx, ty) = problem
    make: Callable[[Any, Any], Any] = (POOL | TARGETS)[name]
    x, tx = x.clone(), tx.clone()
    x[[3, 40]], tx[1] = torch.inf, torch.nan
    facts = make(models, {"t": [(tx, ty)]}).fit([(x[:30], y[:30]), (x[30:], y[30:])]).metadata()
    assert facts["targets_left_out"] == "1"
    assert facts.get("left_out") == ("2" if name in POOL else None)
    sound = make(models, {"t": [(tx[3:], ty[3:])]}).fit([(x[41:], y[41:])]).metadata()
    assert sound["targets_left_out"] == "0"
    assert sound.get("left_out") == ("0" if name in POOL else None)


@pytest.mark.parametrize("make", [TrackStar, EKFAC, GradientCosine])
def test_samples_without_anything_to_predict_are_not_broken(make: Any) -> None:
    torch.manual_seed(0)
    model, ids = LanguageModel(), torch.randint(7, (8, 5))
    silent = {"input_ids": ids, "labels": torch.where(torch.arange(8)[:, None] < 6, ids, -100)}
    method = make([model] if make is TrackStar else model, CausalLM(), {"t": [silent]}).fit([silent])
    assert (method.metadata().get("left_out", "0"), method.metadata()["targets_left_out"]) == ("0", "0")


@pytest.mark.parametrize("make", [TRIAGE, OODFilter, GradientCosine])
def test_a_target_that_is_not_known_is_no_broken_sample(make: Any) -> None:
    torch.manual_seed(0)
    model, x, y = Regressor(), torch.randn(9, 5), torch.randn(9)
    x[0], y[:3] = torch.nan, torch.nan  # of the first, neither
    method = make([model] if make is TRIAGE else model, Regression(), {"t": [(x, y)]}).fit()
    assert method.metadata()["targets_left_out"] == "0"
    x[8] = torch.nan
    method = make([model] if make is TRIAGE else model, Regression(), {"t": [(x, y)]}).fit()
    assert method.metadata()["targets_left_out"] == "1"


def test_directions_of_length_0_and_texts_without_a_word_are_left_out(problem: Any) -> None:
    (model, _), (x, y), _ = problem
    x = torch.cat([x[:20], torch.zeros(2, 6)])
    assert Density(model, TASK, at="0").fit([(x, y[:22])]).metadata()["left_out"] == "2"
    batch = Views(None, raw={"text": ["gold ore", "", None, "the furnace", "?"]})
    for make, counts in ((DSIR, ("2", "2")), (BM25, ("3", "3"))):  # of which one has runs of punctuation as words
        facts = make({"t": [batch]}).fit([batch]).metadata()
        assert (facts["left_out"], facts["targets_left_out"]) == counts
