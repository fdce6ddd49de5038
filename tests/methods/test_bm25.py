"""BM25 against the formula in plain Python, and what it refuses."""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import assay
from assay.methods import BM25, Views
from tests.methods.small_texts import POOL, TARGETS, known, views


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def naive(text: str, queries: list[str], pool: list[str], k1: float, b: float) -> float:
    having = Counter(word for each in pool for word in set(words(each)))
    mean = sum(len(words(each)) for each in pool) / len(pool)
    found, total = Counter(words(text)), 0.0
    for query in queries:
        for word in set(words(query)):
            idf = math.log(1 + (len(pool) - having[word] + 0.5) / (having[word] + 0.5))
            f, length = found[word], len(words(text))
            if not f:
                continue
            total += idf * f * (k1 + 1) / (f + k1 * (1 - b + b * length / mean))
    return total / len(queries)


@pytest.mark.parametrize(("k1", "b"), [(1.5, 0.75), (0.9, 0.0), (0.0, 1.0)])
def test_it_is_the_formula(k1: float, b: float) -> None:
    method = BM25({"code": views(TARGETS["code"])}, k1=k1, b=b).fit(views(POOL))
    scores = assay.score(views(POOL), [method])["bm25"].to_numpy()
    for text, score in zip(POOL, scores, strict=True):
        if known([text]):
            assert score == pytest.approx(naive(known([text])[0], TARGETS["code"], known(POOL), k1, b), rel=1e-6)
        else:
            assert np.isnan(score), text


def test_each_target_has_a_column_and_all_have_their_mean() -> None:
    both = BM25({name: views(own) for name, own in TARGETS.items()}, name="near").fit(views(POOL))
    table = assay.score(views(POOL), [both])
    assert table.column_names[2:] == ["near", "near_code", "near_prose"]
    one = assay.score(views(POOL), [BM25({"prose": views(TARGETS["prose"])}).fit(views(POOL))])
    np.testing.assert_allclose(table["near_prose"].to_numpy(), one["bm25"].to_numpy(), rtol=1e-6)
    mean = (table["near_code"].to_numpy() + table["near_prose"].to_numpy()) / 2
    np.testing.assert_allclose(table["near"].to_numpy(), mean, rtol=1e-6)
    assert table["near_code"].to_numpy()[:30].mean() > table["near_code"].to_numpy()[30:60].mean()


def test_pairs_of_words_can_be_terms() -> None:
    pool, target = ["gold ore", "ore gold", "lead"], ["gold ore"]
    single, pairs = (BM25({"t": views(target)}, order=order).fit(views(pool)) for order in (1, 2))
    assert np.ptp(assay.score(views(pool[:2]), [single])["bm25"].to_numpy()) == 0
    first, second = assay.score(views(pool[:2]), [pairs])["bm25"].to_numpy()
    assert first > second


def test_the_pool_may_be_a_stream() -> None:
    listed = BM25({"t": views(TARGETS["code"])}).fit(views(POOL))
    streamed = BM25({"t": views(TARGETS["code"])}).fit(iter(views(POOL, 3)))
    scores = [assay.score(views(POOL), [method])["bm25"].to_numpy() for method in (listed, streamed)]
    np.testing.assert_array_equal(*scores)


def test_columns_of_arrow_are_texts_too() -> None:
    method = BM25({"t": [Views(None, raw={"text": pa.array(["gold ore"])})]})
    method.fit([Views(None, raw={"text": pa.chunked_array([["gold", None], ["lead"]])})])
    table = assay.score([Views(None, raw={"text": pa.array(["gold", "lead", None])})], [method])
    np.testing.assert_array_equal(np.isnan(table["bm25"].to_numpy()), [False, False, True])
    assert table["bm25"][0].as_py() > table["bm25"][1].as_py() == 0


def test_what_is_wrong_is_named() -> None:
    target = {"t": views(["gold"])}
    with pytest.raises(ValueError, match="b: expected a number from 0 to 1, got 2"):
        BM25(target, b=2)
    with pytest.raises(ValueError, match="k1: expected a finite number"):
        BM25(target, k1=math.nan)
    with pytest.raises(ValueError, match="order: expected a number of tokens"):
        BM25(target, order=0)
    with pytest.raises(ValueError, match="bm25: expected at least one target"):
        BM25({})
    with pytest.raises(ValueError, match="bm25: target 't' has no text with a word in 'text'"):
        BM25({"t": views(["", None, "..."])}).fit(views(POOL))
    nothing: list[list[Any]] = [[], views(["..."])]
    for pool in nothing:
        with pytest.raises(ValueError, match="bm25: the pool has no text with a word in 'text'"):
            BM25(target).fit(pool)
    for batch in ({"input_ids": None}, Views(None, raw={"body": ["gold"]})):
        with pytest.raises(ValueError, match=r"bm25: a batch without the raw column 'text'; expected methods\.Views"):
            BM25(target).fit([batch])
    other = BM25({"t": views(["gold"], column="body")}, "body").fit(views(POOL, column="body"))
    assert other.needs()["text"].raw == ["body"]
