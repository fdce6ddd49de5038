"""A selection over all shards: the chosen rows, in their own format, and a reason for each of the others."""

from __future__ import annotations

import hashlib
import json
import os
import shutil

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from assay import select
from assay.corpus.errors import CorpusError
from assay.corpus.storage import temporary_name
from assay.curate import chosen, forms
from assay.curate.curation import curate
from assay.curate.rules import RuleOptions
from assay.engine.local import run
from assay.recipe.recipe import load_recipe
from tests.small_project import make_rows
from tests.small_scores import make_scores


def scored(project, *overrides):
    """Two good shards, one with bad rows, one unreadable; scored."""
    rows = make_rows(20, 5)
    rows[0]["label"] = None
    rows[7]["id"] = None
    rows[19]["pixels"] = [1.0]
    project.write_shard("bad.jsonl", rows)
    (project.root / "data/torn.parquet").write_bytes(b"PAR1")
    run(load_recipe(str(project.path), overrides))
    return str(project.scores)


def top(share):
    return lambda table: select.top(table, "mimic", share)


def kept_ids(folder) -> list[str]:
    """The ids of every row of a curated folder, in order."""
    ids = []
    for path in sorted(folder.rglob("*")):
        if path.is_dir() or path.name == "manifest.json" or "_selection" in path.parts:
            continue
        if path.suffix == ".parquet":
            ids += pq.read_table(path)["id"].to_pylist()
        else:
            ids += [json.loads(line)["id"] for line in path.read_text().splitlines()]
    return sorted(ids)


def test_the_best_over_all_shards_are_written_in_their_formats(project):
    scores = scored(project)
    out = project.root / "out"
    curated = curate(scores, "mimic", top(0.5), str(out))
    tables = [pq.read_table(p) for p in sorted(project.scores.rglob("*.parquet"))]
    ids = np.concatenate([t["id"].to_numpy(zero_copy_only=False) for t in tables])
    mimic = np.concatenate([t["mimic"].to_numpy() for t in tables])
    assert (curated.rows, curated.kept, curated.quarantined) == (
        100,
        49,
        3,
    )  # half of the 97 that have scores
    assert kept_ids(out) == sorted(ids[np.argsort(-mimic, kind="stable")[:49]])
    assert {str(p.relative_to(out)) for p in out.rglob("*.*") if "_selection" not in p.parts} == {
        "a.parquet",
        "bad.jsonl",
        "deep/b.jsonl",
        "manifest.json",
    }
    originals = (project.root / "data/deep/b.jsonl").read_text().splitlines()
    assert set((out / "deep/b.jsonl").read_text().splitlines()) < set(originals)
    assert set(curated.unreadable) == {"torn.parquet"}


def test_every_row_has_its_fate_and_reason(project):
    scores = scored(project)
    out = project.root / "out"
    curate(scores, "mimic", top(10), str(out))
    fates = pq.read_table(out / "_selection/bad.parquet").to_pylist()
    assert [fate["row"] for fate in fates] == list(range(20))
    assert [fate["id"] for fate in fates] == [None if i == 7 else f"s5-{i}" for i in range(20)]
    assert fates[0] | {"kept": False, "mimic": None, "reason": "quarantined: label is null"} == fates[0]
    assert fates[19]["reason"] == "quarantined: pixels holds 1 numbers, expected 6"
    reasons = {fate["reason"] for i, fate in enumerate(fates) if i not in (0, 7, 19)}
    assert reasons <= {"kept: among the 10 highest of mimic", "dropped: not among the 10 highest of mimic"}
    for name in ("a", "deep/b", "bad"):
        table = pq.read_table(out / f"_selection/{name}.parquet")
        source = pq.read_table(project.scores / f"{name}.parquet")
        rows = source["row"].to_numpy()
        np.testing.assert_array_equal(table["mimic"].to_numpy()[rows], source["mimic"].to_numpy())


def test_the_manifest_answers_which_rows_why_and_from_what(project):
    scores = scored(project)
    out = project.root / "out"
    curated = curate(scores, "mimic", top(0.25), str(out))
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["rule"] == "mimic, highest 0.25"
    assert manifest["threshold"] == pytest.approx(curated.selection.threshold)
    assert manifest["rows"] == {"in": 100, "kept": 24, "quarantined": 3}
    assert {s["path"]: s["rows"] for s in manifest["shards"]} == {
        "a.parquet": 50,
        "bad.jsonl": 20,
        "deep/b.jsonl": 30,
    }
    assert all(s["rows"] == s["kept"] + s["dropped"] + s["quarantined"] for s in manifest["shards"])
    assert all(len(s["table_sha256"]) == 64 for s in manifest["shards"])
    assert set(manifest["models"]) == {"a", "b", "ref"}


