"""What the page is told, against the rows themselves; and the command, against `assay select`."""

from __future__ import annotations

import json
import subprocess

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from assay.cli import main
from assay.corpus.errors import CorpusError
from assay.corpus.scores_folder import open_scores
from assay.curate.held import scratch
from assay.explore import Cut, open_explorer, parse_cuts, select_command
from assay.explore.answers import facts
from assay.explore.command import quoted
from assay.report import Shown
from tests.small_scores import Column, make_scores

pytest.importorskip("duckdb")

ROWS = {"b": 300, "a": 500, "empty": 0}
ODD = 'it\'s "x"\n\x1b[2J'


def shown(ranked):
    return [Shown(its.id, f"{its.shard.path}:{its.row}", its.scores) for its in ranked]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Three shards; their scores beside the rows' ids, shards in the order of their paths."""
    root = tmp_path_factory.mktemp("explore")
    rng = np.random.default_rng(0)
    (root / "data").mkdir()
    shards, kinds = {}, []
    for stem, rows in sorted(ROWS.items()):
        quality = rng.normal(size=rows).astype(np.float32)
        quality[::50] = np.nan
        tenths = (rng.integers(0, 10, rows) / 10).astype(np.float32)  # 0.7 and others are no such numbers in float64
        shards[stem] = {"quality": quality, ODD: tenths, "flat": np.ones(rows, np.float32)}
        kinds.append([None if i % 7 == 0 else ("web", "book")[i % 2] for i in range(rows)])
        ids = [f"{stem}-{i}" for i in range(rows)]
        table = pa.table({"id": pa.array(ids, pa.string()), "source": pa.array(kinds[-1], pa.string())})
        pq.write_table(table, root / f"data/{stem}.parquet")
    bad = [3, 4, 100]
    folder = make_scores(root, shards, {ODD: Column(ODD, "low")}, without={"a": bad})
    left = np.setdiff1d(np.arange(500), bad)
    scores = {name: np.concatenate([shards["a"][name][left], shards["b"][name]]) for name in shards["a"]}
    return root, folder, scores, [kinds[0][i] for i in left] + kinds[1], [f"a-{i}" for i in left]


@pytest.fixture(scope="module")
def explorer(made):
    folder = made[1]
    command = lambda where: select_command(folder, None, where)  # noqa: E731
    return open_explorer(open_scores(folder), ["source"], command, shown, lambda: "")


CUTS = [
    [Cut("quality", "high", 0.25)],
    [Cut("quality", "low", -0.125), Cut(ODD, "low", float(np.float32(0.7)))],
    [Cut(ODD, "high", float(np.float32(0.3)))],
]


def by_hand(scores, cuts):
    passes = np.ones(len(scores["quality"]), bool)
    for cut in cuts:
        values = scores[cut.score].astype(np.float64)
        passes &= values >= cut.value if cut.keep == "high" else values <= cut.value
    return passes


@pytest.mark.parametrize("cuts", CUTS, ids=range(len(CUTS)))
def test_counts_are_those_of_the_rows(made, explorer, cuts):
    _, _, scores, kinds, _ = made
    passes, found = by_hand(scores, cuts), explorer.count(cuts)
    assert 0 < found["kept"] == passes.sum() < len(passes)
    assert [its.column for its in explorer.groupings] == ["shard", "source"]
    shards, sources = explorer.groupings
    assert shards.names == ["a.parquet", "b.parquet", "empty.parquet"]
    assert found["groups"][0] == [passes[:497].sum(), passes[497:].sum(), 0]
    assert sources.names == ["book", "web", "no value"]
    values = np.array([kind or "no value" for kind in kinds])
    assert found["groups"][1] == [passes[values == name].sum() for name in sources.names]
    for its, bins in zip(explorer.shown, found["bins"], strict=True):
        values = scores[its.column.name][passes]
        assert bins == np.histogram(values[~np.isnan(values)], its.edges)[0].tolist()
    lacking = np.isnan(scores["quality"]).sum() if cuts[0].score == "quality" else 0
    assert found["lacking"] == ({"0": lacking} if lacking else {})


@pytest.mark.parametrize("cuts", CUTS, ids=range(len(CUTS)))
def test_the_command_keeps_just_the_rows_that_were_counted(made, explorer, cuts, capsys):
    root, _, scores, _, ids = made
    command = explorer.count(cuts)["command"]
    assert command.isprintable()
    script = f"assay() {{ printf '%s\\0' \"$@\"; }}; {command}"
    words = subprocess.run(["bash", "-c", script], capture_output=True, check=True, text=True).stdout.split("\0")[:-1]
    out = root / f"out-{len(list(root.iterdir()))}"
    assert words[-2:] == ["--out", "curated"]
    assert main([*words[:-1], str(out)]) == 0
    assert f"kept {explorer.count(cuts)['kept']:,} " in capsys.readouterr().out
    kept = [id for stem in "ab" for id in pq.read_table(out / f"{stem}.parquet")["id"].to_pylist()]
    ids = ids + [f"b-{i}" for i in range(300)]
    assert kept == [id for id, passes in zip(ids, by_hand(scores, cuts), strict=True) if passes]


