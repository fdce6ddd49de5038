"""Signatures of texts: what they tell apart, and what is the same to them."""

from __future__ import annotations

import numpy as np
import pytest

import assay
from assay.methods import MinHash
from tests.methods.small_texts import views


def signatures(texts: list[object], **options: int) -> tuple[np.ndarray, np.ndarray]:
    table = assay.score(views(texts), [MinHash(**options)])
    return np.array(table["minhash_text"].to_pylist()), np.array(table["minhash_signature"].to_pylist())


def test_blanks_and_case_make_no_other_text() -> None:
    texts, bands = signatures(
        [
            "Gold is found, in the ore.",
            " gold IS\tfound ,in the ore .",
            "gold is found in the ore.",
            "in gold is the ore found,.",
        ]
    )
    np.testing.assert_array_equal(texts[0], texts[1])
    np.testing.assert_array_equal(bands[0], bands[1])
    assert len({tuple(text) for text in texts}) == 3
    assert texts.shape == (4, 3)
    assert bands.shape == (4, 112)
    assert (texts < [2**24, 2**24, 2**16]).all()
    assert ((bands >= 0) & (bands < 256) & (bands == bands.round())).all()


def test_what_is_too_short_has_no_signature() -> None:
    texts, bands = signatures(["", None, 7, "one two", "one two three four five"])
    np.testing.assert_array_equal(np.isnan(texts).all(1), [True, True, True, False, False])
    np.testing.assert_array_equal(np.isnan(bands).all(1), [True, True, True, True, False])


def test_the_share_that_agrees_is_the_similarity() -> None:
    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in rng.permutation(400)]
    a, b = " ".join(words[:300]), " ".join(words[:200] + words[300:])
    _, bands = signatures([a, b], bands=128, shingle=3)
    sets = [{tuple(text.split()[i : i + 3]) for i in range(298)} for text in (a, b)]
    jaccard = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
    agree = (bands[0] == bands[1]).mean()
    assert agree == pytest.approx(jaccard + (1 - jaccard) / 256, abs=4 * np.sqrt(jaccard * (1 - jaccard) / 1024))
    assert (signatures([a], seed=1)[1] != signatures([a])[1]).mean() > 0.9


def test_what_is_wrong_is_named() -> None:
    with pytest.raises(ValueError, match="rows: expected a number of least hashes from 1 to 8"):
        MinHash(rows=9)
    with pytest.raises(ValueError, match="bands: expected a number from 1 to 512 with rows=8"):
        MinHash(bands=513)
    with pytest.raises(ValueError, match="order: expected a number of tokens"):
        MinHash(shingle=0)
