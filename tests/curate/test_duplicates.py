"""Copies and near copies across shards, by signatures, against comparing every pair."""

from __future__ import annotations

import json
import random

import numpy as np
import pyarrow.parquet as pq
import pytest

from assay.cli import main
from assay.corpus.errors import CorpusError
from assay.corpus.scores_folder import State, open_scores
from assay.curate import RuleOptions, curate, find_duplicates
from assay.curate.duplicates import Duplicates, _groups
from assay.engine.local import run
from assay.recipe.recipe import load_recipe
from tests.small_project import Project

COPY, NEAR, FAR, SHORT, WORDLESS = "copy", "near", "far", "short", "..."


def text(rng: random.Random, words: int = 120) -> list[str]:
    return [f"w{rng.randrange(5000)}" for _ in range(words)]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    rng = random.Random(0)
    plain = [text(rng) for _ in range(30)]
    near, far = list(plain[3]), plain[5][:60] + text(rng, 60)
    near[60] = "changed"
    first = [{"id": f"a{i}", "text": " ".join(words)} for i, words in enumerate(plain[:20])]
    first.append({"id": "null", "text": None})
    second = [{"id": f"b{i}", "text": " ".join(words)} for i, words in enumerate(plain[20:])]
    second += [
        {"id": COPY, "text": " ".join(plain[1]).upper() + " "},
        {"id": NEAR, "text": " ".join(near)},
        {"id": "third", "text": " ".join(plain[1])},
        {"id": FAR, "text": " ".join(far)},
        {"id": SHORT, "text": "two words"},
        {"id": "short copy", "text": "Two  words"},
        {"id": WORDLESS, "text": " \u200b "},
    ]
    made = Project(
        tmp_path_factory.mktemp("duplicates"),
        {
            "version": 1,
            "corpus": {"path": "data", "id_column": "id"},
            "task": {"kind": "text"},
            "methods": [{"method": "minhash"}],
            "output": "scores",
        },
    )
    made.write_shard("a.jsonl", first)
    made.write_shard("b/b.parquet", second)
    made.write_recipe()
    run(load_recipe(str(made.path)))
    return made


def test_rows_before_are_found_in_every_shard(project: Project) -> None:
    out = project.root / "found"
    found = find_duplicates(str(project.scores), str(out))
    assert found == Duplicates(rows=36, copies=3, alike=1)
    a, b = pq.read_table(out / "a.parquet"), pq.read_table(out / "b/b.parquet")
    assert a.column_names == ["row", "id", "copies", "similarity"]
    assert a["copies"].to_pylist() == [0] * 20
    assert a["similarity"].to_pylist() == [0] * 20
    own = {row["id"]: (row["copies"], row["similarity"]) for row in b.to_pylist()}
    assert own[COPY] == (1, 1)
    assert own["third"] == (2, 1)
    assert own["short copy"] == (1, 1)
    assert own[SHORT] == (0, 0)
    assert np.isnan(own[WORDLESS]).all()
    assert own[NEAR][0] == 0
    assert own[NEAR][1] == pytest.approx(111 / 121, abs=0.12)  # of 116 5-grams each five are others
    assert own[FAR][1] < 0.6
    assert all(own[f"b{i}"] == (0, 0) for i in range(10))


def test_it_is_a_scores_folder_that_selects_beside_others(project: Project) -> None:
    out = project.root / "beside"
    find_duplicates(str(project.scores), str(out))
    scores = open_scores(str(out))
    assert len(scores.of(State.DONE)) == 2
    kept = str(project.root / "kept")
    rule = RuleOptions(top="1.0", by="copies").rule()
    curate(str(out), "copies", rule, kept, where="copies = 0 and similarity < 0.8")
    ids = [json.loads(line)["id"] for line in (project.root / "kept/a.jsonl").read_text().splitlines()]
    ids += pq.read_table(project.root / "kept/b/b.parquet")["id"].to_pylist()
    assert {COPY, NEAR, "third", "short copy", WORDLESS, "null"}.isdisjoint(ids)
    assert len(ids) == 32
    assert (out / "quarantine/a.jsonl").read_bytes() == (project.scores / "quarantine/a.jsonl").read_bytes()
    before = (out / "b/b.parquet").read_bytes()
    find_duplicates(str(project.scores), str(out))
    assert (out / "b/b.parquet").read_bytes() == before


