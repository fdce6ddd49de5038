"""What is turned away, and with which words."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from assay.corpus.checks import SeenIds, check_features, check_id, check_label, check_text
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
