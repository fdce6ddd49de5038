"""Texts -> hashed n-grams of their words: the one op whose input is no tensor.

A text is UTF-8. Its **tokens** are the longest runs of word characters, in lower case, as Unicode 14.0 has them
(``ops/_characters.py``): letters, digits, what combines with them and "_". An ideograph or a hiragana is a token by
itself. With ``punctuation`` the longest runs of punctuation and symbols are tokens too. All else, and every byte that
is no part of well-formed UTF-8, is a blank. Nothing is normalised: é of one code point and é of two are two letters.

With mix(x) = SplitMix64's finaliser, all in 64 bits: a **token's hash** starts as h = mix(seed + 0x9E3779B97F4A7C15);
for each word w of 8 bytes of the token, little-endian, the last filled up with one zero byte at least, h = mix(h ^ w).
An **n-gram's** is mix(g · 0x9E3779B97F4A7C15 + h), of the hash g of its first n − 1 tokens and h of its last. A
**bucket** of B is ⌊⌊hash / 2³²⌋ · B / 2³²⌋. The n-grams of a text come in the order of their last tokens, the shortest
first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias, TypeGuard

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from assay import _native
from assay.ops import _backend
from assay.ops._characters import ALONE, MARK, SPACE, characters
from assay.ops._native import isa, threads

MOST_ORDER = 16
MOST_BUCKETS = 1 << 26

Ints = NDArray[np.int64]
Hashes = NDArray[np.uint64]
Floats = NDArray[np.float64]
Texts: TypeAlias = pa.Array | pa.ChunkedArray | Sequence[str | bytes | None]
"""Arrow's strings or binaries, of which nothing is copied but chunks and nulls, or Python's."""

_PADDING = 8  # terms are compared as many at a time
_BITS = (1 << 64) - 1
_WEYL = 0x9E3779B97F4A7C15


class Terms:
    """The n-grams that are looked for.

    Args:
        hashes: (n,) uint64, in any order; the same one may come again.

    Attributes:
        hashes: (V,) ascending; a term's place here is its feature.
    """

    def __init__(self, hashes: Hashes) -> None:
        if not isinstance(hashes, np.ndarray) or hashes.dtype != np.uint64 or hashes.ndim != 1:
            raise TypeError("Terms: expected a uint64 array of one dimension, as ngram_hashes gives it")
        found = np.unique(hashes)
        self._padded: Hashes = np.append(found, np.full(_PADDING, _BITS, np.uint64))
        self.hashes: Hashes = self._padded[: len(found)]

    def __len__(self) -> int:
        return len(self.hashes)

    @property
    def bits(self) -> int:
        """So many that about one term begins with each pattern of them."""
        return min(24, len(self).bit_length())

    @cached_property
    def starts(self) -> Ints:
        """(2^bits + 1,): where the terms begin whose first bits are 0, 1, ..."""
        first = np.arange(1 << self.bits, dtype=np.uint64) << np.uint64(64 - self.bits) if self.bits else np.zeros(1)
        return np.append(np.searchsorted(self.hashes, first.astype(np.uint64)), len(self)).astype(np.int64)


@dataclass(frozen=True)
class NGramHashes:
    """Row r's are ``hashes[offsets[r]:offsets[r + 1]]``: (N + 1,) int64, (M,) uint64."""

    offsets: Ints
    hashes: Hashes


