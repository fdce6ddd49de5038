"""Hashed n-grams against the definition in plain Python, bit for bit."""

from __future__ import annotations

import dataclasses
import random
import re
import unicodedata
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import assay
from assay.ops import NGramHashes, Terms, ngram_counts, ngram_hashes
from assay.ops import ngrams as module
from assay.ops._characters import ALONE, SPACE, WORD, characters
from tests.conftest import USABLE_ISAS

ODD = [
    "Hello, World!! foo_bar 12.5",
    "",
    None,
    "été ÉTÉ e\u0301",
    "日本語のテスト ok",
    "İstanbul ΣΑΣ ﬀ",
    "a" * 8 + " " + "b" * 16 + " " + "C" * 7 + "É" + "d" * 9,
    "😀😀 :-) x\x00y",
    "\ud800 lone",
    b"\xff\xfeab\xe2\x82c \xed\xa0\x80z \xc0\x80 \xf4\x90\x80\x80 \xe0\x80\x80 \xf0\x9f\x98",
]


def random_texts(count: int) -> list[bytes]:
    rng = random.Random(0)
    pieces = ["a", "Bc", "_", "9", " ", " ", ".", "!?", "é", "Σ", "語", "😀", "\u0301", "\u2028"]
    made = ["".join(rng.choices(pieces, k=rng.randrange(30))).encode() for _ in range(count)]
    return [*made, *(rng.randbytes(rng.randrange(40)) for _ in range(count))]


TEXTS = [*ODD, *random_texts(40)]


def assert_same(got: Any, expected: Any) -> None:
    for name, values in vars(expected).items():
        np.testing.assert_array_equal(getattr(got, name), values, err_msg=name)


@pytest.mark.parametrize("punctuation", [False, True])
@pytest.mark.parametrize("order", [1, 2, 5])
def test_native_bits_are_the_definition(isa: str, order: int, punctuation: bool) -> None:
    options: dict[str, Any] = {"order": order, "punctuation": punctuation, "seed": -3}
    native = ngram_hashes(TEXTS, **options)
    terms = Terms(native.hashes[::3])
    looked_for: list[Any] = [1, 37, terms, Terms(native.hashes[:0]), 1 << 26]
    counts = [ngram_counts(TEXTS, features, **options) for features in looked_for]
    with assay.backend("reference"):
        assert_same(ngram_hashes(TEXTS, **options), native)
        for features, own in zip(looked_for, counts, strict=True):
            assert_same(ngram_counts(TEXTS, features, **options), own)
    assert counts[0].counts.sum() == counts[1].counts.sum() == len(native.hashes)
    assert 0 < counts[2].counts.sum() < len(native.hashes)
    assert not len(counts[3].features)


def repeated(pieces: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    return st.tuples(pieces, st.integers(1, 70)).map(lambda drawn: drawn[0] * drawn[1])


PIECES = (
    st.sampled_from([character.encode() for character in "aZ9_ .!\néÉıİΣ語の😀\u0301\u2028ẞK"])
    | st.characters(exclude_categories=["Cs"]).map(str.encode)
    | st.binary(max_size=4)
)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(PIECES | repeated(PIECES), max_size=20).map(b"".join), max_size=4), st.booleans(), st.data())
def test_any_bytes_have_the_hashes_of_the_definition(
    texts: list[bytes], punctuation: bool, data: st.DataObject
) -> None:
    order = data.draw(st.integers(1, 4))
    options: dict[str, Any] = {"order": order, "punctuation": punctuation}
    least = data.draw(st.integers(1, order))
    with assay.backend("reference"):
        expected = ngram_hashes(texts, least=least, **options)
        terms = Terms(expected.hashes[data.draw(st.integers(0, 2)) :: 2])
        counts = {features: ngram_counts(texts, features, **options) for features in (3, 1000, 1 << 24, terms)}
    for name in USABLE_ISAS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("ASSAY_ISA", name)
            assert_same(ngram_hashes(texts, least=least, **options), expected)
            for features, own in counts.items():
                assert_same(ngram_counts(texts, features, **options), own)


