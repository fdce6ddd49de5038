"""What is turned away, and with which words."""

from __future__ import annotations

from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from assay.corpus.checks import (
    SeenIds,
    check_features,
    check_id,
    check_label,
    check_numbers,
    check_probabilities,
    check_text,
    check_words,
    shown,
)
from assay.corpus.errors import BadRow


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "text is null"),
        ("", "text is empty"),
        (5, "text is of type int, expected a string"),
        (["a"], "text is of type list, expected a string"),
        ("ab\ud800", "text has a lone surrogate at character 2"),
    ],
)
def test_text(value, reason):
    with pytest.raises(BadRow, match=reason):
        check_text("text", value)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "is null"),
        (float("nan"), "is null"),
        (10, "outside the classes 0 to 9"),
        (-1, "outside the classes"),
        (-100, "outside the classes"),
        (10**400, "outside the classes"),
        (1.5, "expected an integer"),
        (float("inf"), "expected an integer"),
        ("3", "expected an integer"),
        (True, "expected an integer"),
    ],
)
def test_labels(value, reason):
    with pytest.raises(BadRow, match=reason):
        check_label("label", value, 10)


@pytest.mark.parametrize("value", [0, 9, 3.0])
def test_good_labels(value):
    assert check_label("label", value, 10) == value


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "is null"),
        ("abcd", "expected a list"),
        ([1.0, 2.0, 3.0], "holds 3 numbers, expected 4"),
        ([], "holds 0 numbers"),
        ([[1.0, 2.0], [3.0]], "ragged"),
        ([1.0, 2.0, None, 4.0], "not a number"),
        (["1", "2", "3", "4"], "not a number"),
        ([1.0, 2.0, float("nan"), 4.0], "NaN"),
        ([1.0, 2.0, 1e300, 4.0], "infinity"),
        (np.array([1.0, np.nan, 1.0, 1.0]), "NaN"),
    ],
)
def test_features(value, reason):
    with pytest.raises(BadRow, match=reason):
        check_features("pixels", value, 4)


def test_nested_features_are_flattened():
    assert check_features("pixels", [[1, 2], [3, 4]], 4).tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(("value", "size"), [(3, 1), (3.0, 1), (Decimal(3), 1), ([3], 1), ([Decimal(3), 4], 2)])
def test_numbers(value, size):
    assert check_numbers("y", value, size).tolist() == [3, 4][:size]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "y is null"),
        (3.0, "y holds 1 numbers, expected 2"),
        ([1, 10**400], "NaN, an infinity or a null"),
        ([1, Decimal("NaN")], "NaN, an infinity or a null"),
        ([1, [2]], "ragged"),
        ("12", "y is of type str, expected a list of 2 numbers"),
        (True, "y is of type bool, expected a list of 2 numbers"),
        (np.array([1.0, np.nan]), "NaN, an infinity or a null"),
    ],
)
def test_no_numbers(value, reason):
    with pytest.raises(BadRow, match=reason):
        check_numbers("y", value, 2)


def test_probabilities_within_the_tolerance_as_float32():
    assert check_probabilities("p", [0.25, 0.75], 2, 1e-6).dtype == np.float32
    check_probabilities("p", [0.1] * 10, 10, 1e-4)
    with pytest.raises(BadRow, match=r"p has the sum 1\.0002, expected probabilities of sum 1"):
        check_probabilities("p", [0.5, 0.5002], 2, 1e-4)
    with pytest.raises(BadRow, match=r"p holds -0\.1, expected probabilities"):
        check_probabilities("p", [1.1, -0.1], 2, 1e-4)


def test_words():
    assert check_words("w", ["a", "b"]) == ["a", "b"]
    for value, reason in (
        (None, "w is null"),
        ("ab", "w is of type str, expected a list of strings"),
        (np.array([1, 2]), r"w\[0\] is of type int64, expected a string"),
        ([], "w is empty"),
        (["a", ""], r"w\[1\] is empty"),
        (["a", "\ud800"], r"w\[1\] has a lone surrogate"),
    ):
        with pytest.raises(BadRow, match=reason):
            check_words("w", value)


def test_what_is_shown_of_a_value_is_short_and_printable():
    for value in ("x" * 10_000, ["y" * 1000] * 1000, {"k" * 1000: "v" * 1000}, 10**4000, "\x1b[2J\n" * 50):
        text = shown(value)
        assert len(text) < 500
        assert text.isprintable()


@pytest.mark.parametrize("value", [None, 1.0, True, ["a"], "\udfff"])
def test_ids(value):
    with pytest.raises(BadRow):
        check_id("id", value)


@given(st.lists(st.text(alphabet="ab", max_size=2), max_size=60), st.integers(1, 7))
def test_repeats_are_the_second_and_later_ones(ids, size):
    seen = SeenIds()
    got = [flag for i in range(0, len(ids), size) for flag in seen.repeats(ids[i : i + size])]
    assert got == [text in ids[:i] for i, text in enumerate(ids)]


def test_repeats_across_the_compact_store():
    seen = SeenIds()
    first = [str(i) for i in range(50_000)]
    for i in range(0, len(first), 5000):
        assert not any(seen.repeats(first[i : i + 5000]))
    assert all(seen.repeats(first[::7]))
    assert not any(seen.repeats([f"new {i}" for i in range(100)]))


@pytest.mark.parametrize("depth", [101, 500, 900, 100_000])
def test_what_is_nested_deeply(depth):
    value = 1.0
    for _ in range(depth):
        value = [value]
    with pytest.raises(BadRow, match="target is nested too deeply, more than 100 lists or mappings"):
        check_numbers("target", value, 1)
    with pytest.raises(BadRow, match="target"):
        check_features("target", value, 1)