@dataclass(frozen=True)
class NGramCounts:
    """How often which features are in which row.

    Attributes:
        offsets: (N + 1,) int64: row r's features lie from ``offsets[r]`` up to ``offsets[r + 1]``.
        features: (M,) int64: buckets, or places among the terms; in the order in which the row first has them.
        counts: (M,) int64.
        lengths: (N,) int64, of n-grams of the row, those that are no terms among them.
    """

    offsets: Ints
    features: Ints
    counts: Ints
    lengths: Ints

    @cached_property
    def rows(self) -> Ints:
        """(M,): the row that each feature is of."""
        return np.repeat(np.arange(len(self.lengths)), np.diff(self.offsets))

    def sums(self, values: Floats) -> Floats:
        """(M,) -> (N,), each row's in their order, whatever the other rows are; 0 of none."""
        return np.bincount(self.rows, weights=values, minlength=len(self.lengths)).astype(np.float64)

    def weighted(self, weights: Floats, values: Floats | None = None) -> Floats:
        """Σ of value · weight over each row's features: ``sums(values * weights[features])`` for every target.

        Args:
            weights: (F, T) of every feature towards every target.
            values: (M,) in place of the counts.

        Returns:
            (N, T), with the same bits on every machine, with any number of threads.

        Raises:
            ValueError: weights of fewer features, values of another number, or offsets that lead out of these.
        """
        weights = np.ascontiguousarray(weights, np.float64)
        values = np.ascontiguousarray(self.counts if values is None else values, np.float64)
        if _reference("NGramCounts.weighted"):
            return np.stack([self.sums(values * own[self.features]) for own in weights.T], 1)
        self._check(weights, values)
        offsets, features = np.ascontiguousarray(self.offsets, np.int64), np.ascontiguousarray(self.features, np.int64)
        out = np.empty((len(offsets) - 1, weights.shape[1]))
        read = (offsets.ctypes.data, len(out), features.ctypes.data, values.ctypes.data, weights.ctypes.data)
        _native.weighted_sums(isa(), *read, weights.shape[1], out.ctypes.data, threads())
        return out

    def _check(self, weights: Floats, values: Floats) -> None:
        """ValueError for what native code may not follow."""
        offsets, most = self.offsets, int(self.features.max(initial=-1))
        if weights.ndim != 2 or most >= len(weights) or self.features.min(initial=0) < 0:
            raise ValueError(f"weights: expected (features, targets), of {most + 1} at least, got {weights.shape}")
        if values.shape != self.features.shape:
            raise ValueError(f"values: expected one for each of {len(self.features)} features, got {values.shape}")
        if offsets[0] < 0 or offsets[-1] > len(values) or (offsets[1:] < offsets[:-1]).any():
            raise ValueError(f"offsets: expected ascending ones, from 0 up to the number of features, {len(values)}")


def ngram_hashes(
    texts: Texts, order: int = 1, *, least: int = 1, punctuation: bool = False, seed: int = 0
) -> NGramHashes:
    """The hashes of every text's n-grams, of ``least`` to ``order`` tokens.

    The same bits on every machine, with any number of threads; a row's do not depend on the others. A null has none.

    Args:
        texts: (N,); what comes back takes 8 bytes for each n-gram, so hand over a large corpus in parts.
        order: 1 to 16; least: 1 to ``order``.
        punctuation: whether runs of punctuation and symbols are tokens.
        seed: from −2⁶³ to 2⁶³ − 1; another one is another hash function.

    Raises:
        TypeError, ValueError: texts that are none, an array whose offsets lead out of it, an order or a seed beyond
            their ranges.
    """
    check_settings(order, seed, least)
    read = _Read(texts, punctuation)
    if _reference("ngram_hashes"):
        rows = [list(_ngrams(text, order, punctuation, seed, least)) for text in read]
        return NGramHashes(_places([len(row) for row in rows]), np.array([h for row in rows for h in row], np.uint64))
    places = _places(_ngram_lengths(read.token_counts(), order, least))
    hashes = np.empty(places[-1], np.uint64)
    _native.hash_ngrams(*read.arguments, least, order, seed & _BITS, places.ctypes.data, hashes.ctypes.data)
    return NGramHashes(places, hashes)


def ngram_counts(
    texts: Texts, features: int | Terms, order: int = 1, *, punctuation: bool = False, seed: int = 0
) -> NGramCounts:
    """How often every text has which n-grams; the rest is as for ``ngram_hashes``.

    Args:
        features: a number of buckets, up to 2²⁶, or the terms that count.

    Raises:
        TypeError, ValueError: as there, or features that are none.
        MemoryError: there is no room for a text's n-grams, 16 bytes for each.
    """
    check_settings(order, seed)
    check_features(features)
    read = _Read(texts, punctuation)
    if _reference("ngram_counts"):
        return _counted(read, features, order, punctuation, seed)
    count = len(features) if isinstance(features, Terms) else features
    lengths = _ngram_lengths(read.token_counts(), order)
    places = _places(np.minimum(lengths, count))
    own, times = np.empty(places[-1], np.int64), np.empty(places[-1], np.int64)
    found = np.zeros(len(lengths), np.int64)
    into = (places.ctypes.data, own.ctypes.data, times.ctypes.data, found.ctypes.data)
    if count and not _native.count_ngrams(*read.arguments, order, seed & _BITS, *_looked_for(features), *into):
        raise MemoryError(f"ngram_counts: no room for the {int(lengths.max())} n-grams of the longest text")
    offsets = _places(found)
    for array in (own, times):
        array.resize(offsets[-1], refcheck=False)  # where it lies
    return NGramCounts(offsets, own, times, lengths)


