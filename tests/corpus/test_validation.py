"""`assay validate SCORES`: every fault that is planted is named, and a sound folder passes."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from assay.cli import main
from assay.corpus import storage, table_checks
from assay.corpus.claim import CLAIM, claim
from assay.corpus.errors import CorpusError
from assay.corpus.footer import Footer, Identity, InputFacts, RowCounts, TableColumn
from assay.corpus.layout import FITS, RETRIEVAL
from assay.corpus.score_files import ScoreWriter
from assay.corpus.scores_folder import State, open_scores
from assay.corpus.shards import find_shards
from assay.corpus.storage import Store
from assay.corpus.validation import validate_scores
from assay.engine.local import run
from assay.recipe.recipe import load_recipe
from tests.small_project import make_project, make_rows

BAD = {3: "label", 4: "label", 9: "id"}


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """Two whole shards, one with rows in quarantine, one that cannot be read."""
    project = make_project(tmp_path_factory.mktemp("scored"))
    rows = make_rows(20, 5)
    for row, column in BAD.items():
        rows[row][column] = None
    project.write_shard("bad.parquet", rows)
    (project.root / "data/torn.parquet").write_bytes(b"PAR1")
    run(load_recipe(str(project.path)))
    return project


@pytest.fixture
def copied(scored, tmp_path):
    """Scores and corpus, to be damaged."""
    for name in ("scores", "data"):
        shutil.copytree(scored.root / name, tmp_path / name)  # with their times, which fingerprints are made of
    return tmp_path


def problems(root) -> list[str]:
    found = []
    result = validate_scores(str(root / "scores"), str(root / "data"), lambda problem: found.append(str(problem)))
    assert result.problems == len(found)
    return found


def edit(root, name, change) -> None:
    path = root / "scores" / name
    pq.write_table(change(pq.read_table(path)), path)


def edit_footer(**changes):
    def change(table):
        footer = json.loads(table.schema.metadata[b"assay"])
        for key, value in changes.items():
            first, _, rest = key.partition("__")
            if rest:
                footer[first][rest] = value
            else:
                footer[first] = value
        return table.replace_schema_metadata({b"assay": json.dumps(footer)})

    return change


def without(row):
    return lambda table: pa.concat_tables([table.slice(0, row), table.slice(row + 1)])


def with_value(column, row, value):
    def change(table):
        place = table.schema.get_field_index(column)
        values = table[column].to_pylist()
        values[row] = value
        field = table.schema.field(place)
        return table.set_column(place, field, pa.array(values, field.type, from_pandas=False))

    return change


def also(*changes):
    def change(table):
        for one in changes:
            table = one(table)
        return table

    return change


def renamed(table):
    names = [name.replace("mimic", "mimicry") for name in table.column_names]
    return table.rename_columns(names).replace_schema_metadata(table.schema.metadata)


def widened(table):
    place = table.schema.get_field_index("loss")
    return table.set_column(place, pa.field("loss", pa.float64()), table["loss"].cast(pa.float64()))


def nullable(table):
    return table.cast(pa.schema([field.with_nullable(True) for field in table.schema], table.schema.metadata))


def other_keep(table):
    place = table.schema.get_field_index("rho")
    field = table.schema.field(place)
    assert field.metadata[b"keep"] == b"high"
    return table.set_column(place, field.with_metadata({**field.metadata, b"keep": b"low"}), table["rho"])


@pytest.mark.parametrize("chunk", [1024, 7])
def test_a_sound_folder_passes(copied, monkeypatch, chunk):
    monkeypatch.setattr("assay.corpus.format.CHUNK_ROWS", chunk)
    monkeypatch.setattr(table_checks, "CHUNK_ROWS", chunk + 2)
    monkeypatch.setattr(table_checks, "_BATCH_ROWS", chunk + 1)
    result = validate_scores(str(copied / "scores"), str(copied / "data"), pytest.fail)
    assert (result.shards, result.scored, result.quarantined, result.unreadable) == (4, 97, 3, 1)
    assert result.running is False


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t.take([0, 2, 1, *range(3, 50)]), ["rows are out of order: row 1 follows row 2"]),
        (
            without(7),
            [
                "holds 49 rows, but its footer counts 50 scored and 0 quarantined of 50",
                "a row is neither scored nor listed as quarantined: row 7",
            ],
        ),
        (
            also(without(49), edit_footer(input__rows=49, rows__scored=49)),
            ["counts other rows than the shard has: 49 in its footer, 50 in a.parquet"],
        ),
        (
            lambda t: pa.concat_tables([t.slice(0, 8), t.slice(7)]),
            [
                "holds 51 rows, but its footer counts 50 scored and 0 quarantined of 50",
                "rows are out of order: row 7 is there twice",
            ],
        ),
        (
            also(with_value("id", 3, "zzz"), with_value("id", 8, "\x1b[2J")),
            ["has other ids than the shard: row 3 is 'zzz', expected 's0-3', and 1 more"],
        ),
        (with_value("row", 49, 50), ["has a row that is none of the shard's: row 50 of 50", "neither", "row 50"]),
        (with_value("loss", 5, np.inf), ["loss is infinite: in row 5"]),
        (with_value("mimic", 6, -np.inf), ["mimic is infinite: in row 6"]),
        (with_value("loss", 5, np.nan), ["another number of NaN than its footer counts in loss: 1, expected 0"]),
        (with_value("loss", 5, None), ["holds a null: in loss"]),
        (also(nullable, with_value("row", 5, None)), ["holds a null: in row"]),
        (renamed, ["its columns are not the manifest's: found 'row', 'id'"]),
        (widened, ["its columns are not the manifest's: loss holds double, expected float"]),
        (other_keep, ["says other things of its columns than the manifest: rho"]),
        (edit_footer(recipe__seed=7), ["another recipe's, model's or target's than the folder's: seed: 7 → 0", "hash"]),
        (edit_footer(models__ref="sha256:0"), ["weights of models.ref: sha256:0 → sha256:"]),
        (edit_footer(input__path="other.parquet"), ["is the table of 'other.parquet', not of a.parquet"]),
        (edit_footer(input__size=1), ["a.parquet has changed since it was scored"]),
        (
            edit_footer(input__size=1, input__rows=1 << 60),
            ["changed", "footer counts 50"],
        ),
    ],
)
def test_a_damaged_table_is_named_with_what_is_wrong(copied, change, expected):
    edit(copied, "a.parquet", change)
    found = problems(copied)
    assert found
    assert all(line.startswith("a.parquet: ") for line in found)
    assert [part for part in expected if not any(part in line for line in found)] == [], found
    assert "\x1b" not in "".join(found)


@pytest.mark.parametrize("damage", ["end", "middle", "foreign", "another shard's"])
def test_bytes_that_are_no_table_of_the_shard(copied, damage):
    path = copied / "scores/a.parquet"
    content = bytearray(path.read_bytes())
    if damage == "end":
        path.write_bytes(content[:-50])
    elif damage == "middle":
        content[40:200] = bytes(160)
        path.write_bytes(content)
    elif damage == "foreign":
        pq.write_table(pa.table({"x": [1]}), path)
    else:
        shutil.copy(copied / "scores/bad.parquet", path)
    found = problems(copied)
    words = {
        "end": "not a readable score table",
        "middle": "cannot be read to its end",
        "foreign": "not a score table",
        "another shard's": "is the table of 'bad.parquet', not of a.parquet",
    }
    assert found[0].startswith("a.parquet: ")
    assert words[damage] in found[0]


def rewrite_list(root, change) -> None:
    """Change a list of quarantined rows and, so that it is found by its rows, what the footer says of it."""
    path = root / "scores/quarantine/bad.jsonl"
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in change(entries)))
    digest = Store.at(str(root / "scores")).sha256("quarantine/bad.jsonl")
    edit(root, "bad.parquet", edit_footer(quarantine=f"sha256:{digest}"))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda e: e[1:], "a row is neither scored nor listed as quarantined: row 3"),
        (lambda e: [{**e[0], "row": 2}, *e], "a row has scores and is listed as quarantined too: row 2"),
        (lambda e: [*e, {**e[0], "row": 25}], "a row is listed as quarantined that the shard has not: row 25 of 20"),
        (lambda e: [*e, {**e[0], "row": 10, "last": 1 << 60}], "has scores and is listed as quarantined too: row 10"),
        (lambda e: [{**e[0], "id": "zzz"}, *e[1:]], "listed under another id: row 3 is 'zzz', expected 's5-3'"),
        (lambda e: [{**e[0], "shard": "a.parquet"}, *e[1:]], "an entry out of place: row 3 of 'a.parquet'"),
        (lambda e: [{**e[0], "row": None}, *e], "an entry out of place: the whole shard"),
        (lambda e: [e[1], e[0], *e[2:]], "its list of quarantined rows is out of order: row 3 follows row 4"),
        (lambda e: [{**e[0], "row": -2}, *e], "its list of quarantined rows is out of order: row -2"),
        (lambda e: [{**e[0], "id": None, "row": 0, "last": 19}] * 9, "is out of order: row 0 follows row 19"),
        (lambda e: [{"row": 3}], "not a list of quarantined rows"),
    ],
)
def test_a_list_of_quarantined_rows_belongs_to_its_table(copied, change, expected):
    rewrite_list(copied, change)
    assert any(expected in line and line.startswith("bad.parquet: ") for line in problems(copied))


def test_a_list_that_is_gone_or_anothers_is_named(copied):
    path = copied / "scores/quarantine/bad.jsonl"
    path.write_text(path.read_text().replace("label is null", "label is zero"))
    assert problems(copied) == [
        "bad.parquet: quarantine/bad.jsonl is not the list of quarantined rows that was written with it"
    ]
    path.unlink()
    assert "neither scored nor listed as quarantined: row 3, and 2 more" in problems(copied)[1]


def test_shards_that_changed_vanished_or_were_never_scored(copied):
    os.utime(copied / "data/a.parquet")
    (copied / "data/bad.parquet").unlink()
    (copied / "data/new.jsonl").write_text("{}\n")
    (copied / "data/strange.lz4").write_bytes(b"")
    found = problems(copied)
    assert found[0].startswith("strange.lz4: is not read, and has no scores")
    assert found[1:] == [
        "a.parquet: a.parquet has changed since it was scored",
        "new.parquet: new.jsonl has no score table; finish the run with `assay score`",
        "bad.parquet: is a score table without a shard",
        "quarantine/bad.jsonl: is a list of quarantined rows without a shard",
    ]


def test_rows_in_another_order_are_seen_where_no_fingerprint_tells(copied):
    path = copied / "data/deep/b.jsonl"
    before = path.stat()
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:4], lines[5], lines[4], *lines[6:]]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert problems(copied) == [
        "deep/b.parquet: has other ids than the shard: row 4 is 's1-4', expected 's1-5', and 1 more"
    ]
    path.write_text("".join(lines[:-1]).rstrip("\n") + " " * len(lines[-1]) + "\n")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert "30 in its footer, 29 in deep/b.jsonl" in problems(copied)[0]


def test_what_killed_runs_left_is_named_unless_one_is_running(copied):
    scores = copied / "scores"
    young, old = scores / f".{'1' * 32}.tmp", scores / f"deep/.{'2' * 32}.tmp"
    fits = [scores / RETRIEVAL / FITS / "key/0.pt", scores / FITS / "key/0.pt", scores / FITS / "key/1.pt"]
    for path in (young, old, scores / CLAIM, scores / "quarantine/none.jsonl", *fits):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    os.utime(old, (0, 0))
    assert [line.partition(": ")[0] for line in problems(copied)] == [
        young.name,
        f"deep/{old.name}",
        CLAIM,
        FITS,
        f"{RETRIEVAL}/{FITS}",
        "quarantine/none.jsonl",
    ]
    assert (
        ".fit: holds 2 parts of fits, of a run that goes on, was killed or was over a part of the shards; a later run"
        in str(problems(copied))
    )
    with claim(Store.at(str(scores)), "a run", shared=True):
        assert [line.partition(": ")[0] for line in problems(copied)] == [f"deep/{old.name}", "quarantine/none.jsonl"]


def test_ids_made_of_rows_lists_and_features(project, monkeypatch):
    """Without an id column, with scores of several numbers, and with stored features."""
    sketch = {"kind": "kronecker", "rows": 2, "cols": 2}
    trak = {"method": "trak", "models": ["a"], "sketch": sketch, "keep_features": "float32", "targets": ["t"]}
    project.write_recipe(
        corpus={"path": "data", "id_column": None},
        methods=[{"method": "ensemble", "models": ["a", "b"]}, trak],
        targets={"t": {"path": "data/a.parquet"}},
    )
    run(load_recipe(str(project.path)))
    assert problems(project.root) == []
    (project.root / "data/deep/b.jsonl").unlink()
    assert problems(project.root) == [
        "deep/b.parquet: is a score table without a shard",
        "features/trak/0/deep/b.arrow: are features without a shard",
    ]


@pytest.mark.parametrize("kind", [pa.list_(pa.float32()), pa.list_(pa.float32(), 2)])
def test_numbers_of_lists(kind):
    nan, inf = np.nan, np.inf
    rows = [[1.0, nan], [nan, nan], [inf, 1.0], [2.0, 3.0], [-inf, nan]]
    array = pa.array([[0.0, 0.0], *rows], kind).slice(1)
    faults = table_checks._Faults()
    count = table_checks._check_numbers("x", array, np.arange(10, 15), faults)
    assert count == (3 if pa.types.is_fixed_size_list(kind) else 1)
    assert faults.lines() == ["x is infinite: in row 12, and 1 more"]


class Failing(io.BytesIO):
    """An open file that cannot be read just now."""

    def read(self, size=-1):
        raise OSError(errno.EIO, "planted")

    readinto = readline = read1 = read


@pytest.fixture
def plant(monkeypatch):
    """A fault of storage: of a file that is opened, or read, or read when its footer has been; or of a folder that is
    listed."""
    opened, files, faulty = storage._open_regular, Store.files, {}

    def open_regular(full):
        how = next((how for end, how in faulty.items() if full.endswith(end)), None)
        if how == "opened":
            raise TimeoutError(errno.ETIMEDOUT, "planted", full)
        if how == "rows":
            faulty[next(end for end in faulty if full.endswith(end))] = "read"
        if how != "read":
            return opened(full)
        with opened(full) as file:
            return Failing(file.read())

    def listed(store):
        if any(how == "listed" and store.root.endswith(end) for end, how in faulty.items()):
            raise OSError(errno.ESTALE, "planted", store.root)
        return files(store)

    monkeypatch.setattr(storage, "_open_regular", open_regular)
    monkeypatch.setattr(Store, "files", listed)
    return faulty


@pytest.mark.parametrize(
    ("end", "how", "named"),
    [
        ("scores/a.parquet", "opened", "a.parquet: could not be checked ([Errno 110] planted"),
        ("scores/a.parquet", "rows", "a.parquet: could not be checked ([Errno 5] planted"),
        ("data/a.parquet", "opened", "a.parquet: could not be checked ([Errno 110] planted"),
        ("data/deep/b.jsonl", "read", "deep/b.parquet: could not be checked ([Errno 5] planted"),
        ("quarantine/torn.jsonl", "opened", "torn.parquet: could not be checked ([Errno 110] planted"),
        ("scores", "listed", "scores: what lies about besides could not be listed ([Errno 116] planted"),
    ],
)
def test_storage_that_fails_costs_one_table_and_the_rest_is_checked(copied, plant, capsys, end, how, named):
    edit(copied, "bad.parquet", with_value("loss", 2, np.inf))
    plant[end] = how
    arguments = ["validate", str(copied / "scores"), "--corpus", str(copied / "data")]
    assert main(arguments) == 1
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert sum(named in line and line.endswith("; validate again") for line in lines) == 1
    assert "bad.parquet: loss is infinite: in row 2" in lines
    assert said.err.endswith("scores: 2 problems\n")
    assert ("1 tables could not be checked" in said.out) == (how != "listed")
    plant[end] = how
    assert main([*arguments, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["unchecked"] == (how != "listed")
    plant.clear()
    assert problems(copied) == ["bad.parquet: loss is infinite: in row 2"]


@pytest.mark.parametrize(
    ("end", "how", "shard"),
    [
        ("scores/a.parquet", "opened", "a.parquet"),
        ("scores/deep/b.parquet", "read", "deep/b.jsonl"),
        ("quarantine/torn.jsonl", "opened", "torn.parquet"),
        ("quarantine/bad.jsonl", "opened", "bad.parquet"),
    ],
)
def test_what_reads_a_folder_goes_on_too_and_what_decides_by_it_does_not(copied, plant, capsys, end, how, shard):
    plant[end] = how
    url, by, there = str(copied / "scores"), ["--by", "loss", "--keep", "low"], ["--corpus", str(copied / "data")]
    scores = open_scores(url, there[1])
    (unknown,) = scores.of(State.UNKNOWN)
    assert unknown.shard.path == shard
    assert "planted" in unknown.detail
    assert len(scores.of(State.DONE)) + len(scores.of(State.UNREADABLE)) == 3
    assert main(["ls", url, *there]) == 1
    said = capsys.readouterr()
    assert "1 unknown" in said.out
    assert f"1 shards could not be looked at; try again ({shard}: storage failed" in said.err
    assert main(["show", url, *by, "--best", "1", *there]) == 1
    assert f" shards are not in it ({shard}: storage failed" in capsys.readouterr().err
    command = ["select", url, *by, "--top", "3", "--out", str(copied / "out"), *there]
    assert main(command) == 2
    assert f"1 of 4 shards could not be looked at; try again ({shard}: storage failed" in capsys.readouterr().err
    assert not (copied / "out").exists()
    plant.clear()
    assert main(command) == 1  # of one shard that cannot be read


def test_the_command(copied, capsys, monkeypatch):
    scores, corpus = str(copied / "scores"), ["--corpus", str(copied / "data")]
    assert main(["validate", scores, *corpus]) == 0
    assert "fine; 4 shards (1 unreadable), rows 100 = scored 97 + quarantined 3" in capsys.readouterr().out
    edit(copied, "a.parquet", with_value("loss", 5, np.inf))
    edit(copied, "bad.parquet", with_value("id", 0, "evil\x1b[31m"))
    assert main(["validate", scores, *corpus]) == 1
    said = capsys.readouterr()
    assert said.out.splitlines()[0] == "a.parquet: loss is infinite: in row 5"
    assert "\x1b" not in said.out + said.err
    assert said.err.endswith("scores: 2 problems\n")
    assert main(["validate", scores, *corpus, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [problem["path"] for problem in found["problems"]] == ["a.parquet", "bad.parquet"]
    assert (found["shards"], found["scored"], found["quarantined"], found["unreadable"]) == (4, 97, 3, 1)
    monkeypatch.setattr("assay.cli.recipes._LISTED_PROBLEMS", 1)
    assert main(["validate", scores, *corpus]) == 1
    assert "… and 1 more (--json lists all)" in capsys.readouterr().out


def test_a_url_and_what_is_neither(copied, capsys):
    import fsspec

    fs = fsspec.filesystem("memory")
    fs.put(str(copied / "scores"), "/validated/scores", recursive=True)
    with Store.at("memory://validated/scores").open("manifest.json") as file:
        assert file.read(1) == b"{"
    assert main(["validate", "memory://validated/scores", "--corpus", str(copied / "data")]) == 0
    capsys.readouterr()
    for arguments, message in (
        ([str(copied / "data")], "no manifest.json; expected a folder of `assay score`"),
        ([str(copied / "scores"), "--set", "seed=1"], "--set and --trust are for a recipe"),
        ([str(copied / "nowhere.yaml")], "cannot be read"),
        ([str(copied / "nowhere.yaml"), "--json"], "is not a folder of scores"),
    ):
        assert main(["validate", *arguments]) == 2
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1


def test_a_manifest_whose_columns_no_table_can_have(copied):
    path = copied / "scores/manifest.json"
    manifest = json.loads(path.read_text())
    manifest["columns"] += [{"name": "row"}]
    path.write_text(json.dumps(manifest))
    with pytest.raises(CorpusError, match=r"manifest\.json: score column 'row' appears twice"):
        problems(copied)


@pytest.mark.slow
def test_memory_does_not_follow_the_rows(tmp_path):
    """After a small table, one of ten times the rows takes no more."""
    folders = [large_scores(tmp_path / str(rows), rows) for rows in (100_000, 1_000_000)]
    command = [sys.executable, "-c", GROWTH, *folders]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert grown < 30_000  # kilobytes; pyarrow's default holds all 35 MB of the larger one


GROWTH = """
import sys
from assay.corpus.validation import validate_scores

