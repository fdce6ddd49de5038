"""Conditions on scores: what they keep is what NumPy says, NaN passes nothing, and nothing but a condition is taken."""

from __future__ import annotations

import contextlib
import json
from contextlib import contextmanager

import numpy as np
import pyarrow.parquet as pq
import pytest

from assay import select
from assay.corpus.errors import CorpusError
from assay.corpus.scores_folder import open_scores
from assay.curate import RuleOptions, curate
from assay.curate import where as asked
from assay.curate.condition import ExpressionError
from assay.curate.rows import Rows
from assay.curate.whole import scored_shards
from tests.small_scores import Column, make_scores

pytest.importorskip("duckdb")

NAN = np.float32("nan")
SIZES = {"a": 40, "web/b": 23}


@pytest.fixture(scope="module", autouse=True)
def one_engine():
    """Starting one takes longer than most of what is asked here."""

    @contextmanager
    def shared():
        with contextlib.closing(connection.cursor()) as cursor:
            yield cursor

    with pytest.MonkeyPatch.context() as patch, asked._connection() as connection:
        patch.setattr(asked, "_connection", shared)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    rng = np.random.default_rng(0)
    shards = {}
    for name, rows in SIZES.items():
        x, y, z = rng.normal(size=(3, rows)).round(1).astype(np.float32)
        x[3], y[[3, 7]], z[9] = NAN, NAN, NAN
        tokens = [rng.normal(size=3).astype(np.float32) for _ in range(rows)]
        shards[name] = {"x": x, "y": y, "z-1": z, "tokens": np.array([*tokens, None], object)[:-1]}
    columns = {"tokens": Column("tokens", width=None), "x": Column("x"), "y": Column("y", "low")}
    return make_scores(tmp_path_factory.mktemp("where"), shards, columns)


@pytest.fixture(scope="module")
def opened(folder):
    scores = open_scores(folder)
    return Rows(scores.store, scored_shards(scores))


@pytest.fixture(scope="module")
def columns(folder):
    tables = [pq.read_table(f"{folder}/{name}.parquet") for name in SIZES]
    shard = np.repeat([f"{name}.parquet" for name in SIZES], list(SIZES.values()))
    numbers = {name: np.concatenate([t[name].to_numpy() for t in tables]).astype(float) for name in ("x", "y", "z-1")}
    row = np.concatenate([t["row"].to_numpy() for t in tables])
    ids = np.concatenate([t["id"].to_numpy(zero_copy_only=False) for t in tables])
    return {**numbers, "row": row, "shard": shard, "id": ids}


def ask(rows, text):
    return asked.ask(rows, asked.parse_condition(text, rows.names()))


def passing(rows, text):
    return np.flatnonzero(ask(rows, text).codes == 1)