@pytest.mark.parametrize("middle", ["", "é", "!", "語", " "])
def test_long_texts_are_hashed_as_short_ones(isa: str, middle: str) -> None:
    """Around the ends of what is looked at at once: 64 characters, and a KiB."""
    sizes = [*range(50, 75), *range(1010, 1100, 7)]
    texts = ["x" * size + middle + "y z. " * 9 + "w" * 1030 for size in sizes]
    found = [ngram_hashes(texts, 3, punctuation=True), ngram_counts(texts, 100, 3, punctuation=True)]
    with assay.backend("reference"):
        assert_same(ngram_hashes(texts, 3, punctuation=True), found[0])
        assert_same(ngram_counts(texts, 100, 3, punctuation=True), found[1])


def test_terms_that_begin_alike_and_end_in_ones(isa: str) -> None:
    """More than a vector holds share their first bits, and one looks like what terms are padded with."""
    (own,) = ngram_hashes(["word"]).hashes
    alike = (own & ~np.uint64(0xFF)) + np.arange(100, dtype=np.uint64)
    for hashes in (alike, np.append(alike, own), np.array([2**64 - 1], np.uint64), np.array([own, 2**64 - 1])):
        found = ngram_counts(["word", "other word"], Terms(hashes))
        with assay.backend("reference"):
            assert_same(ngram_counts(["word", "other word"], Terms(hashes)), found)


@pytest.mark.parametrize("features", [1, 3, 1 << 20])
def test_the_same_word_many_times(isa: str, features: int) -> None:
    counts = ngram_counts(["word " * 100_000, "word"], features)
    assert counts.counts.tolist() == [100_000, 1]


def test_hashes_stay_what_they_are() -> None:
    """They stand in tables on disk: a change of any of them is a change of every score."""
    assert module._mix(1234567 + 0x9E3779B97F4A7C15) == 6457827717110365317  # SplitMix64's first number for that seed
    found = ngram_hashes(["Assay the ore: été 語", "extraordinarily"], 2)
    assert [f"{h:016x}" for h in found.hashes[:3].tolist()] == [
        "b952d170d0023b71",
        "5d8bbc0862f65dd0",
        "12c3933e5ff403b7",
    ]
    assert found.offsets.tolist() == [0, 9, 10]
    assert f"{ngram_hashes(['assay'], seed=1).hashes[0]:016x}" == "4521082b2f07e820"


def test_tokens_are_words_in_lower_case() -> None:
    for text in ["The cat's 3 hats, foo_Bar—and «ÉTÉ»!", "x=1;\ty\n\n  Zz", "наука и ЖИЗНЬ; ΑΒΓ"]:
        words = [word.encode() for word in re.findall(r"\w+", text.lower())]
        assert list(module._tokens(text.encode(), False)) == words
        marked = [token.encode() for token in re.findall(r"\w+|[^\w\s]+", text.lower())]
        assert list(module._tokens(text.encode(), True)) == marked
    assert list(module._tokens("日本のテスト".encode(), False)) == [
        "日".encode(),
        "本".encode(),
        "の".encode(),
        "テスト".encode(),
    ]


def test_characters_are_those_of_unicode() -> None:
    table = characters()
    assert table.shape == (0x110000,)
    known = [i for i in range(0x3000) if unicodedata.category(chr(i)) != "Cn"]
    version = tuple(map(int, unicodedata.unidata_version.split(".")))
    if version == (14, 0, 0):
        known += [i for i in range(0x3000, 0x110000) if unicodedata.category(chr(i)) != "Cn"]
    elif version > (14, 0, 0):  # what has come since is another matter
        known = [i for i in known if unicodedata.ucd_3_2_0.category(chr(i)) != "Cn"]
    kinds, lower = (table >> 24)[known], (table & 0xFFFFFF)[known]
    expected = [unicodedata.category(chr(i))[0] in "LNM" or i == ord("_") for i in known]
    np.testing.assert_array_equal(np.isin(kinds, (WORD, ALONE)), expected)
    blank = [unicodedata.category(chr(i))[0] in "ZC" for i in known]
    np.testing.assert_array_equal(kinds == SPACE, blank)
    np.testing.assert_array_equal(lower, [ord(chr(i).lower()[0]) for i in known])


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary(), pa.large_binary(), pa.string_view()])
def test_arrays_are_read_where_they_lie(kind: pa.DataType) -> None:
    texts = ["one two", None, "", "three été", "four"]
    whole = ngram_hashes(texts, 2)
    array = pa.array(["unseen", *texts, "unseen"], pa.string()).cast(kind)[1:-1]
    assert_same(ngram_hashes(array, 2), whole)
    assert_same(ngram_hashes(pa.chunked_array([array[:2], array[2:]]), 2), whole)
    assert_same(ngram_hashes(pa.chunked_array([], kind), 2), ngram_hashes([], 2))
    assert_same(ngram_hashes(tuple(texts), 2), whole)
    assert ngram_hashes([]).offsets.tolist() == [0]
    assert ngram_counts([], 5).lengths.tolist() == []