def check_settings(order: int, seed: int, least: int = 1) -> None:
    """ValueError for an order or a seed that no hash has."""
    if isinstance(order, bool) or not isinstance(order, int) or not 1 <= order <= MOST_ORDER:
        raise ValueError(f"order: expected a number of tokens from 1 to {MOST_ORDER}, got {order!r}")
    if isinstance(least, bool) or not isinstance(least, int) or not 1 <= least <= order:
        raise ValueError(f"least: expected a number of tokens from 1 to order, {order}, got {least!r}")
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed: expected a 64-bit integer, got {seed!r}")


def check_features(features: int | Terms) -> None:
    """TypeError, ValueError for features that are neither terms nor a number of buckets."""
    if isinstance(features, Terms):
        return
    if isinstance(features, bool) or not isinstance(features, int):
        raise TypeError(f"features: expected a number of buckets or Terms, got {type(features).__name__}")
    if not 1 <= features <= MOST_BUCKETS:
        raise ValueError(f"buckets: expected a number from 1 to 2^26, got {features}")


def _reference(name: str) -> bool:
    return _backend.choose(name, [torch.empty(0)], {"reference": _ngrams, "cpu": _ngrams}, lambda: None) == "reference"


def _looked_for(features: int | Terms) -> tuple[int, int, int, int, int]:
    if isinstance(features, Terms):
        return 0, features.hashes.ctypes.data, len(features), features.starts.ctypes.data, features.bits
    return features, 0, 0, 0, 0


def _ngram_lengths(tokens: Ints, order: int, least: int = 1) -> Ints:
    """How many n-grams of ``least`` to ``order`` tokens so many tokens have."""
    lengths = np.zeros_like(tokens)
    for n in range(least - 1, order):
        lengths += np.maximum(tokens - n, 0)
    return lengths


def _places(lengths: Ints | Sequence[int]) -> Ints:
    """Where each of some rows begins, and the last ends."""
    places = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=places[1:])
    return places


class _Read:
    """Texts as native code reads them; iterates over their bytes."""

    def __init__(self, texts: Texts, punctuation: bool) -> None:
        self._array = array = _strings(texts)
        _, offsets, self._data = array.buffers()
        self._wide = pa.types.is_large_binary(array.type)
        self._punctuation = punctuation
        kind = np.int64 if self._wide else np.int32
        self._offsets: NDArray[Any] = np.zeros(1, kind)
        if len(array):
            self._offsets = np.frombuffer(offsets, kind, count=array.offset + len(array) + 1)[array.offset :]

    @cached_property
    def arguments(self) -> tuple[str, int, int, bool, int, int, bool, int]:
        """The texts' addresses and how to read them, as native code takes them."""
        address = self._data.address if self._data is not None else 0
        table = characters().ctypes.data
        rows = len(self._array)
        return isa(), address, self._offsets.ctypes.data, self._wide, rows, table, self._punctuation, threads()

    def token_counts(self) -> Ints:
        """(N,)."""
        counts = np.zeros(len(self._array), np.int64)
        _native.count_tokens(*self.arguments, counts.ctypes.data)
        return counts

    def __iter__(self) -> Iterator[bytes]:
        data = memoryview(self._data) if self._data is not None else b""
        for start, end in zip(self._offsets[:-1].tolist(), self._offsets[1:].tolist(), strict=True):
            yield bytes(data[start:end])


def _strings(texts: Texts) -> pa.Array:
    """As one array of binaries, without nulls, whose offsets lead nowhere else."""
    if isinstance(texts, pa.ChunkedArray):
        chunks = [_sound(chunk) for chunk in texts.chunks or [pa.array([], texts.type)]]
        # Of several the offsets might be too many for 32 bits.
        array = chunks[0] if len(chunks) == 1 else pa.concat_arrays([chunk.cast(_BINARY) for chunk in chunks])
    elif isinstance(texts, str | bytes):
        raise TypeError("texts: expected several of them, got one; wrap it in a list")
    else:
        array = _sound(texts) if isinstance(texts, pa.Array) else _of_python(list(texts))
    return array.fill_null(b"") if array.null_count else array