CONDITIONS = [
    ("x > 0", lambda x, y, z: x > 0, "x"),
    ("not (x < 0.5)", lambda x, y, z: ~(x < 0.5), "x"),
    ("x <= 0.3", lambda x, y, z: x <= np.float32(0.3), "x"),
    ("x >= 0.7 or -0.6 >= x", lambda x, y, z: (x >= np.float32(0.7)) | (x <= np.float32(-0.6)), "x"),
    ("x = 0.1 or x in (-.2, 3e-1)", lambda x, y, z: np.isin(x.round(1), [0.1, -0.2, 0.3]), "x"),
    ("x between 0.1 and 0.7", lambda x, y, z: (x.round(1) >= 0.1) & (x.round(1) <= 0.7), "x"),
    ("x <> 0.69999998 and 1 * x > 0.1", lambda x, y, z: x > 0.1, "x"),  # between two of them, and calculated
    ("x > 0 or y > 0", lambda x, y, z: (x > 0) | (y > 0), "xy"),
    ("not (x < 0 and y < 0)", lambda x, y, z: ~((x < 0) & (y < 0)), "xy"),
    ("x <> 0.5 and y != x", lambda x, y, z: (x != 0.5) & (y != x), "xy"),
    ("x between -0.5 and 0.5", lambda x, y, z: (x >= -0.5) & (x <= 0.5), "x"),
    ("x not between -0.5 and y", lambda x, y, z: ~((x >= -0.5) & (x <= y)), "xy"),
    ("round(x * 10) in (1, 2, 3)", lambda x, y, z: np.isin(np.round(x * 10), [1, 2, 3]), "x"),
    ("round(x * 10) not in (1, 2, 3)", lambda x, y, z: ~np.isin(np.round(x * 10), [1, 2, 3]), "x"),
    ('abs(x) - y ** 2 > "z-1" / 3', lambda x, y, z: abs(x) - y**2 > z / 3, "xyz"),
    ("-x + 1e-1 >= exp(y) - sqrt(abs(x))", lambda x, y, z: -x + 0.1 >= np.exp(y) - np.sqrt(abs(x)), "xy"),
    ("sqrt(ln(exp(abs(x)) + 1)) > 1", lambda x, y, z: np.sqrt(np.log(np.exp(abs(x)) + 1)) > 1, "x"),
    ("x < quantile(x, 0.9)", lambda x, y, z: x < np.nanquantile(x, 0.9, method="lower"), "x"),
    ("not (x < quantile(x, 0.25))", lambda x, y, z: ~(x < np.nanquantile(x, 0.25, method="lower")), "x"),
    ("x > quantile(y, 0.5)", lambda x, y, z: x > np.nanquantile(y, 0.5, method="lower"), "x"),
    ("x - y > quantile(x - y, 0.3)", lambda x, y, z: x - y > np.nanquantile(x - y, 0.3, method="lower"), "xy"),
    ("x > mean(y) + stddev(y)", lambda x, y, z: x > np.nanmean(y) + np.nanstd(y, ddof=1), "x"),
    ("x <= median(x)", lambda x, y, z: x <= np.nanmedian(x), "x"),
    ("x = max(x) or x = min(x)", lambda x, y, z: (x == np.nanmax(x)) | (x == np.nanmin(x)), "x"),
    ("x < count(y) / count(*)", lambda x, y, z: x < (~np.isnan(y)).sum() / len(y), "x"),
    ("x < sum(abs(x)) / 50", lambda x, y, z: x < np.nansum(abs(x)) / 50, "x"),
    ("rank(x) <= 10", lambda x, y, z: np.array([(x < v).sum() + 1 <= 10 for v in x]), "x"),
    ("percent_rank(-x) < 0.2", lambda x, y, z: np.array([(x > v).sum() / ((x == x).sum() - 1) < 0.2 for v in x]), "x"),
    ("percent_rank(x) between 0.25 and 0.75", lambda x, y, z: _middle(x, 0.5), "x"),
    ("rank(x - y) > rank(x)", lambda x, y, z: _ranks(x - y) > _ranks(x), "xy"),
]


def _middle(values, rate):
    """The band of this rate around the median."""
    ranks = (_ranks(values) - 1) / ((values == values).sum() - 1)
    return (ranks >= 0.5 - rate / 2) & (ranks <= 0.5 + rate / 2)


def _ranks(values):
    return np.array([np.nansum(values < v) + 1 for v in values])


@pytest.mark.parametrize(("text", "expected", "needs"), CONDITIONS, ids=[text for text, *_ in CONDITIONS])
def test_conditions_keep_what_numpy_keeps(opened, columns, text, expected, needs):
    numbers = [columns[name] for name in ("x", "y", "z-1")]
    there = ~np.isnan([numbers["xyz".index(name)] for name in needs]).any(0)
    with np.errstate(invalid="ignore"):
        wanted = np.flatnonzero(expected(*numbers) & there)
    assert 0 < len(wanted) < len(there)
    np.testing.assert_array_equal(passing(opened, text), wanted)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("shard = 'web/b.parquet' and x > 0", lambda c: (c["shard"] == "web/b.parquet") & (c["x"] > 0)),
        ("shard like 'web/%'", lambda c: c["shard"] == "web/b.parquet"),
        ("shard not like 'web/%' and row % 10 = 0", lambda c: (c["shard"] == "a.parquet") & (c["row"] % 10 == 0)),
        ("id in ('a-3', 'web/b-22', 'a''b')", lambda c: np.isin(c["id"], ["a-3", "web/b-22"])),
        ("row < 2 -- the first", lambda c: c["row"] < 2),
    ],
)
def test_rows_are_asked_for_by_shard_row_and_id(opened, columns, text, expected):
    np.testing.assert_array_equal(passing(opened, text), np.flatnonzero(expected(columns)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x >= quantile(x, 0.8) over (partition by shard)", lambda x, y: x >= np.nanquantile(x, 0.8, method="lower")),
        ("x > mean(y + 1) over (partition by shard) - 1", lambda x, y: x > np.nanmean(y + 1) - 1),
        ("rank(-x) over (partition by shard) <= 5", lambda x, y: _ranks(-x) <= 5),
        ("x < count(y) OVER (PARTITION BY shard) / 40", lambda x, y: x < (~np.isnan(y)).sum() / 40),
        ("x * count(*) over (partition by shard) > 20", lambda x, y: x * len(y) > 20),
    ],
)
def test_a_number_may_be_of_each_shard(opened, columns, text, expected):
    kept = []
    for shard in ("a.parquet", "web/b.parquet"):
        here = columns["shard"] == shard
        x, y = columns["x"][here], columns["y"][here]
        kept.append(expected(x, y) & ~np.isnan(x))
    np.testing.assert_array_equal(passing(opened, text), np.flatnonzero(np.concatenate(kept)))
    assert ask(opened, text).facts == {}