def test_nulls_own_no_bytes() -> None:
    """A null's slot in Arrow may hold anything."""
    buffers = [b"\x02", np.array([0, 6, 9], np.int32), b"secretone"]
    hidden = pa.Array.from_buffers(pa.string(), 2, list(map(pa.py_buffer, buffers)))
    assert hidden.to_pylist() == [None, "one"]
    assert ngram_hashes(hidden).offsets.tolist() == [0, 0, 1]


def test_rows_and_threads_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASSAY_NUM_THREADS", "1")
    many = TEXTS * 5
    hashes, counts = ngram_hashes(many, 2), ngram_counts(many, 1000, 2)
    monkeypatch.setattr(module, "threads", lambda: 3)
    assert_same(ngram_hashes(many, 2), hashes)
    assert_same(ngram_counts(many, 1000, 2), counts)
    alone = np.concatenate([ngram_hashes([text], 2).hashes for text in many])
    np.testing.assert_array_equal(hashes.hashes, alone)


def test_sums_are_each_rows_own() -> None:
    counts = ngram_counts(["a b a", "", "c"], 1 << 20)
    assert counts.counts.tolist() == [2, 1, 1]
    assert counts.rows.tolist() == [0, 0, 2]
    assert counts.sums(np.array([1.0, 10.0, 100.0])).tolist() == [11.0, 0.0, 100.0]
    assert counts.lengths.tolist() == [3, 0, 1]


def test_weighted_sums_have_the_bits_of_numpy(isa: str) -> None:
    rng = np.random.default_rng(0)
    counts = ngram_counts(TEXTS * 2, 50, 2, punctuation=True)
    weights, values = rng.normal(size=(50, 3)), rng.normal(size=len(counts.counts))
    weights[7] = [np.inf, np.nan, -0.0]
    for own in (weights, weights[:, :1], np.asfortranarray(weights)):
        found = [counts.weighted(own), counts.weighted(own, values)]
        assert found[0].shape == (len(counts.lengths), own.shape[1])
        for given_values, sums in zip((counts.counts, values), found, strict=True):
            for column, column_weights in zip(sums.T, own.T, strict=True):
                np.testing.assert_array_equal(column, counts.sums(given_values * column_weights[counts.features]))
    whole = counts.weighted(weights, values)
    with assay.backend("reference"):
        np.testing.assert_array_equal(counts.weighted(weights, values), whole)
    none = ngram_counts([], 50)
    assert none.weighted(weights).shape == (0, 3)


def test_weights_that_do_not_fit_are_refused() -> None:
    counts = ngram_counts(["a b a", "c"], 1 << 20)
    most = int(counts.features.max())
    with pytest.raises(ValueError, match=rf"weights: expected \(features, targets\), of {most + 1} at least, got"):
        counts.weighted(np.zeros((most, 1)))
    with pytest.raises(ValueError, match="weights: expected"):
        counts.weighted(np.zeros(1 << 20))
    with pytest.raises(ValueError, match="values: expected one for each of 3 features, got"):
        counts.weighted(np.zeros((1 << 20, 1)), np.zeros(2))
    for offsets in ([0, 4, 3], [0, 2, 5], [-1, 2, 3], [0, 3, 2]):
        lying = dataclasses.replace(counts, offsets=np.array(offsets))
        with pytest.raises(ValueError, match="offsets: expected ascending ones"):
            lying.weighted(np.zeros((1 << 20, 1)))
    with pytest.raises(ValueError, match="weights: expected"):
        dataclasses.replace(counts, features=-counts.features).weighted(np.zeros((1 << 20, 1)))