def test_a_curated_corpus_is_a_corpus(project):
    scores = scored(project)
    curate(scores, "mimic", top(0.5), str(project.root / "out"))
    report = run(load_recipe(str(project.path), ["corpus.path=out", "output=again"]))
    assert report.clean
    assert report.rows == 49


def test_a_saved_data_set_stays_one(project):
    split = datasets.Dataset.from_list(make_rows(40, 6))
    split.save_to_disk(str(project.root / "saved"), num_shards=2)
    run(load_recipe(str(project.path), ["corpus.path=saved"]))
    curated = curate(str(project.scores), "mimic", top(0.5), str(project.root / "out"))
    kept = datasets.load_from_disk(str(project.root / "out"))
    assert len(kept) == curated.kept == 20
    assert set(kept["id"]) < set(split["id"])
    assert kept.features == split.features


def test_weights_are_written_where_a_rule_has_them(project):
    scores = scored(project)
    curate(scores, "loss", lambda table: select.gmm(table, "loss", keep="low"), str(project.root / "out"))
    table = pq.read_table(project.root / "out/_selection/a.parquet")
    weights, kept = table["weight"].to_numpy(), table["kept"].to_numpy()
    assert ((weights > 0.5) == kept).all()
    assert pq.read_table(project.root / "out/_selection/bad.parquet")["weight"].null_count == 3


def test_the_same_selection_writes_the_same_bytes_over_itself(project):
    scores = scored(project)
    out = project.root / "out"
    contents = []
    for _ in range(2):
        curate(scores, "mimic", lambda table: select.random(table, 0.5, seed=1), str(out))
        contents.append({str(p): p.read_bytes() for p in sorted(out.rglob("*.*"))})
    assert contents[0] == contents[1]


def test_a_crash_leaves_no_manifest_to_trust(project, monkeypatch):
    scores = scored(project)
    out = project.root / "out"
    curate(scores, "mimic", top(0.5), str(out))

    def fail(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr("assay.curate.forms.copy_rows", fail)
    with pytest.raises(OSError, match="disk full"):
        curate(scores, "mimic", top(0.25), str(out))
    assert not (out / "manifest.json").exists()


def test_a_folder_with_other_files_is_refused(project):
    scores = scored(project)
    (project.root / "out").mkdir()
    (project.root / "out/old.parquet").write_bytes(b"")
    with pytest.raises(CorpusError, match=r"holds 1 files that this selection would not write \(old\.parquet\)"):
        curate(scores, "mimic", top(0.5), str(project.root / "out"))
    with pytest.raises(CorpusError, match=r"out/old\.parquet: is a file; choose an empty folder"):
        curate(scores, "mimic", top(0.5), str(project.root / "out/old.parquet"))


@pytest.mark.parametrize("out", ["data", "data/out", "."])
def test_the_corpus_is_never_written_over(project, out):
    scores = scored(project)
    before = (project.root / "data/a.parquet").read_bytes()
    with pytest.raises(CorpusError):
        curate(scores, "mimic", top(0.5), str(project.root / out))
    assert (project.root / "data/a.parquet").read_bytes() == before


def change_input(project):
    os.utime(project.root / "data/a.parquet")


def add_shard(project):
    project.write_shard("new.jsonl", make_rows(3, 9))


def lose_table(project):
    os.remove(project.scores / "a.parquet")


def mix_recipes(project):
    saved = (project.scores / "a.parquet").read_bytes()
    run(load_recipe(str(project.path), ["seed=1"]), rescore=True)
    (project.scores / "a.parquet").write_bytes(saved)


def break_rows(project):
    path = project.scores / "a.parquet"
    table = pq.read_table(path)
    pq.write_table(table.take(list(range(49, -1, -1))), path)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (change_input, r"1 of 4 shards do not match their score table.*a\.parquet: the file has changed"),
        (add_shard, r"1 of 5 shards have no score table.*new\.jsonl"),
        (lose_table, r"1 of 4 shards have no score table.*a\.parquet"),
        (mix_recipes, r"1 of 4 shards do not match.*seed: 0 → 1"),
        (break_rows, "its rows do not ascend"),
    ],
)
def test_scores_that_do_not_cover_the_corpus_are_refused(project, harm, message):
    scores = scored(project)
    harm(project)
    with pytest.raises(CorpusError, match=message):
        curate(scores, "mimic", top(0.5), str(project.root / "out"))
    assert not (project.root / "out").exists()