def test_a_shard_without_a_value_passes_nothing(tmp_path):
    values = {"a": [1, 2, 3], "b": [NAN, NAN, NAN]}
    url = make_scores(
        tmp_path, {n: {"x": np.ones(3, np.float32), "y": np.array(y, np.float32)} for n, y in values.items()}
    )
    scores = open_scores(url)
    answer = ask(Rows(scores.store, scored_shards(scores)), "not (x < quantile(y, 0) over (partition by shard))")
    assert answer.codes.tolist() == [1, 1, 1, 2, 2, 2]


def test_a_shards_quantile_is_the_one_that_a_rule_cuts_at(tmp_path):
    """Of 101 rows: 0.29 * 100 is less than 29 in floating point, and as decimals it is not."""
    rng = np.random.default_rng(0)
    url = make_scores(tmp_path, {name: {"x": rng.permutation(101).astype(np.float32)} for name in "ab"})
    for q in (0.29, 0.57, 0.58, 0.6):
        where = f"x >= quantile(x, {q}) over (partition by shard)"
        passed = curate(url, None, RuleOptions(where=where).rule(), str(tmp_path / f"where-{q}"), where=where)
        rule = RuleOptions(quantile=q, by="x", group="shard").rule()
        assert passed.kept == curate(url, "x", rule, str(tmp_path / f"rule-{q}"), group="shard").kept, q


def random_condition(rng, depth):
    """A condition as text, and what NumPy makes of x and y."""
    if depth == 0 or rng.random() < 0.2:
        name, limit = rng.choice(["x", "y"]), round(float(rng.normal()), 1)
        symbol, compare = [("<", np.less), (">=", np.greater_equal), ("=", np.equal)][rng.integers(3)]
        if rng.random() < 0.3:
            return f"{name} {symbol} quantile(x + y, 0.4)", lambda x, y: compare(
                {"x": x, "y": y}[name], np.nanquantile(x + y, 0.4, method="lower")
            )
        return f"{name} {symbol} {limit}", lambda x, y: compare({"x": x, "y": y}[name], np.float32(limit))
    left, first = random_condition(rng, depth - 1)
    if rng.random() < 0.3:
        return f"NOT ({left})", lambda x, y: ~first(x, y)
    right, second = random_condition(rng, depth - 1)
    word, join = [("AND", np.logical_and), ("OR", np.logical_or)][rng.integers(2)]
    return f"({left}) {word} ({right})", lambda x, y: join(first(x, y), second(x, y))


def test_random_conditions_keep_what_numpy_keeps(opened, columns):
    rng = np.random.default_rng(1)
    x, y = columns["x"], columns["y"]
    for _ in range(12):
        text, expected = random_condition(rng, 3)
        outside = text.replace("quantile(x + y, 0.4)", "")
        there = ~((np.isnan(x) & ("x" in outside)) | (np.isnan(y) & ("y" in outside)))
        np.testing.assert_array_equal(passing(opened, text), np.flatnonzero(expected(x, y) & there), text)


