"""`--group` and `--mix`: which rows are of a group, and what is written of them."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from assay.cli import main
from assay.corpus.errors import CorpusError
from assay.corpus.footer import Identity
from assay.corpus.readers import read
from assay.corpus.scores_folder import Scored, open_scores
from assay.corpus.shards import find_shards
from assay.corpus.storage import Store
from assay.curate import Mix, RuleOptions, curate, explain, grouping, read_mix
from tests.small_scores import Column, make_scores, write_manifest, write_table

WEB = 'web\'s "best"; DROP TABLE scores --\n'


def make(tmp_path, columns=None, without=None):
    """Two shards of Parquet with a column `source` (nulls too), and their scores."""
    rng = np.random.default_rng(0)
    sizes = {"a": 90, "deep/b": 40}
    for stem, rows in sizes.items():
        path = tmp_path / "data" / f"{stem}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn = [[WEB, "wiki", None][i] for i in rng.choice(3, rows, p=[0.6, 0.3, 0.1])]
        own = {"id": [f"{stem}-{i}" for i in range(rows)], "source": pa.array(drawn, pa.string())}
        pq.write_table(pa.table(own | {name: make(rows) for name, make in (columns or {}).items()}), path)
    values = {stem: {"s": rng.normal(size=rows).astype(np.float32)} for stem, rows in sizes.items()}
    values["a"]["s"][5] = np.nan
    return make_scores(tmp_path, values, without=without or {"a": [0, 7], "deep/b": [39]})


@pytest.fixture(scope="module")
def scores(tmp_path_factory):
    return make(tmp_path_factory.mktemp("groups"))


def fates(out) -> list[dict]:
    return [row for stem in ("a", "deep/b") for row in pq.read_table(out / f"_selection/{stem}.parquet").to_pylist()]


def sources(scores) -> list[str | None]:
    root = scores.removesuffix("scores")
    return [v for stem in ("a", "deep/b") for v in pq.read_table(f"{root}data/{stem}.parquet")["source"].to_pylist()]


def test_quotas_are_of_each_value_of_a_column(scores, tmp_path):
    rule = RuleOptions(by="s", top="0.25", group="source").rule()
    curated = curate(scores, "s", rule, str(tmp_path), group="source")
    rows, names = fates(tmp_path), sources(scores)
    scored = [i for i, row in enumerate(rows) if not row["reason"].startswith("quarantined")]
    assert [rows[i]["group"] for i in scored] == [names[i] for i in scored]
    for name in (WEB, "wiki", None):
        own = [rows[i] for i in scored if names[i] == name]
        kept = [row["s"] for row in own if row["kept"]]
        assert len(kept) == int(0.25 * len(own) + 0.5)
        rest = [row["s"] for row in own if not row["kept"] and row["s"] == row["s"]]
        assert min(kept) > max(rest)
        assert {row["threshold"] for row in own} == {min(kept)}
    told = pq.read_table(tmp_path / "_groups.parquet").to_pylist()
    assert {row["group"]: row["rows"] for row in told} == Counter(names[i] for i in scored)
    assert sum(row["kept"] for row in told) == curated.kept == sum(row["kept"] for row in rows)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["group"] | {"column": "source", "groups": 3, "written": "_groups.parquet"} == manifest["group"]
    assert manifest["rule"] == "s, highest 0.25 of each source"
    fate = explain(open_scores(scores), rows[scored[0]]["id"], str(tmp_path)).samples[0].fate
    assert (fate.column, fate.group, fate.threshold) == ("source", names[scored[0]], rows[scored[0]]["threshold"])


def test_shards_are_groups_and_conditions_come_first(scores, tmp_path):
    pytest.importorskip("duckdb")
    rule = RuleOptions(top="3", by="s", where="s < 0", group="shard").rule()
    curate(scores, "s", rule, str(tmp_path), where="s < 0", group="shard")
    kept = [row for row in fates(tmp_path) if row["kept"]]
    assert Counter(row["group"] for row in kept) == {"a.parquet": 3, "deep/b.parquet": 3}
    for shard in ("a", "deep/b"):
        passing = pq.read_table(f"{scores}/{shard}.parquet")["s"].to_numpy()
        expected = np.sort(passing[passing < 0])[-3:]
        assert sorted(row["s"] for row in kept if row["group"] == f"{shard}.parquet") == expected.tolist()


def test_the_control_needs_no_score_and_a_column_may_have_a_scores_name(tmp_path):
    scores = make(tmp_path, {"s": lambda rows: pa.array([i % 2 for i in range(rows)])})
    rule = RuleOptions(random="4", group="s").rule()
    assert curate(scores, None, rule, str(tmp_path / "out"), group="s").kept == 8
    rule = RuleOptions(by="s", top="4", group="s").rule()
    assert curate(scores, "s", rule, str(tmp_path / "best"), group="s").kept == 8
    assert {row["group"] for row in fates(tmp_path / "best") if row["kept"]} == {"0", "1"}


MIX = """
bands: [0, 50, 100]
rates:
  wiki: [0, 2.5]
  null: [1, 1]
  "*": [0.2, 3]