def test_what_is_wrong_is_named(project: Project) -> None:
    scores, out = str(project.scores), project.root / "wrong"
    with pytest.raises(CorpusError, match="has no signatures called 'sim'; it has those of minhash"):
        find_duplicates(scores, str(out), name="sim")
    for folder in (project.scores, project.scores / "in"):
        with pytest.raises(CorpusError, match="choose another output"):
            find_duplicates(scores, str(folder))
    with pytest.raises(CorpusError, match="must not lie in each other"):
        find_duplicates(scores, str(project.root / "data"))
    out.mkdir()
    (out / "note.txt").write_text("mine")
    with pytest.raises(CorpusError, match=r"has files, and no manifest\.json"):
        find_duplicates(scores, str(out))
    assert sorted(path.name for path in out.iterdir()) == ["note.txt"]


def test_no_target_that_the_scores_depend_on_is_written_over(project: Project) -> None:
    """A folder of them, one that holds them, a glob that would match the tables, and a link that leads there."""
    targets, globbed, linked = (project.root / name for name in ("targets", "globbed", "linked"))
    project.write_shard("../targets/t.jsonl", [{"id": "t", "text": "one two three"}])
    project.write_shard("../globbed/g.parquet", [{"id": "g", "text": "four five six"}])
    paths = {"t": {"path": "targets"}, "g": {"path": "globbed/*.parquet"}}
    methods = [{"method": "minhash"}, {"method": "dsir"}]
    other = project.write_recipe(methods=methods, targets=paths, output="with targets")
    run(load_recipe(str(other)))
    project.write_recipe()
    linked.mkdir()
    (linked / "b").symlink_to(targets)
    before = sorted(project.root.rglob("*"))
    for out, said in (
        (targets, "targets must not lie in each other"),
        (targets / "in", "targets must not lie in each other"),
        (globbed, r"globbed/\*\.parquet must not lie in each other"),
        (linked, "out of"),
    ):
        with pytest.raises(CorpusError, match=said):
            find_duplicates(str(project.root / "with targets"), str(out))
    assert sorted(project.root.rglob("*")) == before
    out = project.root / "of targets"
    find_duplicates(str(project.root / "with targets"), str(out))
    with pytest.raises(CorpusError, match="targets must not lie in each other"):  # they are remembered
        curate(str(out), "copies", RuleOptions(top="1.0", by="copies").rule(), str(targets))


def test_the_command_line_finds_and_selects(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    """Beside the scores of another recipe over the same corpus."""
    other = project.write_recipe(methods=[{"method": "dsir"}], targets={"t": {"path": "data/a.jsonl"}}, output="others")
    run(load_recipe(str(other)))
    project.write_recipe()
    out, kept = str(project.root / "dup"), project.root / "chosen"
    assert main(["duplicates", str(project.scores), "--out", out]) == 0
    assert "of 36 texts 3 are copies of one before them, and 1 more are like one" in capsys.readouterr().out
    where = ["--with", f"dup={out}", "--where", "dup.copies = 0 and dup.similarity < 0.8"]
    assert (
        main(["select", str(project.root / "others"), "--by", "dsir", "--top", "1.0", *where, "--out", str(kept)]) == 0
    )
    assert pq.read_table(kept / "b/b.parquet").num_rows == 12
    assert main(["ls", out]) == 0
    assert main(["duplicates", str(project.root / "others"), "--out", out]) == 2
    assert "score the corpus with {method: minhash} first" in capsys.readouterr().err


def test_groups_are_in_order() -> None:
    rng = np.random.default_rng(0)
    keys = rng.integers(0, 9, 200).astype(np.uint64)
    order, starts = _groups(keys)
    for place, start in zip(order, starts, strict=True):
        assert order[start] == np.flatnonzero(keys == keys[place])[0]
    assert [len(part) for part in _groups(keys[:0])] == [0, 0]