def test_what_has_no_value_is_neither_above_nor_below(opened, columns):
    """0/0, a root of what is below 0: unknown, also under NOT; where OR decides without it, it does not matter."""
    x = columns["x"]
    negative = x < 0
    assert negative.any()
    np.testing.assert_array_equal(passing(opened, "sqrt(x) < 1"), np.flatnonzero((x >= 0) & (x < 1)))
    np.testing.assert_array_equal(passing(opened, "not (sqrt(x) < 1)"), np.flatnonzero(x >= 1))
    np.testing.assert_array_equal(passing(opened, "(x - x) / (x - x) > 1 or x > 1"), np.flatnonzero(x > 1))
    np.testing.assert_array_equal(passing(opened, "not (ln(x) < 0)"), np.flatnonzero(x >= 1))
    root = np.sqrt(x, where=x >= 0, out=np.full_like(x, np.nan))
    limit = np.nanquantile(root, 0.5, method="lower")
    np.testing.assert_array_equal(
        passing(opened, "not (sqrt(x) < quantile(sqrt(x), 0.5))"), np.flatnonzero(root >= limit)
    )
    np.testing.assert_array_equal(
        passing(opened, "rank(sqrt(x)) < 5"), np.flatnonzero(_ranks(root) + 9 * np.isnan(root) < 5)
    )
    assert (x == 0).any()
    np.testing.assert_array_equal(passing(opened, "1 / x > 1 or 1 / x <= 1"), np.flatnonzero(~np.isnan(x) & (x != 0)))
    np.testing.assert_array_equal(passing(opened, "not (1 % x > 9)"), np.flatnonzero(~np.isnan(x) & (x != 0)))
    np.testing.assert_array_equal(passing(opened, "exp(x * 1000) > 9e99"), np.flatnonzero(x * 1000 > np.log(9e99)))
    answer = ask(opened, "not (sqrt(x) < 1)")
    assert answer.counts()["unknown"] == negative.sum()
    assert f"{negative.sum()} have no value" in answer.summary()


def test_every_row_says_why_it_was_dropped(folder, tmp_path):
    text = "not (x < 0) and y < quantile(y, 0.9)"
    curated = curate(folder, None, RuleOptions(where=text).rule(), str(tmp_path / "out"), where=text)
    fates = [pq.read_table(tmp_path / f"out/_selection/{name}.parquet").to_pylist() for name in SIZES]
    assert [f["reason"] for f in fates[0]][3] == "dropped: x is NaN"
    assert [f["reason"] for f in fates[0]][7] == "dropped: y is NaN"
    assert {f["reason"] for part in fates for f in part if f["kept"]} == {"kept: passes"}
    assert f"dropped: not: {text}" in {f["reason"] for f in fates[1]}
    kept = [pq.read_table(tmp_path / f"out/{name}.parquet").num_rows for name in SIZES]
    assert kept == [sum(f["kept"] for f in part) for part in fates]
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["where"] == {
        "condition": text,
        "passed": curated.kept,
        "failed": 63 - 4 - curated.kept,
        "unknown": 0,
        "nan": {"x": 2, "y": 2},
    }
    tables = [pq.read_table(f"{folder}/{name}.parquet")["y"].to_numpy() for name in SIZES]
    limit = float(np.nanquantile(np.concatenate(tables), 0.9, method="lower"))
    assert manifest["facts"] == {"quantile(y, 0.9)": limit}
    assert (manifest["by"], manifest["rule"]) == ("x", f"every row, where {text}")


@pytest.mark.parametrize(
    "options",
    [
        {"top": "0.5", "by": "y"},
        {"top": "7", "by": "y"},
        {"quantile": 0.5, "by": "y"},
        {"random": "0.5"},
        {"sample": "5", "by": "x", "temperature": 1.0},
        {"top": "9", "by": "y", "temperature": 1.0, "weigh": True},
    ],
)
def test_a_rule_chooses_among_the_rows_that_pass(folder, tmp_path, options):
    """As of a table that has no others: a share is of them."""
    rule = RuleOptions(**options, where="x < 0.5").rule()
    by = options.get("by")
    curated = curate(folder, by, rule, str(tmp_path / "out"), form="indices", where="x < 0.5")
    import pyarrow as pa

    table = pa.concat_tables([pq.read_table(f"{folder}/{name}.parquet") for name in SIZES])
    passes = table["x"].to_numpy() < 0.5
    alone = rule(table.filter(pa.array(passes)))
    np.testing.assert_array_equal(curated.selection.indices, np.flatnonzero(passes)[alone.indices])
    np.testing.assert_array_equal(curated.selection.reasons[passes], alone.reasons)
    assert curated.selection.threshold == alone.threshold
    assert set(curated.selection.reasons[~passes]) == {"dropped: not: x < 0.5", "dropped: x is NaN"}
    if options.get("top") == "0.5":
        assert curated.kept == round(passes.sum() / 2 + 1e-9)
    if alone.weights is not None:
        np.testing.assert_array_equal(curated.selection.weights[passes], alone.weights)
        assert not curated.selection.weights[~passes].any()