"""


@pytest.mark.parametrize("form", ["shards", "indices", "weights", "datasets"])
def test_a_mix_writes_rows_as_often_as_it_says(form, scores, tmp_path):
    (tmp_path / "mix.yaml").write_text(MIX)
    mix = read_mix(str(tmp_path / "mix.yaml"))
    rule = RuleOptions(by="s", mix=mix, group="source", weigh=form == "weights").rule()
    out = tmp_path / "out"
    for _ in range(2):  # over itself, too
        curated = curate(scores, "s", rule, str(out), group="source", mix=mix, form=form)
    copies = {row["id"]: row["copies"] for row in fates(out) if row["copies"]}
    assert sum(copies.values()) == curated.copies > curated.kept == len(copies)
    if form == "weights":
        table = pa.concat_tables(pq.read_table(path) for path in sorted((out / "weights").rglob("*.parquet")))
        weights = dict(zip(table["id"].to_pylist(), table["weight"].to_pylist(), strict=True))
        assert weights == pytest.approx({id_: count * len(copies) / curated.copies for id_, count in copies.items()})
    elif form == "indices":
        found = [pq.read_table(out / f"indices/{stem}.parquet").to_pylist() for stem in ("a", "deep/b")]
        written = Counter(f"{row['shard'].removesuffix('.parquet')}-{row['row']}" for part in found for row in part)
        assert written == copies
    else:
        where = [path for path in out.rglob("*.parquet") if not path.relative_to(out).parts[0].startswith("_")]
        assert Counter(id_ for path in where for id_ in pq.read_table(path)["id"].to_pylist()) == copies
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["rows"]["written"] == curated.copies
    assert manifest["mix"]["rates"][1] == {"group": None, "rates": [1.0, 1.0]}


def test_rows_that_were_there_twice_are_not_left_behind(scores, tmp_path):
    out = tmp_path / "out"
    for rates, times in (("[3, 0]", 3), ("[1, 0]", 1)):
        (tmp_path / "mix.yaml").write_text(f"bands: [0, 50, 100]\nrates: {rates}")
        mix = read_mix(str(tmp_path / "mix.yaml"))
        curate(scores, "s", RuleOptions(by="s", mix=mix).rule(), str(out), mix=mix)
        assert len(list(out.glob("repeat-*/a.parquet"))) == times - 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it is no mapping"),
        ("bands: [0, 100]", "has the keys bands; expected bands"),
        ("bands: [0, x]\nrates: [1]", "bands: 'x' is no number"),
        ("bands: [0, 100]\nrates: {a: [1], a: [2]}", "rates: the key 'a' appears twice"),
        ("bands: [0, 100]\nrates: {a: 1}", "rates.a: expected a list"),
        ("bands: [0, 100]\nrates: {a: [.nan]}", "is no number|expected a number"),
        ("bands: [0, 100]\nrates: {a: [nan]}", "rates of a: nan"),
        ("bands: [0, 100]\nrates: {[a]: [1]}", "a key is no text"),
        ("bands: !!python/object:os.system [0]\nrates: [1]", "ascend from 0 to 100"),
        ("bands: [", "cannot be read"),
    ],
)
def test_files_that_are_no_mix(text, message, tmp_path):
    (tmp_path / "mix.yaml").write_text(text)
    with pytest.raises(CorpusError, match=f"--mix .*mix.yaml: .*({message})"):
        read_mix(str(tmp_path / "mix.yaml"))


def test_languages_are_texts_in_a_mix(tmp_path):
    (tmp_path / "mix.yaml").write_text("bands: [0, 100]\nrates: {no: [1], 1: [2], 'null': [3], null: [4]}")
    assert read_mix(str(tmp_path / "mix.yaml")).rates == {"no": (1,), "1": (2,), "null": (3,), None: (4,)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0.0, "group": "source"}, "--group source: has no effect with --threshold; expected with one of"),
        ({"where": "s > 0", "group": "source"}, "no effect with --where alone"),
        ({"mix": {"a": (1.0,)}}, "its rates are by group; add --group"),
        ({"mix": (1.0,), "group": "source"}, "has the same rates for all; expected them by source"),
    ],
)
def test_rules_that_know_no_groups(options, message):
    if "mix" in options:
        options = options | {"mix": Mix((0.0, 100.0), options["mix"])}
    with pytest.raises(CorpusError, match=message):
        RuleOptions(by="s", **options).rule()


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("sourc", None, r"--group sourc: a.parquet: has no column sourc; did you mean source\?"),
        ("x", lambda rows: pa.array([[1]] * rows), "--group x: a.parquet: holds .*; expected texts, numbers"),
        ("x", lambda rows: pa.nulls(rows, pa.string()), "--group x: no row has a value in it"),
    ],
)
def test_columns_that_make_no_groups(column, values, message, tmp_path):
    scores = make(tmp_path, {"x": values} if values else None)
    rule = RuleOptions(by="s", top="1", group=column).rule()
    with pytest.raises(CorpusError, match=message):
        curate(scores, "s", rule, str(tmp_path / "out"), group=column)
    assert not (tmp_path / "out").exists()


def test_too_many_values_are_refused(scores, tmp_path, monkeypatch):
    monkeypatch.setattr(grouping, "MOST_GROUPS", 20)
    with pytest.raises(CorpusError, match="--group id: has more than 20 values"):
        curate(scores, "s", RuleOptions(by="s", top="1", group="id").rule(), str(tmp_path / "out"), group="id")


def test_values_become_texts():
    values = [1, 1.0, True, float("nan"), None, "\ud800", 2.5, -1]
    assert [grouping._name(value, None) for value in values] == ["1", "1", "true", None, None, "\\ud800", "2.5", "-1"]
    assert [grouping._name(value, ("cat", "dog")) for value in (1, 2, -1)] == ["dog", None, None]


@pytest.mark.parametrize("form", ["jsonl", "tar"])
def test_json_rows_without_the_key_are_a_group(tmp_path, form):
    (tmp_path / "data").mkdir()
    lines = [{"id": "0"}, {"id": "1", "lang": "no"}, {"id": "2", "lang": None}, {"id": "3", "lang": "en"}]
    texts, group = [json.dumps(line) for line in lines], "lang" if form == "jsonl" else "json.lang"
    if form == "jsonl":
        (tmp_path / "data/a.jsonl").write_text("".join(f"{text}\n" for text in texts))
    else:
        with tarfile.open(tmp_path / "data/a.tar", "w") as archive:
            for i, text in enumerate(texts):
                member = tarfile.TarInfo(f"{i}.json")
                member.size = len(text)
                archive.addfile(member, io.BytesIO(text.encode()))
    identity, store = Identity(recipe={"seed": 0}, models={}), Store.at(str(tmp_path / "scores"))
    (shard,) = find_shards(str(tmp_path / "data")).shards
    write_table(store, shard, identity, list("0123"), {"s": np.arange(4, dtype=np.float32)}, [Column("s")])
    write_manifest(store, identity, tmp_path / "data", ["s"])
    rule = RuleOptions(by="s", top="1", group=group).rule()
    curate(store.url, "s", rule, str(tmp_path / "out"), group=group)
    (shard,) = find_shards(str(tmp_path / "out")).shards
    column = "id" if form == "jsonl" else "json.id"
    assert [id_ for chunk in read(shard, [column]) for id_ in chunk.columns[column]] == ["1", "2", "3"]


def test_the_command(scores, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["select", scores, "--by", "s", "--top", "2", "--group", "source", "--out", "out"]) == 0
    assert "groups of source: 3, each with its counts in out/_groups.parquet" in capsys.readouterr().out
    (tmp_path / "mix.yaml").write_text(MIX)
    assert main(["select", scores, "--by", "s", "--mix", "mix.yaml", "--group", "source", "--out", "mixed"]) == 0
    said = capsys.readouterr().out
    assert "s, a mix of 2 bands of each source, seed 0: kept" in said
    assert "with their copies" in said
    rows = fates(tmp_path / "mixed")
    row = next(row for row in rows if (row["copies"] or 0) > 1 and row["group"] == "wiki")
    assert main(["explain", scores, row["id"], "--selection", "mixed"]) == 0
    said = capsys.readouterr().out
    assert "kept: s in the band 50-100 % of its source\n    its source: wiki\n    " in said
    assert f"{row['copies']} times in the output" in said


@pytest.mark.parametrize("name", ["group", "kept", "threshold"])
def test_a_score_may_have_the_name_of_a_column_of_the_fates(tmp_path, capsys, name):
    path = tmp_path / "data/a.parquet"
    path.parent.mkdir()
    pq.write_table(pa.table({"id": list("abc"), "lang": ["en", "de", "en"]}), path)
    folder = make_scores(tmp_path, {"a": {name: np.array([3, 2, 1], np.float32)}})
    arguments = ["--by", name, "--top", "1", "--group", "lang", "--out", str(tmp_path / "out")]
    assert main(["select", folder, *arguments]) == 0
    assert main(["explain", folder, "a.parquet:2", "--selection", str(tmp_path / "out")]) == 0
    assert f"{name} 1 is 2 below the threshold of its lang 3" in capsys.readouterr().out


def test_true_and_1_are_two_groups_however_rows_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("assay.corpus.format.CHUNK_ROWS", 1)
    values = [1, True, 1, True, 0, False, 0.0, 1.0]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"id": str(i), "g": v}) + "\n" for i, v in enumerate(values)))
    (shard,) = find_shards(str(tmp_path)).shards
    found = grouping.read_groups(
        Store.at(str(tmp_path)), [(shard, Scored(shard.fingerprint(), len(values), len(values), 0))], "g"
    )
    assert found.names.take(pa.array(found.codes)).to_pylist() == ["1", "true", "1", "true", "0", "false", "0", "1"]