def test_no_cut_and_cuts_that_keep_nothing_have_no_command(made, explorer):
    everything = explorer.count([])
    assert (everything["kept"], everything["command"]) == (797, "")
    assert everything["bins"][0] == explorer.shown[0].counts.tolist()
    nothing = explorer.count([Cut("quality", "high", 99.0)])
    assert (nothing["kept"], nothing["command"]) == (0, "")
    assert ("no cut" in everything["why"], "No row" in nothing["why"]) == (True, True)


def test_rows_beside_a_cut_are_the_nearest(made, explorer):
    _, _, scores, _, ids = made
    ids = ids + [f"b-{i}" for i in range(300)]
    cuts = CUTS[1]
    others, values = by_hand(scores, cuts[1:]), scores["quality"].astype(np.float64)
    found = explorer.near(cuts, "quality")
    for side, on in (("kept", values <= -0.125), ("dropped", values > -0.125)):
        near = sorted(np.flatnonzero(on & others), key=lambda i: abs(values[i] + 0.125))[:4]
        assert [its.name for its in found[side]] == [ids[i] for i in near]
    drawn = explorer.some(cuts, 0)
    passes = dict(zip(ids, by_hand(scores, cuts), strict=True))
    assert [passes[its.name] for its in drawn["kept"]] == [True] * 4
    assert [passes[its.name] for its in drawn["dropped"]] == [False] * 4
    assert explorer.some([], 0)["dropped"] == []


def test_what_stays_as_it_is(explorer):
    found = json.loads(json.dumps(facts(explorer), allow_nan=False))
    assert [its["name"] for its in found["scores"]] == ["quality", 'it\'s "x" \\x1b[2J']
    assert found["others"] == ["flat"]
    assert (found["rows"], found["quarantined"]) == (797, 3)
    assert [its["rows"] for its in found["groups"]] == [[497, 300, 0], [342, 340, 115]]


@pytest.mark.parametrize(
    "text",
    [
        *("", "{}", "[1]", "[[0]]", '[["0", "high", 1]]', '[[2, "high", 1]]', '[[-1, "high", 1]]'),
        *('[[true, "high", 1]]', '[[0, "both", 1]]', '[[0, "high", "1"]]', '[[0, "high", NaN]]'),
        *('[[0, "high", 1e39]]', '[[0, "high", null]]', f'[[0, "high", {"9" * 400}]]', f'[[0, "high", {"9" * 9999}]]'),
        *('[[0, "high", 1], [0, "low", 2]]', "[" * 9000, " " * 20_001),
    ],
    ids=range(18),
)
def test_what_is_no_cut_is_refused(text):
    with pytest.raises(ValueError, match=r"xpect|nested|digits"):
        parse_cuts(text, ["quality", ODD])


def test_a_cut_is_at_the_float32_that_is_nearest():
    rng = np.random.default_rng(0)
    numbers = rng.integers(0, 2**32, 300, dtype=np.uint64).astype(np.uint32).view(np.float32)
    for number in [*numbers[np.isfinite(numbers)].tolist(), 0.7, -0.0, 1e-45, 3.4e38]:
        (cut,) = parse_cuts(json.dumps([[0, "high", number]]), ["quality"])
        assert cut.value == float(np.float32(number))
        assert float(cut.text.rpartition(" ")[2]) == cut.value
    assert cut.text.startswith('"quality" >= ')
    assert parse_cuts('[[0, "high", -0.0]]', ["quality"])[0].text == '"quality" >= 0.0'


def test_words_of_a_command():
    assert quoted("a b") == "'a b'"
    for word in ("\x1b[201~; rm", "1\n2", "\u202e'\\x", "\x007"[1:], "é\u2028", "a\udce9"):
        said = subprocess.run(["bash", "-c", f"printf %s {quoted(word)}"], capture_output=True, check=True).stdout
        assert said == word.encode("utf-8", "surrogateescape")
        assert quoted(word).isprintable()
    with pytest.raises(ValueError, match="NUL"):
        select_command("scores", None, '"a\0" >= 1.0')
    assert select_command("s3://b/c", "data", "x > 1").startswith("assay select s3://b/c --corpus /")


def test_no_room_for_a_copy_is_an_error(monkeypatch):
    def full(*args, **kwargs):
        return open("/dev/full", "wb", buffering=0)

    monkeypatch.setattr("assay.curate.held.tempfile.TemporaryFile", full)
    with pytest.raises(CorpusError, match="no room for 80 bytes of scores"):
        scratch((20,), np.float32)
