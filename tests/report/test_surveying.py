"""Counts, order statistics and samples of score tables."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from assay.corpus.errors import CorpusError
from assay.corpus.score_files import ROW_GROUP_ROWS
from assay.corpus.scores_folder import open_scores
from assay.report import survey
from assay.report.relations import overlaps, rank_correlations
from assay.report.surveying import SAMPLE_ROWS, Column
from assay.select import top
from tests.report.small_report import Column as TableColumn
from tests.report.small_report import make_scores

ROWS = ROW_GROUP_ROWS + 5_000


@pytest.fixture(scope="module")
def numbers():
    rng = np.random.default_rng(0)
    heavy = rng.standard_cauchy(ROWS) * 1e6
    near = 100 + 1e-3 * rng.normal(size=ROWS)  # a few bits of a float32 tell these apart
    ties = rng.integers(-2, 3, ROWS).astype(float)
    holes = np.where(rng.random(ROWS) < 0.3, np.nan, rng.normal(size=ROWS))
    zeros = np.where(rng.random(ROWS) < 0.5, -0.0, 0.0)
    return {
        name: np.asarray(values, np.float32)
        for name, values in {
            "heavy": heavy,
            "orders": np.exp(6 * rng.normal(size=ROWS)),
            "near": near,
            "ties": ties,
            "holes": holes,
            "constant": zeros,
            "nothing": np.full(ROWS, np.nan),
        }.items()
    }


@pytest.fixture(scope="module")
def found(numbers, tmp_path_factory):
    columns = [TableColumn(name, "low" if name in ("near", "ties") else "high") for name in numbers]
    folder = make_scores(tmp_path_factory.mktemp("s"), {"row": np.arange(ROWS)}, numbers, columns=columns)
    return survey(open_scores(str(folder)))


@pytest.mark.parametrize("name", ["heavy", "orders", "near", "ties", "holes", "constant"])
def test_counts_and_order_statistics_are_those_of_all_rows(found, numbers, name):
    its = next(d for d in found.distributions if d.column.name == name)
    held = np.sort(numbers[name][~np.isnan(numbers[name])])
    assert (its.rows, its.nan) == (ROWS, ROWS - len(held))
    assert (its.minimum, its.maximum) == (held[0], held[-1])
    for share, value in its.quantiles.items():
        assert value == np.quantile(held, share, method="lower")
    edges = its.edges
    inside = held[(held >= edges[0]) & (held <= edges[-1])]
    assert its.counts.tolist() == np.histogram(inside, edges)[0].tolist() or len(edges) == 2
    assert its.counts.sum() == len(inside)
    assert (its.below, its.above) == ((held < edges[0]).sum(), (held > edges[-1]).sum())
    assert len(its.counts) <= 61
    assert its.logarithmic == (name == "orders")
    assert its.whole == (name == "ties")
    if name in ("heavy", "orders", "near"):
        assert (its.counts > 0).sum() > 30, "bins that tell nothing"


@pytest.mark.parametrize("name", ["heavy", "orders", "near", "ties", "holes", "constant"])
def test_a_cut_is_where_a_selection_cuts(found, numbers, name):
    its = next(d for d in found.distributions if d.column.name == name)
    table = pa.table({name: numbers[name]})
    for cut in its.cuts[::4]:
        selection = top(table, name, cut.share, keep=its.column.keep)
        assert cut.threshold == selection.threshold
        worth = numbers[name] * (-1 if its.column.keep == "low" else 1)
        limit = cut.threshold * (-1 if its.column.keep == "low" else 1)
        assert cut.at_threshold == (worth >= limit).sum()
        assert min(cut.rows, its.numbers) == selection.mask.sum()


def test_a_score_without_numbers_has_none(found):
    its = found.distributions[-1]
    assert (its.numbers, its.quantiles, its.counts.sum()) == (0, {}, 0)
    assert all(cut.threshold is None for cut in its.cuts)


def test_the_sample_is_rows_of_the_tables(found, numbers):
    places = found.sample.places
    assert len(places) == SAMPLE_ROWS
    assert (np.diff(places) > 0).all()
    assert 0.4 < (places < ROWS / 2).mean() < 0.6
    for name, values in found.sample.scores.items():
        assert np.array_equal(values, numbers[name][places], equal_nan=True)


def test_infinity_is_refused(tmp_path):
    folder = make_scores(tmp_path, {"text": ["a", "b"]}, {"x": [1, np.inf]})
    with pytest.raises(CorpusError, match="x is infinite somewhere"):
        survey(open_scores(str(folder)))


def test_relations():
    rng = np.random.default_rng(0)
    one = rng.normal(size=400).astype(np.float32)
    scores = {"a": one, "b": np.exp(one), "c": -one, "d": rng.normal(size=400), "e": np.ones(400), "f": one * np.nan}
    scores = {name: np.asarray(values, np.float32) for name, values in scores.items()}
    scores["d"][:3] = np.nan
    rho = rank_correlations(scores)
    assert rho[0, 1] == pytest.approx(1)
    assert rho[0, 2] == pytest.approx(-1)
    assert abs(rho[0, 3]) < 0.15
    assert np.isnan(rho[:, 4:]).all()
    rounded = np.round(one).astype(np.float32)
    ties = rank_correlations({"a": rounded, "d": scores["d"]})
    ranks = [(v[:, None] > v).sum(1) + (v[:, None] == v).sum(1) / 2 for v in (rounded[3:], scores["d"][3:])]
    assert ties[0, 1] == pytest.approx(np.corrcoef(*ranks)[0, 1])
    halves = overlaps(scores, [Column(name, "high", "") for name in "abcd"])
    assert halves[0, 1] == 1
    assert halves[0, 2] == 0
    assert 0.2 < halves[0, 3] < 0.5
    assert overlaps(scores, [Column("a", "high", ""), Column("c", "low", "")])[0, 1] == 1