@pytest.mark.parametrize("form", ["shards", "indices", "weights", "datasets"])
def test_every_form_takes_a_condition(folder, tmp_path, form):
    options = {"by": "x", "temperature": 1.0, "weigh": True} if form == "weights" else {}
    rule = RuleOptions(where="x > 0", **options).rule()
    curated = curate(folder, options.get("by"), rule, str(tmp_path), form=form, where="x > 0")
    folders = {"indices": "indices", "weights": "weights", "datasets": "data", "shards": ""}
    rows = sum(pq.read_table(tmp_path / folders[form] / f"{name}.parquet").num_rows for name in SIZES)
    assert rows == curated.kept > 0


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.5])
def test_a_band_keeps_its_rate_around_the_median(tmp_path, rate):
    """Perplexity bands (2405.20541): perplexities are exp(loss), which stand in the same order."""
    loss = np.random.default_rng(0).permutation(np.linspace(1, 6, 101)).astype(np.float32)
    shards = {"a": {"loss": np.append(loss, NAN), "perplexity": np.append(np.exp(loss), NAN)}}
    rows = Rows((scores := open_scores(make_scores(tmp_path, shards))).store, scored_shards(scores))
    low, high = np.quantile(loss, [0.5 - rate / 2, 0.5 + rate / 2])
    wanted = np.flatnonzero((loss >= low - 1e-6) & (loss <= high + 1e-6))
    assert abs(len(wanted) - rate * 101) <= 1
    for name in ("loss", "perplexity"):
        text = f"percent_rank({name}) between {0.5 - rate / 2:g} and {0.5 + rate / 2:g}"
        np.testing.assert_array_equal(passing(rows, text), wanted)


def test_the_same_quantile_as_the_rule(folder, tmp_path):
    """As many as --quantile keeps, and the same."""
    for by, text in (("x", "x >= quantile(x, 0.9)"), ("x", "x >= quantile(x, 0.37)")):
        q = 0.9 if "0.9" in text else 0.37
        cut = curate(folder, by, RuleOptions(quantile=q, by=by).rule(), str(tmp_path / "cut"), form="indices")
        said = curate(folder, by, RuleOptions(where=text).rule(), str(tmp_path / "said"), form="indices", where=text)
        np.testing.assert_array_equal(cut.selection.mask, said.selection.mask)


@pytest.mark.parametrize(
    ("text", "message", "caret"),
    [
        ("x > 0 and xx < 1", "there is no score xx; did you mean x?", 10),
        ("'ä' = id and mimic > 1", "there is no score mimic; there are x, y, z-1, row, id, shard", 13),
        ("x.y > 1", "there is no score x.y", 0),
        ("tokens > 1", "there is no score tokens", 0),
        ("x >", "syntax error", 3),
        (" ", "is empty", None),
        ("x > 1 and \udcff > 1", "is no UTF-8", None),
        ("x", "x is a number; expected a condition, as x > 0", 0),
        ("x + mean(y)", "is a number; expected a condition", 0),
        ("id", "id is a text; expected a condition", 0),
        ("1 < 2", "names no score", 0),
        ("x > 'a'", "x is a number and 'a' is a text; expected two numbers or two texts", 0),
        ("x > 1 and y", "y is a number; expected a condition", 10),
        ("not x", "x is a number; expected a condition", 4),
        ("(x > 1) + 1 > 2", "is a condition; expected a number", 1),
        ("(x > 1) = (y > 1)", "expected two numbers or two texts", None),
        ("id like x", "x is a number; expected a text", 8),
        ("log(x) > 1", "there is no function log; take ln, log2 or log10", 0),
        ("meen(x) > y", "there is no function meen; take mean", 0),
        ("x > quantile(x, 90)", "a number from 0 to 1", 4),
        ("x > quantile(x, y)", "a number from 0 to 1", 4),
        ("x > quantile(x)", "expected a score and a share", 4),
        ("x > mean(x, y)", "mean: expected 1 argument, got 2", 4),
        ("x > mean(1)", "expected a score inside", 4),
        ("x > mean(abs(x - mean(x)))", "mean(x) inside", 4),
        ("rank(rank(x)) > 1", "rank(x) inside", 0),
        ("x is null", "IS NULL cannot be asked for", 0),
        ("x ^ y > 1", "expected its power as a number from 0 on", 0),
        ("pow(x, -1) > 1", "expected its power as a number from 0 on", 0),
        ("x = null", "expected a finite decimal number or a text", 4),
        ("x is distinct from y", "DISTINCT FROM cannot be asked for", 0),
        ("x > 1e999999", "expected a finite decimal number", 4),
        ("x > 0x10", 'syntax error at or near "x10"', 5),
        ("NOT " * 2400 + "x > 0", "nested too deep", None),
        ("abs(" * 600 + "x" + ")" * 600 + " > 0", "nested too deep", None),
        ("sqrt(" * 20 + "x" + ")" * 20 + " > 0", "nested too deep", None),
        ("1 / (" * 20 + "x" + ")" * 20 + " > 0", "nested too deep", None),
        ("x > 1 or " * 2000 + "x > 0", "expected at most 10,000", None),
    ],
)
def test_what_is_wrong_is_pointed_at(opened, text, message, caret):
    with pytest.raises(ExpressionError) as caught:
        ask(opened, text)
    lines = str(caught.value).split("\n")
    assert message in lines[0], lines[0]
    if caret is not None:
        assert lines[1:] == [f"  {text}", "  " + " " * caret + "^"]