def _sound(array: pa.Array) -> pa.Array:
    """Its bytes, once it is known that Arrow's own code and ours may follow its offsets. Whether they are UTF-8 is no
    matter."""
    if array.type not in _KINDS:
        raise TypeError(f"texts: expected strings or binaries, got an array of {array.type}")
    array = array.view(_KINDS[array.type])
    try:
        array.validate(full=True)
    except pa.ArrowException as error:
        raise ValueError(f"texts: the array is damaged: {error}") from error
    return array.cast(_BINARY) if pa.types.is_binary_view(array.type) else array


_BINARY = pa.large_binary()
_KINDS = {
    **{kind: kind for kind in (pa.binary(), pa.large_binary(), pa.binary_view())},
    **{pa.string(): pa.binary(), pa.large_string(): pa.large_binary(), pa.string_view(): pa.binary_view()},
}


def are_texts(values: Any) -> TypeGuard[Texts]:
    """Whether all are strings, bytes or None, as far as a look at types says so."""
    if isinstance(values, pa.Array | pa.ChunkedArray):
        return values.type in _KINDS
    return isinstance(values, list) and set(map(type, values)) <= {str, bytes, type(None)}


def _of_python(texts: list[Any]) -> pa.Array:
    if are_texts(texts):
        with contextlib.suppress(UnicodeEncodeError):
            return pa.array(texts, _BINARY)
    return pa.array([_encoded(text) for text in texts], _BINARY)


def _encoded(text: object) -> bytes | None:
    if isinstance(text, str):
        return text.encode(errors="surrogatepass")  # a lone surrogate is no UTF-8, and so a blank
    if text is None or isinstance(text, bytes):
        return text
    raise TypeError(f"texts: expected strings, bytes or None, got {type(text).__name__}")


def _counted(read: _Read, features: int | Terms, order: int, punctuation: bool, seed: int) -> NGramCounts:
    """The definition of ``ngram_counts`` in plain Python."""
    terms = {h: i for i, h in enumerate(features.hashes.tolist())} if isinstance(features, Terms) else {}
    rows, lengths = [], []
    for text in read:
        hashes, row = list(_ngrams(text, order, punctuation, seed)), dict[int, int]()
        for h in hashes:
            feature = terms.get(h) if isinstance(features, Terms) else (h >> 32) * features >> 32
            if feature is not None:
                row[feature] = row.get(feature, 0) + 1
        rows.append(row)
        lengths.append(len(hashes))
    own = np.array([feature for row in rows for feature in row], np.int64)
    times = np.array([count for row in rows for count in row.values()], np.int64)
    return NGramCounts(_places([len(row) for row in rows]), own, times, np.array(lengths, np.int64))


def _ngrams(text: bytes, order: int, punctuation: bool, seed: int, least: int = 1) -> Iterator[int]:
    """The hashes of a text's n-grams, by the definition above."""
    start = _mix(seed + _WEYL)
    ends: list[int] = []
    for token in _tokens(text, punctuation):
        h = start
        for i in range(0, len(token) + 1, 8):
            h = _mix(h ^ int.from_bytes(token[i : i + 8], "little"))
        ends = [h, *(_mix(g * _WEYL + h) for g in ends[: order - 1])]
        yield from ends[least - 1 :]


def _tokens(text: bytes, punctuation: bool) -> Iterator[bytes]:
    table, token, run = characters(), "", SPACE
    for character in text.decode(errors="surrogateescape"):
        entry = int(table[ord(character)])
        kind = entry >> 24
        if kind == MARK and not punctuation:
            kind = SPACE
        if token and (kind != run or kind == ALONE):
            yield token.encode()
            token = ""
        run = kind
        token += chr(entry & 0xFFFFFF) if kind != SPACE else ""
    if token:
        yield token.encode()


def _mix(x: int) -> int:
    """SplitMix64's finaliser, a bijection of 64 bits."""
    x &= _BITS
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _BITS
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _BITS
    return x ^ x >> 31