def kilobytes(what):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(what))

assert not validate_scores(sys.argv[1]).problems
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak is from now on
before = kilobytes("VmRSS:")
assert not validate_scores(sys.argv[2]).problems
print(kilobytes("VmHWM:") - before)
"""


def large_scores(root, rows: int) -> str:
    """A folder about a shard of so many rows, made without a recipe or a model."""
    (root / "data").mkdir(parents=True)
    pq.write_table(pa.table({"n": np.arange(rows)}), root / "data/a.parquet")
    (shard,) = find_shards(str(root / "data")).shards
    columns = [TableColumn(name=f"s{i}") for i in range(8)]
    identity, store = Identity(recipe={"seed": 0, "id_column": None}, models={}), Store.at(str(root / "scores"))
    with tempfile.TemporaryFile() as spool:
        writer = ScoreWriter(columns, spool)
        for first in range(0, rows, 10_000):
            own = np.arange(first, first + 10_000)
            scores = {column.name: np.sin(own * 7.0).astype(np.float32) for column in columns}
            writer.add(own, [f"a.parquet:{row}" for row in own], scores)
        facts = InputFacts(path="a.parquet", rows=rows, **vars(shard.fingerprint()))
        counts = RowCounts(scored=rows, quarantined=0)
        writer.save(store, "a.parquet", Footer.make(identity, facts, counts, None, {}, {}).to_json())
    manifest = identity.model_dump() | {"corpus": str(root / "data"), "columns": [c.model_dump() for c in columns]}
    store.write_text("manifest.json", json.dumps(manifest))
    return store.root