@pytest.mark.parametrize(
    "text",
    [
        "(SELECT count(*) FROM read_csv('/etc/passwd')) > x",
        "x > 1) FROM read_csv('/etc/passwd') WHERE (TRUE",
        "x > 1) UNION (SELECT TRUE",
        "x > 1); COPY (SELECT 1) TO '/tmp/x'; SELECT (TRUE",
        "x > 1;",
        "exists (select 1) and x > 1",
        "x in (select 1)",
        "read_text('/etc/passwd') = id",
        "getenv('HOME') = id",
        "current_setting('home_directory') = id",
        "pg_sleep(1) > x",
        "nextval('s') > x",
        "random() > x",
        "set_config('a', 'b') = id",
        "main.abs(x) > 1",
        "system.main.abs(x) > 1",
        "abs(x := x) > 1",
        "mean(x) filter (where y > 1) > x",
        "median(distinct x) > x",
        "quantile(x, 0.5 order by y) > x",
        "mean(x) over (order by y) > x",
        "mean(x) over (partition by id) > x",
        "mean(x) over (partition by shard order by y) > x",
        "mean(x) over (partition by shard, id) > x",
        "mean(x) over (partition by (select 'shard')) > x",
        "mean(x) over (partition by shard rows between 1 preceding and current row) > x",
        "mean(x) over (partition by shard rows between unbounded preceding and current row exclude ties) > x",
        "mean(x) filter (where y > 1) over (partition by shard) > x",
        "mean(distinct x) over (partition by shard) > x",
        "mean(x) over () > x",
        "abs(x) over (partition by shard) > x",
        "first_value(x) over (partition by shard) > x",
        "lag(x) over (partition by shard) > x",
        "rank() over (partition by shard) > x",
        "main.mean(x) over (partition by shard) > x",
        "columns(*) > 1",
        "* > 1",
        "#1 > 1",
        "$1 > x",
        "? > x",
        "x::int > 1",
        "cast(id as int) > x",
        "case when x > 1 then true else false end",
        "list_filter([x], lambda v: v > 1) = [x]",
        "[x] = [1]",
        "{'a': x}.a > 1",
        "id collate nocase = 'a'",
        "id || 'a' = 'b'",
        "id similar to 'a'",
        "x > 1, y > 1",
        "distinct x > 1",
        "x > 1 as y",
        "try(x > 1)",
        "x > 1 and true",
        "x > any([1])",
        "x > all (select 1)",
        "unnest([x]) > 1",
        "grouping(x) > 1",
        "x\x00 > 1",
    ],
)
def test_nothing_but_a_condition_is_taken(opened, monkeypatch, text):
    """Refused before any of it is run: of a refused text no query over the tables is made."""

    def fail(*arguments):
        raise AssertionError("it was run")

    monkeypatch.setattr(asked, "_run", fail)
    with pytest.raises(ExpressionError):
        ask(opened, text)


