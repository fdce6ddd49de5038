"""DSIR against the paper's formula in plain Python, and its draw."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

import assay
from assay.methods import DSIR
from assay.ops.ngrams import _ngrams
from assay.select import sample
from tests.methods.small_texts import POOL, TARGETS, views

BUCKETS = 50


def bag(text: object) -> Counter[int]:
    whole = text.encode() if isinstance(text, str) else text if isinstance(text, bytes) else b""
    return Counter((h >> 32) * BUCKETS >> 32 for h in _ngrams(whole, 2, True, 0))


@pytest.mark.parametrize("smoothing", [1.0, 1e-4])
def test_it_is_the_formula(smoothing: float) -> None:
    def log_p(texts: list[object]) -> list[float]:
        whole = sum((bag(text) for text in texts), Counter[int]())
        return [math.log((whole[i] + smoothing) / (whole.total() + smoothing * BUCKETS)) for i in range(BUCKETS)]

    target, pool = log_p(list(TARGETS["code"])), log_p(POOL)
    method = DSIR({"code": views(TARGETS["code"])}, buckets=BUCKETS, smoothing=smoothing).fit(views(POOL))
    scores = assay.score(views(POOL), [method])["dsir"].to_numpy()
    for text, score in zip(POOL, scores, strict=True):
        own = bag(text)
        expected = sum(count * (target[i] - pool[i]) for i, count in own.items()) if own else math.nan
        assert score == pytest.approx(expected, rel=1e-5, abs=1e-5, nan_ok=True)
    assert np.mean(scores[:30]) > np.mean(scores[30:60])


def test_its_draw_is_the_softmax_of_the_scores() -> None:
    """The paper's Gumbel top k: the first drawn is each text with its share of the importance weights."""
    pool = ["gold", "ore", "lead lead"]
    method = DSIR({"t": views(["gold", "gold ore"])}, buckets=1000).fit(views(pool))
    table = assay.score(views(pool), [method])
    weights = np.exp(table["dsir"].to_numpy().astype(np.float64))
    drawn = [sample(table, "dsir", 1, seed, temperature=1.0).mask.argmax() for seed in range(1500)]
    np.testing.assert_allclose(np.bincount(drawn, minlength=3) / 1500, weights / weights.sum(), atol=0.04)


def test_what_is_wrong_is_named() -> None:
    target = {"t": views(["gold"])}
    with pytest.raises(ValueError, match="smoothing: expected more than 0"):
        DSIR(target, smoothing=0)
    with pytest.raises(ValueError, match="buckets: expected a number from 1 to 2"):
        DSIR(target, buckets=0)
    with pytest.raises(ValueError, match="dsir: the pool has no text with a word"):
        DSIR(target).fit(views(["", None]))