MOST = 2**31 - 1  # of 32 bits, in which a difference of offsets may wrap around


@pytest.mark.parametrize("nulls", [None, b"\x05"])
@pytest.mark.parametrize(
    "offsets", [[0, 0, 9, 3], [0, 0, 2, 40], [-1, 0, 2, 3], [0, 5, 2, 6], [0, MOST, 4 - MOST, 3], [0, 10**9, 3, 4]]
)
def test_offsets_that_lie_are_refused(offsets: list[int], nulls: bytes | None) -> None:
    buffers = [nulls and pa.py_buffer(nulls), pa.py_buffer(np.array(offsets, np.int32)), pa.py_buffer(b"somebytes")]
    for read in (ngram_hashes, _hashes_of_two):
        with pytest.raises(ValueError, match=r"array is damaged|values array|[Nn]egative"):  # some, Arrow sees itself
            read(pa.Array.from_buffers(pa.string(), 3, buffers))


def _hashes_of_two(array: pa.Array) -> NGramHashes:
    return ngram_hashes(pa.chunked_array([array, array]))


def test_views_that_lie_are_refused() -> None:
    view = np.array([100, 0, 7, 10**8], np.int32)  # of 100 bytes, in a buffer that is not there
    array = pa.Array.from_buffers(pa.string_view(), 1, [None, pa.py_buffer(view), pa.py_buffer(b"somebytes")])
    with pytest.raises(ValueError, match="the array is damaged: "):
        ngram_hashes(array)


def test_wrong_arguments_are_named() -> None:
    orders: list[Any] = [0, 17, True, 1.0]
    for order in orders:
        with pytest.raises(ValueError, match="order: expected a number of tokens from 1 to 16"):
            ngram_hashes(["a"], order)
    with pytest.raises(ValueError, match="seed: expected a 64-bit integer"):
        ngram_hashes(["a"], seed=2**63)
    with pytest.raises(ValueError, match="buckets: expected a number from 1 to"):
        ngram_counts(["a"], 0)
    wrong: Any = 2.0
    with pytest.raises(TypeError, match="features: expected a number of buckets or Terms, got float"):
        ngram_counts(["a"], wrong)
    with pytest.raises(TypeError, match="texts: expected strings, bytes or None, got int"):
        ngram_hashes([1])
    with pytest.raises(TypeError, match="texts: expected strings or binaries, got an array of int64"):
        ngram_hashes(pa.array([1]))
    with pytest.raises(TypeError, match="texts: expected strings or binaries, got an array of int64"):
        ngram_hashes(pa.chunked_array([[1], [2]]))
    with pytest.raises(TypeError, match="texts: expected"):
        ngram_hashes("one text")
    with pytest.raises(TypeError, match="Terms: expected a uint64 array"):
        Terms(np.array([1]))
    with pytest.raises(ValueError, match="no kernel in triton"), assay.backend("triton"):
        ngram_hashes(["a"])


def test_the_longest_alone() -> None:
    texts = ["a b c d e f", "a b", "", "b c d e f a"]
    found = ngram_hashes(texts, 5, least=5)
    assert found.offsets.tolist() == [0, 2, 2, 2, 4]
    assert found.hashes[1] == found.hashes[2]  # b c d e f
    whole = ngram_hashes(texts[:1], 5).hashes
    assert set(found.hashes[:2].tolist()) < set(whole.tolist())
    with assay.backend("reference"):
        assert_same(ngram_hashes(texts, 5, least=5), found)
    with pytest.raises(ValueError, match="least: expected a number of tokens from 1 to order, 2"):
        ngram_hashes(texts, 2, least=3)