def test_the_engine_itself_has_no_way_out(tmp_path):
    import duckdb

    secret = tmp_path / "secret.csv"
    secret.write_text("a\n1\n")
    frame = pq  # noqa: F841 (a variable of Python's, which DuckDB would find)
    with asked._connection() as connection:
        for statement in (
            f"SELECT * FROM read_csv('{secret}')",
            f"SELECT * FROM '{secret}'",
            f"COPY (SELECT 1) TO '{tmp_path / 'out.csv'}'",
            f"ATTACH '{tmp_path / 'out.db'}'",
            "INSTALL httpfs",
            "SET enable_external_access = true",
            "SET threads = 8",
            "SELECT * FROM frame",
        ):
            with pytest.raises(duckdb.Error):
                connection.execute(statement)
    assert [path.name for path in tmp_path.iterdir()] == ["secret.csv"]


def test_texts_are_bound_and_never_part_of_the_query(opened):
    assert len(passing(opened, "id <> 'a'' OR ''1''=''1' and x > 0")) > 0
    assert len(passing(opened, "id = 'a-0'' or true --' or x > 99")) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x > 1000", "no row passes; 0 of 63 rows pass, 2 have no x"),
        ("x > quantile(sqrt(-abs(x) - 1), 0.5)", "has no value"),
    ],
)
def test_where_nothing_is_meant_nothing_is_written(folder, tmp_path, text, message):
    with pytest.raises(CorpusError, match=message):
        curate(folder, None, RuleOptions(where=text).rule(), str(tmp_path / "out"), where=text)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"where": "x > 0", "keep": "high"}, "--keep high: has no effect with --where alone"),
        ({"where": "x > 0", "temperature": 1.0}, "--temperature 1.0: has no effect"),
        ({"where": "x > 0", "weigh": True}, "--format weights: --where weighs all rows that it keeps alike"),
        ({"where": "x > 0", "top": "1"}, "--by is missing"),
    ],
)
def test_options_beside_a_condition_are_checked(options, message):
    with pytest.raises(CorpusError, match=message):
        RuleOptions(**options).rule()


def test_a_table_that_shrinks_while_it_is_read_is_an_error(opened, monkeypatch):
    monkeypatch.setattr("assay.curate.rows.ROW_GROUP_ROWS", 8)
    stored = pq.ParquetFile.iter_batches

    def short(self, **options):
        return list(stored(self, **options))[:-1]

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", short)
    with pytest.raises(CorpusError, match=r"a\.parquet: has changed while it was read"):
        ask(opened, "x > 0")


def test_an_interrupt_stays_one(opened, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(Rows, "_batches", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ask(opened, "x > 0")


def test_shards_alone_can_be_asked_for(folder, tmp_path):
    where = "shard = 'a.parquet'"
    curated = curate(folder, None, RuleOptions(where=where).rule(), str(tmp_path), form="indices", where=where)
    assert curated.kept == SIZES["a"]


def test_a_table_that_grows_meanwhile_is_an_error(opened, monkeypatch):
    monkeypatch.setattr("assay.curate.rows.ROW_GROUP_ROWS", 8)
    stored = pq.ParquetFile.iter_batches

    def long(self, **options):
        batches = list(stored(self, **options))
        return [*batches, batches[0]]

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", long)
    with pytest.raises(CorpusError, match=r"a\.parquet: has changed while it was read"):
        ask(opened, "x > 0")


def test_the_manifest_has_the_condition_that_can_be_asked_again(folder, tmp_path):
    where = "x > 0 -- what is good\n and y > 0"
    curated = curate(folder, None, RuleOptions(where=where).rule(), str(tmp_path), form="indices", where=where)
    assert json.loads((tmp_path / "manifest.json").read_text())["where"]["condition"] == where
    assert "dropped: not: x > 0 -- what is good and y > 0" in curated.selection.legend


def test_batches_and_their_order_change_nothing(opened, monkeypatch):
    text = "x > quantile(x, 0.3) and rank(y) < 40 and shard like '%'"
    whole = ask(opened, text).codes
    monkeypatch.setattr("assay.curate.rows.ROW_GROUP_ROWS", 7)
    np.testing.assert_array_equal(ask(opened, text).codes, whole)


def test_selection_keeps_its_promises(folder, tmp_path):
    """Codes index the legend, and a row without a rule's score is still counted as one."""
    curated = curate(folder, "y", RuleOptions(top="1.0", by="y", where="x < 9").rule(), str(tmp_path), where="x < 9")
    selection = curated.selection
    assert isinstance(selection, select.Selection)
    assert selection.codes.max() < len(selection.legend)
    assert (selection.codes == select.selection.UNSCORED).sum() == 2  # y is NaN where x is not
    assert "2 NaN" in selection.summary()