@pytest.mark.parametrize("rule", [{"random": "1"}, {"where": "mimic > 0"}, {"top": "1", "by": "mimic"}])
def test_a_seed_below_0_is_none(rule):
    with pytest.raises(CorpusError, match="--seed -1: expected 0 or more"):
        RuleOptions(**rule, seed=-1).rule()


def test_unknown_scores_and_folders_are_named(project):
    scores = scored(project)
    with pytest.raises(CorpusError, match=r"--by mimics: .* has no such score; did you mean mimic"):
        curate(scores, "mimics", top(0.5), str(project.root / "out"))
    with pytest.raises(CorpusError, match=r"no manifest\.json"):
        curate(str(project.root / "data"), "mimic", top(0.5), str(project.root / "out"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "expected exactly one of --top.*got none"),
        ({"top": "1", "gmm": True, "by": "s"}, "got --top, --gmm"),
        ({"top": "0.5"}, "--by is missing"),
        ({"top": "half", "by": "s"}, "'half' is no amount"),
        ({"top": "0", "by": "s"}, r"'0' selects nothing; expected rows \(1000\) or a share \(0\.5\) of at most 1\.0"),
        *(({"top": text, "by": "s"}, f"'{text}' is no amount; expected rows") for text in ("-5", "1e3", "1.5", "nan")),
        ({"random": "0.0"}, r"'0\.0' selects nothing"),
        ({"top": "0.5", "by": "s", "keep": "best"}, "--keep best"),
        ({"top": "0.5", "by": "s", "temperature": 0.5}, "--temperature 0.5: has no effect with --top"),
    ],
)
def test_rule_options_are_checked(options, message):
    with pytest.raises(CorpusError, match=message):
        RuleOptions(**options).rule()


@pytest.mark.parametrize(
    "options", [{"top": "1e-4"}, {"random": "1e-4"}, {"sample": "1e-4"}, {"ccs": "1e-4", "hard": "low"}]
)
def test_a_share_of_no_row_is_refused(options):
    table = pa.table({"mimic": pa.array([0.5, 2.0, 1.0], pa.float32())})
    with pytest.raises(CorpusError, match=r"0\.0001 of 3 rows is none; expected a larger share, or a number of rows"):
        RuleOptions(**options, by="mimic", keep=None if "ccs" in options else "high").rule()(table)


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"top": "0.5"}, lambda t: select.top(t, "mimic", 0.5)),
        ({"top": "1"}, lambda t: select.top(t, "mimic", 1)),
        ({"top": "1.0", "keep": "low"}, lambda t: select.top(t, "mimic", 1.0, keep="low")),
        ({"threshold": 0.0}, lambda t: select.threshold(t, "mimic", 0.0)),
        ({"quantile": 0.9}, lambda t: select.quantile(t, "mimic", 0.9)),
        ({"gmm": True}, lambda t: select.gmm(t, "mimic")),
        ({"kmeans": True}, lambda t: select.kmeans(t, "mimic")),
        ({"random": "5", "seed": 3}, lambda t: select.random(t, 5, 3)),
        ({"sample": "5", "temperature": 1.0}, lambda t: select.sample(t, "mimic", 5, 0, 1.0)),
    ],
)
def test_options_name_the_rules_of_the_library(project, options, rule):
    run(load_recipe(str(project.path)))
    table = pq.read_table(project.scores / "a.parquet")
    expected, got = rule(table), RuleOptions(**options, by="mimic").rule()(table)
    np.testing.assert_array_equal(got.mask, expected.mask)
    assert got.rule == expected.rule


