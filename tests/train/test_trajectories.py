"""Scores of a sample's whole way through training, against loops over its presentations."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch

from assay.methods import Column
from assay.train import WeightedSampler, join
from assay.train import trajectories as tr
from assay.train.journal import Journal

Row = tuple[str, int, float, float, float]


def table_of(rows: list[Row]) -> pa.Table:
    ids, steps, margins, probabilities, correct = zip(*rows, strict=True)
    return pa.table(
        {
            "id": pa.array(ids),
            "step": pa.array(steps, pa.int64()),
            "margin": pa.array(margins, pa.float32()),
            "probability": pa.array(probabilities, pa.float32()),
            "correct": pa.array(correct, pa.float32()),
        }
    )


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    """Of 30 ids up to 9 presentations, shuffled; an eighth of the margins and of the right answers are not known."""
    rng = np.random.default_rng(0)
    found = []
    for i in range(30):
        for step in rng.choice(50, rng.integers(1, 10), replace=False):
            unknown = rng.random(2) < 0.125
            margin = math.nan if unknown[0] else float(np.float32(rng.normal()))
            right = math.nan if unknown[1] else float(rng.random() < 0.5 and i > 3)
            found.append((f"s{i}", int(step), margin, float(np.float32(rng.random())), right))
    found.append(("lost", 3, math.nan, 0.5, math.nan))
    return [found[i] for i in rng.permutation(len(found))]


def ways(rows: list[Row]) -> Iterator[tuple[str, list[Row]]]:
    """Each id and its rows by step, in the order of first appearance."""
    for name in dict.fromkeys(row[0] for row in rows):
        yield name, sorted((row for row in rows if row[0] == name), key=lambda row: row[1])


def assert_scores(table: pa.Table, expected: dict[str, dict[str, float]]) -> None:
    assert table["id"].to_pylist() == list(expected)
    names = table.column_names[1:]
    for name, wanted in expected.items():
        assert list(wanted) == names
        found = table.slice(table["id"].index(name).as_py(), 1).to_pylist()[0]
        for column, value in wanted.items():
            assert found[column] == pytest.approx(value, rel=1e-6, nan_ok=True), (name, column)


def test_mean_and_aum(rows: list[Row]) -> None:
    expected = {}
    for name, own in ways(rows):
        known = [row[2] for row in own if not math.isnan(row[2])]
        mean = statistics.fmean(known) if known else math.nan
        expected[name] = {"aum": mean, "presentations": len(known), "unknown": len(own) - len(known)}
    table = table_of(rows)
    assert_scores(tr.aum(table), expected)
    np.testing.assert_array_equal(tr.mean(table, "margin")["mean_margin"], tr.aum(table)["aum"])
    assert any(own["unknown"] for own in expected.values())


def test_early_counts_presentations_that_are_not_known(rows: list[Row]) -> None:
    expected = {}
    for name, own in ways(rows):
        known = [row[2] for row in own[:3] if not math.isnan(row[2])]
        mean = statistics.fmean(known) if known else math.nan
        counts = {"presentations": len(known), "unknown": len(own[:3]) - len(known)}
        expected[name] = {"early_margin": mean, **counts}
    assert_scores(tr.early(table_of(rows), "margin", first=3), expected)
    with pytest.raises(ValueError, match="early: first: expected a finite number of at least 1, got 0"):
        tr.early(table_of(rows), "margin", first=0)


def test_data_map(rows: list[Row]) -> None:
    expected = {}
    for name, own in ways(rows):
        known = [row[3:] for row in own if not math.isnan(row[4])]
        p, right = ([row[k] for row in known] for k in (0, 1))
        expected[name] = {
            "confidence": statistics.fmean(p) if p else math.nan,
            "variability": statistics.pstdev(p) if p else math.nan,
            "correctness": statistics.fmean(right) if p else math.nan,
            "presentations": len(known),
            "unknown": len(own) - len(known),
        }
    assert_scores(tr.data_map(table_of(rows)), expected)


def test_forgetting(rows: list[Row]) -> None:
    known = {name: [row[4] for row in own if not math.isnan(row[4])] for name, own in ways(rows)}
    sizes = {name: len(own) for name, own in ways(rows)}
    most, expected = max(map(len, known.values())), {}
    for name, right in known.items():
        lost = sum(before > after for before, after in itertools.pairwise(right))
        never = not any(right)
        scores = (lost, float(never), most if never else lost) if right else (math.nan,) * 3
        names = ("forgetting", "never_learned", "forgetting_order")
        counts = {"presentations": len(right), "unknown": sizes[name] - len(right)}
        expected[name] = dict(zip(names, scores, strict=True)) | counts
    table = tr.forgetting(table_of(rows))
    assert_scores(table, expected)
    assert max(table["forgetting"].to_pylist()[: len(expected)]) >= 2
    assert 3 <= sum(own["never_learned"] == 1 for own in expected.values()) < 10


def test_the_papers_words() -> None:
    """Right, wrong, right, right, wrong: forgotten twice. At the same step of others, and never across samples."""
    rows = [("a", t, 0.0, 0.0, right) for t, right in enumerate([1, 0, 1, 1, 0])]
    rows += [("b", t, 0.0, 0.0, right) for t, right in enumerate([0, 0, 1, 1, 1])]
    table = tr.forgetting(table_of(rows[::-1]))
    assert table["id"].to_pylist() == ["b", "a"]
    assert table["forgetting"].to_pylist() == [0, 2]
    assert table["never_learned"].to_pylist() == [0, 0]


def test_steps_beyond_a_common_key_sort_too() -> None:
    far = 1 << 62
    rows = [("a", far, 1.0, 0.0, 0.0), ("b", -far, 2.0, 0.0, 0.0), ("a", -far, 3.0, 0.0, 1.0)]
    assert tr.forgetting(table_of(rows))["forgetting"].to_pylist() == [1, 0]
    assert tr.early(table_of(rows), "margin", first=1)["early_margin"].to_pylist() == [3, 2]


def test_of_a_journal_and_into_a_data_set() -> None:
    """Ends to keep come along; pieces of tables, integers as ids and dictionaries are ids like others."""
    journal = Journal([Column("grand", "high", "‖∇ℓ‖"), Column("margin", "low", "turned round")])
    for step in (1, 2):
        scores = {"grand": torch.tensor([1.0, 2.0]) * step, "margin": torch.tensor([0.0, 1.0])}
        journal.add(["7", "5"], step, scores)
    table = journal.table()
    early = tr.early(table, "grand", first=1)
    assert early["early_grand"].to_pylist() == [1, 2]
    assert early.schema.field("early_grand").metadata[b"keep"] == b"high"
    assert tr.mean(table, "margin").schema.field("mean_margin").metadata[b"keep"] == b"low"
    assert tr.mean(table, "grand").schema.field("unknown").metadata[b"keep"] == b"none"
    pieces = pa.concat_tables([table.slice(0, 1), table.slice(1)])
    assert tr.early(pieces, "grand", first=1) == early
    encoded = table.set_column(0, "id", table["id"].dictionary_encode())
    assert tr.early(encoded, "grand", first=1) == early
    numbers = table.set_column(0, "id", table["id"].cast(pa.int64()))
    assert tr.early(numbers, "grand", first=1)["id"].to_pylist() == [7, 5]
    data = join(datasets.Dataset.from_dict({"id": [5, 6, 7]}), early, missing="null")
    assert data["early_grand"][:] == [2, None, 1]
    assert set(WeightedSampler(data, by="early_grand", keep="high")) <= {0, 2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": ["a", None, "a"]}, "1 of the table's 3 rows have no id.*backward\\(losses, ids\\)"),
        ({"step": pa.array([1, None, 2])}, "1 of the table's 3 rows have no step"),
        ({"step": [1.0, 1.0, 2.0]}, "'step' holds double; expected whole numbers"),
        ({"step": [1, 1, 1]}, "id 'a' was presented more than once in step 1, expected once"),
        ({"margin": None}, "the table has no columns 'margin'; expected one.*its scores are correct"),
        ({"margin": ["x", "y", "z"]}, "column 'margin' holds string per row; expected one number"),
    ],
)
def test_tables_that_are_none(change, message) -> None:
    made = {"id": ["a", "b", "a"], "step": [1, 1, 2], "margin": [0.0, 1.0, 2.0], "correct": [1, 0, 0.5], **change}
    table = pa.table({name: values for name, values in made.items() if values is not None})
    with pytest.raises(ValueError, match=message):
        tr.aum(table)


def test_right_or_wrong_is_nothing_between() -> None:
    table = pa.table({"id": ["a"], "step": [1], "probability": [0.5], "correct": [0.5]})
    for score in (tr.forgetting, tr.data_map):
        with pytest.raises(ValueError, match=r"'correct' holds 0.5; expected 1 \(right\) or 0 \(wrong\)"):
            score(table)
    with pytest.raises(TypeError, match=r"a dict; expected a pyarrow.Table"):
        tr.forgetting({"id": []})


def test_an_empty_table_has_no_scores() -> None:
    table = pa.table(
        {"id": pa.array([], pa.string()), "step": pa.array([], pa.int64()), "correct": pa.array([], pa.float32())}
    )
    assert tr.forgetting(table).num_rows == 0
    with pytest.raises(ValueError, match="the table has no finite 'correct'"):
        tr.loss_trajectories(table, "correct")


# ---- S2L


def losses_table(steps: dict[str, dict[int, float]]) -> pa.Table:
    rows = [(name, step, loss) for name, own in steps.items() for step, loss in own.items()]
    return pa.table(dict(zip(("id", "step", "loss"), map(list, zip(*rows, strict=True)), strict=True)))


def test_trajectories_of_checkpoints_and_of_a_log() -> None:
    ids, found = tr.loss_trajectories(losses_table({"b": {20: 2.0, 10: 1.0}, "a": {10: 3.0, 20: 4.0}}))
    assert ids.to_pylist() == ["b", "a"]
    np.testing.assert_array_equal(found, [[1, 2], [3, 4]])
    _, found = tr.loss_trajectories(losses_table({"b": {1: 1.0, 9: 2.0}, "a": {2: 3.0, 7: 4.0}}))
    np.testing.assert_array_equal(found, [[1, 2], [3, 4]])


def test_what_is_missing_is_an_error_or_interpolated() -> None:
    table = losses_table({"a": {0: 0.0, 10: 1.0, 20: 4.0}, "b": {0: 8.0, 20: 4.0}, "c": {10: 5.0, 20: math.nan}})
    with pytest.raises(ValueError, match=r"2 of 3 samples have fewer than 3.*first is 'b' with 2 and 0 that are not"):
        tr.loss_trajectories(table)
    _, found = tr.loss_trajectories(table, missing="interpolate")
    np.testing.assert_array_equal(found, [[0, 1, 4], [8, 6, 4], [5, 5, 5]])
    _, found = tr.loss_trajectories(losses_table({"a": {0: 0.0, 30: 6.0}, "b": {10: 5.0}}), missing="interpolate")
    np.testing.assert_array_equal(found, [[0, 6], [5, 5]])  # two points, for nobody has three numbers
    table = losses_table({"a": {0: 0.0}, "b": {0: math.nan}})
    with pytest.raises(ValueError, match="the first is 'b' with 0 and 1 that are not finite; expected one at least"):
        tr.loss_trajectories(table, missing="interpolate")
    holes = losses_table({"a": {0: 0.0, 1: 1.0, 2: math.nan}, "b": {0: 0.0, 1: math.nan, 2: 2.0}})
    with pytest.raises(ValueError, match="2 of 2 samples"):  # as many of each, of other steps
        tr.loss_trajectories(holes)


def test_interpolation_is_numpys() -> None:
    rng = np.random.default_rng(0)
    ways = {
        f"s{i}": {int(t): float(rng.normal()) for t in rng.choice(90, rng.integers(1, 9), False)} for i in range(40)
    }
    _, found = tr.loss_trajectories(losses_table(ways), missing="interpolate")
    steps = [t for own in ways.values() for t in own]
    grid = np.linspace(min(steps), max(steps), max(map(len, ways.values())))
    expected = [np.interp(grid, *zip(*sorted(own.items()), strict=True)) for own in ways.values()]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def kinds() -> tuple[list[str], np.ndarray]:
    """Three kinds of trajectory: 4 samples, 20 and 76."""
    rng = np.random.default_rng(0)
    kind = rng.permutation([0] * 4 + [1] * 20 + [2] * 76)
    return [f"s{i}" for i in range(100)], kind[:, None] * 10.0 + rng.normal(size=(100, 5))


@pytest.mark.parametrize(
    ("count", "expected"), [(9, [3, 3, 3]), (30, [4, 13, 13]), (60, [4, 20, 36]), (100, [4, 20, 76])]
)
def test_each_cluster_gives_as_many(kinds, count: int, expected: list[int]) -> None:
    ids, found = kinds
    table = tr.select_by_trajectory(ids, found, count, clusters=3, seed=0)
    assert table["id"].to_pylist() == ids
    cluster, selected = table["cluster"].to_numpy(), table["selected"].to_numpy()
    sizes = np.bincount(cluster)
    taken = np.bincount(cluster, weights=selected)
    assert sorted(sizes) == [4, 20, 76]
    assert taken[np.argsort(sizes)].tolist() == expected
    assert table.schema.field("selected").metadata[b"keep"] == b"high"


def test_a_seed_is_a_choice(kinds) -> None:
    ids, found = kinds
    first, again, other = (tr.select_by_trajectory(pa.array(ids), found, 10, clusters=3, seed=s) for s in (1, 1, 2))
    assert first == again
    assert first["selected"] != other["selected"]


def test_choices_that_cannot_be(kinds) -> None:
    ids, found = kinds
    for settings, message in (
        ({"count": 101}, "count=101; expected 1 to 100"),
        ({"count": 10, "clusters": 101}, "clusters=101; expected 1 to 100"),
        ({"count": 0}, "count=0; expected 1 to 100"),
    ):
        with pytest.raises(ValueError, match=message):
            tr.select_by_trajectory(ids, found, **settings)
    with pytest.raises(ValueError, match=r"trajectories of shape \(100, 5\) for 99 ids"):
        tr.select_by_trajectory(ids[1:], found, 10)
    with pytest.raises(ValueError, match="the trajectory in row 3 is not finite"):
        tr.select_by_trajectory(ids, np.where(np.arange(100)[:, None] == 3, np.nan, found), 10)
