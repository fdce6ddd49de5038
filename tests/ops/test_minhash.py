"""Signatures against their definition, and against the similarity that they estimate."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import assay
from assay.ops import NGramHashes, least_hashes
from assay.ops.minhash import EMPTY


def sets(*rows: Any) -> NGramHashes:
    offsets = np.cumsum([0, *map(len, rows)])
    return NGramHashes(offsets.astype(np.int64), np.concatenate([*rows, []]).astype(np.uint64))


def test_native_bits_are_the_definition() -> None:
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 2**64, size, dtype=np.uint64) for size in (0, 1, 3, 40, 0, 7)]
    found = least_hashes(sets(*rows), 17, seed=3)
    assert found.dtype == np.uint32
    assert (found[[0, 4]] == EMPTY).all()
    with assay.backend("reference"):
        np.testing.assert_array_equal(least_hashes(sets(*rows), 17, seed=3), found)
    assert (least_hashes(sets(*rows), 17)[1:4] != found[1:4]).all()
    np.testing.assert_array_equal(least_hashes(sets(rows[3][::-1]), 17, seed=3)[0], found[3])
    assert least_hashes(sets(), 5).shape == (0, 5)


@pytest.mark.parametrize("shared", [0, 30, 80, 100])
def test_agreement_is_the_jaccard_similarity(shared: int) -> None:
    rng = np.random.default_rng(shared)
    agreements, jaccard = [], shared / (200 - shared)
    for _ in range(20):
        hashes = rng.integers(0, 2**64, 200 - shared, dtype=np.uint64)
        a, b = least_hashes(sets(hashes[:100], hashes[100 - shared :]), 512)
        agreements.append((a == b).mean())
    spread = np.sqrt(jaccard * (1 - jaccard) / 512 / 20)
    assert abs(np.mean(agreements) - jaccard) <= 4 * spread


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="count: expected a number from 1 to 4096, got 0"):
        least_hashes(sets([1]), 0)
    with pytest.raises(ValueError, match="seed: expected a number from 0"):
        least_hashes(sets([1]), 4, seed=-1)


def test_sets_that_lie_are_refused() -> None:
    hashes = np.arange(10, dtype=np.uint64) << np.uint64(40)
    for offsets in ([0, 2**33], [-1, 3], [0, 5, 2, 10], []):
        with pytest.raises(ValueError, match="sets: expected ascending offsets, from 0 up to the number of hashes, 10"):
            least_hashes(NGramHashes(np.array(offsets, np.int64), hashes), 2)
    wrong: Any = np.array([0, 5, 10], np.int32)
    with pytest.raises(TypeError, match="sets: expected offsets of int64 and one dimension"):
        least_hashes(NGramHashes(wrong, hashes), 2)
    every_other = least_hashes(NGramHashes(np.array([0, 5]), hashes[::2]), 2)
    np.testing.assert_array_equal(every_other, least_hashes(sets(hashes[::2]), 2))
