"""MinHash: sets of hashes -> signatures that agree in about as many places as the sets' Jaccard similarity says.

Broder, "On the resemblance and containment of documents", 1997.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from assay import _native
from assay.ops import _backend
from assay.ops._native import isa, threads
from assay.ops.ngrams import NGramHashes

EMPTY = np.uint32(0xFFFFFFFF)
"""Every number of the signature of a row without a hash."""

MOST_COUNT = 4096


def least_hashes(sets: NGramHashes, count: int, *, seed: int = 0) -> NDArray[np.uint32]:
    """Each row's signature: number k is the least of a_k ⌊h / 2³²⌋ + b_k mod 2³² over the row's hashes h.

    Of two rows a share of the numbers agrees whose expectation is the Jaccard similarity of their sets, |A ∩ B| /
    |A ∪ B|, with a standard deviation of √(J (1 − J) / count). The same bits on every machine.

    Args:
        sets: hashes by row, in any order; the same one may come again.
        count: 1 to 4096.
        seed: 0 to 2⁶³ − 1, of a and b: the upper halves of Philox's first 2 · count words, a made odd.

    Returns:
        (N, count) uint32.

    Raises:
        TypeError, ValueError: a count or a seed beyond its range, or sets whose offsets lead out of their hashes.
    """
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MOST_COUNT:
        raise ValueError(f"count: expected a number from 1 to {MOST_COUNT}, got {count!r}")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"seed: expected a number from 0 to 2^63 - 1, got {seed!r}")
    words = (np.asarray(np.random.Philox(seed).random_raw(2 * count)) >> np.uint64(32)).astype(np.uint32)
    a, b = words[:count] | np.uint32(1), words[count:].copy()
    sets = _checked(sets)
    rows = len(sets.offsets) - 1
    if _chosen() == "reference":
        return _reference(sets, a, b)
    out = np.empty((rows, count), np.uint32)
    into = (a.ctypes.data, b.ctypes.data, count, out.ctypes.data, threads())
    _native.least_hashes(isa(), sets.hashes.ctypes.data, sets.offsets.ctypes.data, rows, *into)
    return out


def whole_hashes(sets: NGramHashes) -> NDArray[np.uint64]:
    """(N,): one hash of each row's hashes in their order: mix(Σ_i mix(h_i + (i + 1) · 0x9E3779B97F4A7C15)), with mix as
    in ``ops/ngrams.py`` and all in 64 bits; 0 of none."""
    lengths = np.diff(sets.offsets)
    places = np.arange(len(sets.hashes)) - np.repeat(sets.offsets[:-1], lengths)
    mixed = _mix(sets.hashes + (places + 1).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    out, some = np.zeros(len(lengths), np.uint64), lengths > 0
    if some.any():
        out[some] = _mix(np.add.reduceat(mixed, sets.offsets[:-1][some]))
    return out


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = x ^ x >> np.uint64(31)
    return mixed


def _checked(sets: NGramHashes) -> NGramHashes:
    """The sets as native code reads them."""
    offsets, hashes = sets.offsets, sets.hashes
    for name, values, dtype in (("offsets", offsets, np.int64), ("hashes", hashes, np.uint64)):
        if not isinstance(values, np.ndarray) or values.dtype != dtype or values.ndim != 1:
            raise TypeError(f"sets: expected {name} of {np.dtype(dtype)} and one dimension, as ngram_hashes gives them")
    if not len(offsets) or offsets[0] < 0 or offsets[-1] > len(hashes) or (offsets[1:] < offsets[:-1]).any():
        raise ValueError(f"sets: expected ascending offsets, from 0 up to the number of hashes, {len(hashes)}")
    return NGramHashes(np.ascontiguousarray(offsets), np.ascontiguousarray(hashes))


def _reference(sets: NGramHashes, a: NDArray[np.uint32], b: NDArray[np.uint32]) -> NDArray[np.uint32]:
    out = np.full((len(sets.offsets) - 1, len(a)), EMPTY)
    for row, start, end in zip(out, sets.offsets[:-1].tolist(), sets.offsets[1:].tolist(), strict=True):
        x = (sets.hashes[start:end] >> np.uint64(32)).astype(np.uint32)
        if len(x):
            row[:] = (x[:, None] * a + b).min(0)
    return out


def _chosen() -> Literal["reference", "cpu"]:
    runs = {"reference": _reference, "cpu": _reference}
    chosen = _backend.choose("least_hashes", [torch.empty(0)], runs, lambda: None)
    return "reference" if chosen == "reference" else "cpu"