def contents(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize(
    ("corpus", "out"),
    [
        ("data", "alias"),  # the output is a link to the corpus
        ("alias", "data"),  # the corpus was given as a link
        ("alias/*.parquet", "data"),  # or as a glob behind one
        ("data", "parent/data"),  # a link further up
        ("data", "alias/out"),
        ("linked", "data"),  # the corpus's files are links
        ("linked", "alias"),
    ],
)
def test_no_name_of_the_corpus_leads_to_its_being_written_over(project, corpus, out):
    (project.root / "alias").symlink_to("data")
    (project.root / "parent").symlink_to(project.root)
    (project.root / "linked").mkdir()
    (project.root / "linked/a.parquet").symlink_to("../data/a.parquet")
    before = contents(project.root / "data")
    with pytest.raises(CorpusError, match="must not lie in each other"):
        run(load_recipe(str(project.path), [f"corpus.path={corpus}", f"output={out}"]))
    assert contents(project.root / "data") == before
    run(load_recipe(str(project.path), [f"corpus.path={corpus}"]))
    with pytest.raises(CorpusError, match="must not lie in each other"):
        curate(str(project.scores), "mimic", top(0.5), str(project.root / out))
    assert contents(project.root / "data") == before


def test_what_a_selection_writes_is_no_part_of_a_corpus_named_by_a_glob(project):
    (project.root / "data/a.parquet").rename(project.root / "data/deep/a.parquet")
    run(load_recipe(str(project.path), ["corpus.path=data/**/a.parquet"]))
    with pytest.raises(CorpusError, match="must not lie in each other"):
        curate(str(project.scores), "mimic", top(0.5), str(project.root / "data/kept"))
    assert not (project.root / "data/kept").exists()


def test_a_corpus_that_was_copied_is_not_written_over_either(project):
    scores, copied = scored(project), project.root / "copied"
    shutil.copytree(project.root / "data", copied)
    before = contents(project.root / "data")
    with pytest.raises(CorpusError, match="data must not lie in each other"):
        curate(scores, "mimic", top(0.5), str(project.root / "data/in"), corpus_path=str(copied))
    assert contents(project.root / "data") == before
    curate(scores, "mimic", top(0.5), str(project.root / "out"), corpus_path=str(copied))


@pytest.mark.parametrize("folder", ["deep", "_selection", "_selection/deep"])
def test_no_link_inside_the_output_leads_anywhere_else(project, folder):
    scores = scored(project)
    link = project.root / "out" / folder
    link.parent.mkdir(parents=True)
    link.symlink_to(project.root / "data/deep")
    before = contents(project.root / "data")
    with pytest.raises(CorpusError, match=rf"{folder}: leads to .*data/deep, out of .*; remove the link"):
        curate(scores, "mimic", top(0.5), str(project.root / "out"))
    assert contents(project.root / "data") == before


@pytest.mark.parametrize("out", ["scores", "scores/curated", "scores_alias"])
def test_the_scores_are_never_written_over(project, out):
    scores = scored(project)
    (project.root / "scores_alias").symlink_to("scores")
    before = contents(project.scores)
    with pytest.raises(CorpusError, match="lies among the scores"):
        curate(scores, "mimic", top(0.5), str(project.root / out))
    assert contents(project.scores) == before


def test_two_selections_do_not_write_into_one_folder(project, monkeypatch):
    scores, out = scored(project), project.root / "out"
    monkeypatch.setattr("assay.corpus.claim._PATIENCE_SECONDS", 0.1)
    original, refused = forms.copy_rows, []

    def beside(*arguments):
        """Another selection starts while this one writes."""
        if not refused:
            with pytest.raises(CorpusError, match="another run or selection is writing into this folder") as caught:
                curate(scores, "mimic", top(0.9), str(out))
            refused.append(caught)
        return original(*arguments)

    monkeypatch.setattr(forms, "copy_rows", beside)
    curated = curate(scores, "mimic", top(0.5), str(out))
    assert refused
    assert len(kept_ids(out)) == curated.kept
    assert not (out / ".assay.lock").exists()


@pytest.mark.parametrize("options", [{"threshold": 1e9}, {"threshold": -1e9, "keep": "low"}])
def test_a_rule_that_keeps_nothing_is_an_error_and_loses_nothing(project, options):
    scores, out = scored(project), project.root / "out"
    curate(scores, "mimic", top(0.5), str(out))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(CorpusError, match=r"kept 0 of 97 rows .*: no row is kept, and nothing was written"):
        curate(scores, "mimic", RuleOptions(by="mimic", **options).rule(), str(out))
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_temporaries_of_killed_selections_are_swept(project):
    scores, out = scored(project), project.root / "out"
    out.mkdir()
    old, young = out / temporary_name(), out / temporary_name()
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    curate(scores, "mimic", top(0.5), str(out))
    assert (old.exists(), young.exists()) == (False, True)


@pytest.mark.parametrize("manifest", [None, "{}", '{"rule": 1}'])
def test_another_corpus_with_the_same_names_is_never_written_over(project, manifest):
    """A second version of the corpus, say: nothing in it says that a selection wrote it."""
    scores, other = scored(project), project.root / "other"
    (other / "deep").mkdir(parents=True)
    (other / "a.parquet").write_bytes(b"mine")
    if manifest is not None:
        (other / "manifest.json").write_text(manifest)
    with pytest.raises(CorpusError, match="which no selection wrote"):
        curate(scores, "mimic", top(0.5), str(other))
    assert (other / "a.parquet").read_bytes() == b"mine"
    out = str(project.root / "out")
    curate(scores, "mimic", top(0.5), out)
    assert curate(scores, "mimic", top(0.2), out).kept  # its own files it replaces


def test_targets_are_never_written_over(project):
    project.write_shard("../target/a.parquet", make_rows(9, 9))
    methods = [{"method": "trak", "models": ["a"], "sketch": {"kind": "kronecker", "rows": 2, "cols": 2}}]
    project.write_recipe(methods=methods, targets={"t": {"path": "target"}})
    scores = str(project.scores)
    run(load_recipe(str(project.path)))
    for out in ("target", "target/out", "."):
        with pytest.raises(CorpusError, match="must not lie in each other"):
            curate(scores, "trak", top(0.5), str(project.root / out))


@pytest.mark.parametrize("damage", ["lost", "another row", "a row more"])
def test_the_list_of_quarantined_rows_must_be_the_tables(project, damage):
    scores = scored(project)
    path = project.scores / "quarantine/bad.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    if damage == "lost":
        path.unlink()
    else:
        entry = json.loads(lines[0]) | {"row": 3}
        kept = lines[1:] if damage == "another row" else lines
        path.write_text("".join([*kept, json.dumps(entry) + "\n"]))
    out = project.root / "out"
    with pytest.raises(CorpusError, match=r"quarantine/bad\.jsonl is not the list that was written with its table"):
        curate(scores, "mimic", top(0.5), str(out))
    table = pq.read_table(project.scores / "bad.parquet")  # whose footer knows the list by its digest
    footer = json.loads(table.schema.metadata[b"assay"])
    footer["quarantine"] = f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}" if path.exists() else None
    pq.write_table(table.replace_schema_metadata({b"assay": json.dumps(footer)}), project.scores / "bad.parquet")
    with pytest.raises(CorpusError, match=r"quarantine/bad\.jsonl: not the list of the rows that bad\.jsonl lacks"):
        curate(scores, "mimic", top(0.5), str(out))
    assert not out.exists()


@pytest.mark.parametrize("form", ["shards", "indices", "weights"])
def test_blocks_of_rows_change_nothing(form, tmp_path, monkeypatch):
    """Rows in quarantine at the borders of blocks, whole blocks of them, and a shard that has nothing else."""
    rng = np.random.default_rng(0)
    values = {"x": rng.normal(size=50), "y": rng.normal(size=3)}
    without = {"x": [0, 6, 7, *range(14, 28), 49], "y": [0, 1, 2]}
    scores = make_scores(tmp_path, {stem: {"s": v.astype(np.float32)} for stem, v in values.items()}, without=without)
    rule = RuleOptions(
        by="s", top="0.5", weigh=form == "weights", temperature=1.0 if form == "weights" else None
    ).rule()
    curate(scores, "s", rule, str(tmp_path / "one"), form=form)
    monkeypatch.setattr(chosen, "BLOCK_ROWS", 7)
    monkeypatch.setattr(forms, "BLOCK_ROWS", 7)
    curate(scores, "s", rule, str(tmp_path / "many"), form=form)
    paths = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.parquet"))
    assert len(paths) == 4
    for path in paths:
        assert pq.read_table(tmp_path / "one" / path).equals(pq.read_table(tmp_path / "many" / path)), path
    fates = pq.read_table(tmp_path / "many/_selection/x.parquet").to_pylist()
    bad = [fate["row"] for fate in fates if fate["reason"] == "quarantined: bad"]
    assert bad == without["x"]
    kept = [fate["row"] for fate in fates if fate["kept"]]
    scored = np.setdiff1d(np.arange(50), without["x"])
    assert kept == sorted(scored[np.argsort(-values["x"][scored].astype(np.float32), kind="stable")[:16]])
