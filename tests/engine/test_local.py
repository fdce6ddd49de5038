"""Runs: every row accounted for, resumed without rework, never a mixture."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import subprocess
import sys
import threading

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest

import assay
from assay.corpus.errors import CorpusError
from assay.corpus.scores_folder import State, open_scores
from assay.corpus.shards import Shard
from assay.corpus.storage import Store, temporary_name
from assay.corpus.validation import validate_scores
from assay.engine import local, plan, shard
from assay.engine.local import make_plan, run
from assay.recipe.errors import ChangedError, EngineError
from assay.recipe.recipe import load_recipe
from tests.small_project import CLASSES, SIZE, make_rows, save_mlp


def score(project, *overrides, **options):
    return run(load_recipe(str(project.path), overrides), **options)


KRONECKER = {"kind": "kronecker", "rows": 2, "cols": 2}


def column(project, table, name):
    return pq.read_table(project.scores / table)[name].to_numpy()


def test_a_run_writes_one_table_per_shard(project):
    report = score(project)
    assert report.clean
    assert (report.scored, report.rows, report.rows_scored) == (2, 80, 80)
    assert set(project.tables()) == {"a.parquet", "deep/b.parquet"}
    table = pq.read_table(project.scores / "deep/b.parquet")
    assert table["row"].to_pylist() == list(range(30))
    assert table["id"].to_pylist() == [f"s1-{i}" for i in range(30)]
    assert {"mimic", "loss", "reference_loss", "rho", "ensemble_nll"} <= set(table.schema.names)
    assert table.schema.field("reference_loss").metadata[b"keep"] == b"low"


SCORE_AND_WATCH = """
import sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "pandas":
            print("pandas is imported", file=sys.stderr)

sys.meta_path.insert(0, Watch())
from assay.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_run_does_not_wait_for_pandas(project):
    """Which pyarrow imports in its first conversion of Python's values, or to numpy: as long as 10,000 rows take.

    Of JSON lines it has to guess the types from values."""
    (project.root / "data/deep/b.jsonl").unlink()
    project.write_shard("c.parquet", [*make_rows(3, 7), {"id": "null", "pixels": None, "label": None}])
    command = [sys.executable, "-c", SCORE_AND_WATCH, "score", str(project.path), "--quiet"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr.startswith("assay: not everything was scored"), run.stderr
    assert len(project.tables()) == 2


@pytest.mark.parametrize("frozen", [False, True], ids=["", "by its caller"])
def test_the_garbage_collector_looks_at_new_objects_alone_while_rows_are_scored(project, monkeypatch, frozen):
    score_unit, seen = local.score_unit, []

    def watched(*arguments):
        seen.append(gc.get_freeze_count())
        return score_unit(*arguments)

    monkeypatch.setattr(local, "score_unit", watched)
    if frozen:
        gc.freeze()
    try:
        score(project)
        assert len(seen) == 2
        assert min(seen) > 10_000
        assert (gc.get_freeze_count() > 0) is frozen
    finally:
        gc.unfreeze()


def test_the_footer_answers_what_made_the_table(project):
    score(project)
    footer = json.loads(pq.read_schema(project.scores / "a.parquet").metadata[b"assay"])
    status = os.stat(project.root / "data/a.parquet")
    assert footer["input"] == {
        "path": "a.parquet",
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "rows": 50,
    }
    assert footer["rows"] == {"scored": 50, "quarantined": 0}
    assert footer["version"] == assay.__version__
    assert footer["seed"] == 0
    assert set(footer["models"]) == {"a", "b", "ref"}
    assert footer["recipe"]["methods"][1]["reference"] == "ref"
    assert footer["recipe_hash"].startswith("sha256:")
    assert any(key.startswith("mimic.") for key in footer["methods"])


def test_scores_are_those_of_the_library(project):
    score(project)
    rows = make_rows(50, 0)
    recipe = load_recipe(str(project.path))
    models = {name: spec.build() for name, spec in recipe.models.items()}
    import torch

    inputs = torch.tensor([row["pixels"] for row in rows])
    labels = torch.tensor([row["label"] for row in rows])
    losses = torch.nn.functional.cross_entropy(models["a"](inputs), labels, reduction="none")
    np.testing.assert_allclose(column(project, "a.parquet", "loss"), losses.detach(), rtol=1e-5, atol=1e-6)


def test_a_second_run_does_nothing(project, monkeypatch):
    score(project)
    before = project.tables()
    monkeypatch.setattr(shard, "score_shard", None)
    report = score(project)
    assert (report.done_before, report.scored, report.rows_scored) == (2, 0, 80)
    assert project.tables() == before


def test_a_lost_table_is_made_again_and_only_that(project):
    score(project)
    before = project.tables()
    os.remove(project.scores / "a.parquet")
    report = score(project)
    assert (report.done_before, report.scored) == (1, 1)
    assert project.tables() == before


def test_two_runs_give_the_same_bytes_whatever_came_before(project):
    score(project)
    together = project.tables()
    score(project, "output=elsewhere", part=(2, 2))
    alone = (project.root / "elsewhere/deep/b.parquet").read_bytes()
    assert alone == together["deep/b.parquet"]


@pytest.mark.parametrize("samples", [1, 7, 256])
def test_batches_and_windows_do_not_change_scores(project, monkeypatch, samples):
    score(project, "batch.samples=64")
    expected = column(project, "a.parquet", "mimic")
    monkeypatch.setattr(shard, "WINDOW_ROWS", 13)
    monkeypatch.setattr("assay.corpus.format.CHUNK_ROWS", 5)
    score(project, f"batch.samples={samples}", "output=again")
    again = pq.read_table(project.root / "again/a.parquet")
    assert again["row"].to_pylist() == list(range(50))
    np.testing.assert_allclose(again["mimic"].to_numpy(), expected, rtol=1e-4, atol=1e-6)


def test_a_model_that_is_overwritten_before_it_is_loaded_is_not_scored_with(project, monkeypatch):
    """As by a training that goes on: its table would speak of weights that it does not come from."""
    real = local.open_workshop

    def late(*arguments, **options):
        save_mlp(project.root / "models/b.safetensors", 7)
        return real(*arguments, **options)

    monkeypatch.setattr(local, "open_workshop", late)
    with pytest.raises(EngineError, match=r"^models\.b: has changed since the run began"):
        score(project)
    assert project.tables() == {}


def test_a_table_of_another_version_is_an_error_that_names_it(project, monkeypatch):
    score(project, part=(1, 2))
    monkeypatch.setattr(plan, "__version__", "99.0")
    with pytest.raises(ChangedError, match=r"version of assay: \S+ → 99\.0.*--rescore"):
        score(project)


def test_a_shard_of_another_suffix_is_another_shard(project):
    """Its table has the same name, and without a column of ids its rows have other ids."""
    score(project, "corpus.id_column=null")
    (project.root / "data/deep/b.jsonl").rename(project.root / "data/deep/b.json")
    (changed,) = open_scores(str(project.scores)).of(State.CHANGED)
    assert (changed.shard.path, changed.detail) == ("deep/b.json", "was scored as deep/b.jsonl")
    report = score(project, "corpus.id_column=null")
    assert (report.done_before, report.rescored) == (1, 1)
    assert pq.read_table(project.scores / "deep/b.parquet")["id"][0].as_py() == "deep/b.json:0"


def test_a_changed_input_is_scored_again_and_reported(project):
    score(project)
    untouched = project.tables()["a.parquet"]
    project.write_shard("deep/b.jsonl", make_rows(31, 2))
    report = score(project)
    assert (report.done_before, report.scored, report.rescored) == (1, 1, 1)
    assert project.tables()["a.parquet"] == untouched
    assert len(column(project, "deep/b.parquet", "row")) == 31


@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("seed=3", "seed: 0 → 3"),
        ("methods.1.cosine=true", "methods.1.cosine: False → True"),
        ("methods.0.weights=[1, 2]", "methods.0.weights: None → [1.0, 2.0]"),
        ("corpus.id_column=null", "id_column: id → None"),
        ("methods.1.reference=b", "methods.1.reference: ref → b"),
    ],
)
def test_a_changed_recipe_is_an_error_that_names_the_change(project, override, difference):
    score(project)
    before = project.tables()
    with pytest.raises(ChangedError) as caught:
        score(project, override)
    assert difference in str(caught.value)
    assert "--rescore" in str(caught.value)
    assert project.tables() == before
    report = score(project, override, rescore=True)
    assert (report.scored, report.rescored) == (2, 2)
    assert score(project, override).done_before == 2


def test_a_changed_model_is_an_error_that_names_it(project):
    score(project)
    save_mlp(project.root / "models/ref.safetensors", seed=0, scale=1.25)
    with pytest.raises(ChangedError, match=r"weights of models\.ref: sha256:.* → sha256:"):
        score(project)


def test_a_moved_project_is_still_done(project, tmp_path_factory):
    score(project)
    moved = tmp_path_factory.mktemp("moved") / "project"
    project.root.rename(moved)
    recipe = load_recipe(str(moved / "recipe.yaml"))
    assert run(recipe).done_before == 2
    assert open_scores(str(moved / "scores")).corpus_path == str(moved / "data")


def test_what_a_run_leaves_is_of_its_corpus_though_nothing_was_to_be_scored(project):
    """A glob that has become narrower: no selection may choose from what the recipe has left out."""
    score(project)
    times = [(project.scores / name).stat().st_mtime_ns for name in ("manifest.json", "recipe.resolved.yaml")]
    score(project)
    assert times == [(project.scores / n).stat().st_mtime_ns for n in ("manifest.json", "recipe.resolved.yaml")]
    assert score(project, "corpus.path=data/*.parquet").done_before == 1
    found = open_scores(str(project.scores))
    assert [(status.shard.path, status.state) for status in found.shards] == [("a.parquet", State.DONE)]
    manifest = json.loads((project.scores / "manifest.json").read_text())
    assert manifest["shards"] == [{"path": "a.parquet", "table": "a.parquet"}]
    assert "data/*.parquet" in (project.scores / "recipe.resolved.yaml").read_text()
    narrow = (project.scores / "manifest.json").read_text()
    assert score(project).done_before == 2
    assert len(open_scores(str(project.scores)).shards) == 2
    (project.scores / "manifest.json").unlink()
    assert score(project, "corpus.path=data/*.parquet").done_before == 1
    assert (project.scores / "manifest.json").read_text() == narrow
    (project.scores / "manifest.json").write_text('{"mine": 1}')
    with pytest.raises(CorpusError, match="not a manifest of `assay score`"):
        score(project)


@pytest.mark.parametrize("damage", [b"", b"PAR1 and no more", None])
def test_a_file_in_the_tables_place_is_never_overwritten_unseen(project, damage):
    score(project)
    path = project.scores / "a.parquet"
    if damage is None:  # somebody's own Parquet file
        pq.write_table(pq.read_table(path).replace_schema_metadata(None), path)
    else:
        path.write_bytes(damage)
    with pytest.raises(CorpusError, match=r"a\.parquet"):
        score(project)


def test_a_short_table_is_an_error_with_counts(project):
    score(project)
    path = project.scores / "a.parquet"
    pq.write_table(pq.read_table(path).slice(0, 40), path)
    with pytest.raises(CorpusError, match="holds 40 rows, but its footer counts 50"):
        score(project)


BAD_ROWS = [
    ({"label": None}, "label is null"),
    ({"label": CLASSES}, "label is 3, outside the classes 0 to 2"),
    ({"pixels": None}, "pixels is null"),
    ({"pixels": [0.0] * (SIZE - 1)}, "pixels holds 5 numbers, expected 6"),
    ({"pixels": [0.0] * (SIZE - 1) + [float("nan")]}, "pixels holds a NaN, an infinity or a null"),
    ({"id": None}, "id is null"),
    ({"id": "s5-0"}, "id repeats that of an earlier row"),
]


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_bad_rows_are_quarantined_and_the_rest_is_scored(project, suffix):
    rows = make_rows(40, 5)
    for i, (change, _) in enumerate(BAD_ROWS):
        rows[3 * i + 1] |= change
    project.write_shard(f"bad.{suffix}", rows)
    report = score(project)
    assert not report.clean
    assert (report.rows, report.rows_scored, report.rows_quarantined) == (120, 113, 7)
    assert [(row, reason) for _, row, _, reason in project.quarantine()] == [
        (3 * i + 1, reason) for i, (_, reason) in enumerate(BAD_ROWS)
    ]
    good = [i for i in range(40) if i not in {3 * k + 1 for k in range(7)}]
    assert column(project, "bad.parquet", "row").tolist() == good
    again = score(project)
    assert (again.done_before, again.rows_quarantined) == (3, 7)
    assert not again.clean  # the exit code still says so


def test_unreadable_shards_are_quarantined_and_the_run_goes_on(project):
    whole = (project.root / "data/a.parquet").read_bytes()
    (project.root / "data/cut.parquet").write_bytes(whole[:-100])
    project.write_shard("column.parquet", [{"id": "x", "pixel": [0.0] * SIZE, "label": 0}])
    report = score(project)
    assert set(report.unreadable) == {"cut.parquet", "column.parquet"}
    assert (report.scored, report.rows_scored) == (2, 80)
    assert not report.clean
    listed = {shard: (row, reason) for shard, row, _, reason in project.quarantine()}
    assert listed["column.parquet"][0] is None
    assert "no column 'pixels'" in listed["column.parquet"][1]
    assert not (project.scores / "cut.parquet").exists()
    first = project.quarantine()
    assert set(score(project).unreadable) == set(report.unreadable)
    assert project.quarantine() == first


def test_a_shard_that_is_mended_leaves_the_quarantine(project):
    good = (project.root / "data/a.parquet").read_bytes()
    (project.root / "data/a.parquet").write_bytes(good[:-10])
    assert score(project).unreadable
    (project.root / "data/a.parquet").write_bytes(good)
    assert score(project).clean
    assert project.quarantine() == []


def test_a_shard_that_breaks_loses_its_old_table(project):
    score(project)
    path = project.root / "data/a.parquet"
    path.write_bytes(path.read_bytes()[:-10])
    assert set(score(project).unreadable) == {"a.parquet"}
    assert set(project.tables()) == {"deep/b.parquet"}


def test_a_shard_without_rows_has_a_table_without_rows(project):
    project.write_shard("none.jsonl", [])
    assert score(project).clean
    table = pq.read_table(project.scores / "none.parquet")
    assert table.num_rows == 0
    assert table.schema.equals(pq.read_schema(project.scores / "a.parquet"))


def test_a_shard_that_changes_while_it_is_scored_is_quarantined(project, monkeypatch):
    original = shard.score_samples

    def slow(*arguments):
        os.utime(project.root / "data/a.parquet")
        return original(*arguments)

    monkeypatch.setattr(shard, "score_samples", slow)
    report = score(project)
    assert "changed while it was being scored" in report.unreadable["a.parquet"]
    assert not (project.scores / "a.parquet").exists()


def test_parts_share_the_work_and_cover_it(project):
    for i in range(5):
        project.write_shard(f"more{i}.jsonl", make_rows(4, 10 + i))
    scored = [score(project, part=(i, 3)).scored for i in (1, 2, 3)]
    assert scored == [3, 2, 2]
    parted = project.tables()
    score(project, "output=whole")
    assert parted == {path: (project.root / "whole" / path).read_bytes() for path in parted}
    assert score(project).done_before == 7


def test_two_runners_on_one_output(project):
    for i in range(6):
        project.write_shard(f"more{i}.jsonl", make_rows(20, 10 + i))
    score(project, "output=alone")
    failures = []

    def runner():
        try:
            score(project)
        except Exception as error:
            failures.append(error)

    runners = [threading.Thread(target=runner) for _ in range(2)]
    for thread in runners:
        thread.start()
    for thread in runners:
        thread.join()
    assert failures == []
    assert project.tables() == {p: (project.root / "alone" / p).read_bytes() for p in project.tables()}
    assert len(project.tables()) == 8


def test_another_file_system_in_and_out(project):
    fs = fsspec.filesystem("memory")
    fs.put(str(project.root / "data"), "/engine/data", recursive=True)
    overrides = ["corpus.path=memory://engine/data", "output=memory://engine/scores"]
    assert score(project, *overrides).rows_scored == 80
    assert score(project, *overrides).done_before == 2
    store = Store.at("memory://engine/scores")
    assert store.files() == ["a.parquet", "deep/b.parquet", "manifest.json", "recipe.resolved.yaml"]


def test_what_is_done_costs_no_request_of_its_shard_where_the_listing_tells_all(project, monkeypatch):
    fs = fsspec.filesystem("memory")
    fs.put(str(project.root / "data"), "/etags/data", recursive=True)
    info, find = fs.info, fs.find

    def described(path, **options):
        facts = info(path, **options)
        return facts if facts["type"] == "directory" else facts | {"ETag": hashlib.sha256(fs.cat(path)).hexdigest()}

    monkeypatch.setattr(fs, "info", described)
    monkeypatch.setattr(fs, "find", lambda root, **options: {path: described(path) for path in find(root)})
    overrides = ["corpus.path=memory://etags/data", "output=memory://etags/scores"]
    assert score(project, *overrides).scored == 2
    with monkeypatch.context() as patch:
        patch.setattr(Shard, "fingerprint", None)
        assert score(project, *overrides).done_before == 2
        assert all(status.state is State.DONE for status in open_scores("memory://etags/scores").shards)
    fs.pipe("/etags/data/deep/b.jsonl", fs.cat("/etags/data/deep/b.jsonl").replace(b"0.5", b"0.6") + b"\n")
    assert [s.state for s in open_scores("memory://etags/scores").shards] == [State.DONE, State.CHANGED]
    assert score(project, *overrides).rescored == 1


@pytest.mark.parametrize(
    ("corpus", "output"),
    [("data", "data"), ("data", "data/scores"), ("data/*.parquet", "data"), ("data", ".")],
)
def test_output_and_corpus_must_not_mix(project, corpus, output):
    with pytest.raises(CorpusError, match="must not lie in each other"):
        make_plan(load_recipe(str(project.path), [f"corpus.path={corpus}", f"output={output}"]))


def test_an_output_that_cannot_be_written_stops_the_run(project):
    (project.root / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        score(project, "output=file/scores")


def test_an_old_temporary_is_swept_and_a_young_one_is_not(project):
    project.scores.mkdir()
    old, young = project.scores / temporary_name(), project.scores / temporary_name()
    old.write_bytes(b"half")
    young.write_bytes(b"half")
    os.utime(old, (0, 0))
    score(project)
    assert not old.exists()
    assert young.exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("task.classes=4", "task.classes is 4, but models.a has 3 outputs"),
        ("task.shape=[2, 2]", "task.shape: the models leave it open"),
        ("methods.0.weights=[1]", "one weight per model"),
        ("methods.1.reference=a", "equals the model"),
        ("methods.1.layers=nothing*", "nothing"),
    ],
)
def test_what_does_not_fit_together_is_said_before_scoring(project, override, message):
    with pytest.raises(EngineError) as caught:
        score(project, override)
    assert message in str(caught.value)
    assert not project.scores.exists()


def test_a_model_that_fails_stops_the_run_and_says_where(project, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(shard, "score_samples", fail)
    with pytest.raises(EngineError, match=r"a\.parquet, rows 0 to 49: scoring failed: RuntimeError: no such kernel"):
        score(project)
    assert project.tables() == {}


@pytest.mark.parametrize("folder", ["deep", "quarantine", "quarantine/deep", "features"])
def test_no_link_inside_the_output_leads_into_the_corpus(project, folder):
    link = project.scores / folder
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(project.root / "data/deep")
    project.write_shard("deep/b.jsonl", [{"id": "x"}])  # its row goes to quarantine
    before = {p: p.read_bytes() for p in (project.root / "data").rglob("*.*")}
    methods = [{"method": "trak", "models": ["a"], "keep_features": "float16", "sketch": KRONECKER}]
    project.write_recipe(methods=methods, targets={"t": {"path": "data/a.parquet"}})
    with pytest.raises(CorpusError, match=rf"scores/{folder}.*: leads to .*data/deep.*, out of .*; remove the link"):
        score(project)
    assert {p: p.read_bytes() for p in (project.root / "data").rglob("*.*")} == before


@pytest.mark.parametrize("output", ["target", "target/scores", "target_alias", "pool"])
def test_targets_and_the_pool_are_inputs_too(project, output):
    for name in ("target", "pool"):
        (project.root / name).mkdir()
        (project.root / name / "a.parquet").write_bytes((project.root / "data/a.parquet").read_bytes())
    (project.root / "target_alias").symlink_to("target")
    methods = [{"method": "trak", "models": ["a"], "sketch": KRONECKER}]
    project.write_recipe(methods=methods, targets={"t": {"path": "target"}}, fit={"path": "pool"}, output=output)
    with pytest.raises(CorpusError, match="must not lie in each other"):
        score(project)


def test_two_recipes_do_not_write_into_one_folder(project, monkeypatch):
    monkeypatch.setattr("assay.corpus.claim._PATIENCE_SECONDS", 0.1)
    original, refused = shard.score_samples, []

    def beside(*arguments):
        """Another recipe starts while this one runs, and another runner of this one."""
        if not refused:
            with pytest.raises(CorpusError, match="another run or selection is writing into this folder") as caught:
                score(project, "seed=3")
            refused.append(caught)
            score(project, part=(2, 2))
        return original(*arguments)

    monkeypatch.setattr(shard, "score_samples", beside)
    assert score(project).rows_scored == 80
    assert refused
    assert not (project.scores / ".assay.lock").exists()


def test_temporaries_of_killed_runs_are_swept_also_where_nothing_is_left_to_score(project):
    score(project)
    path = project.scores / temporary_name()
    path.write_bytes(b"half")
    os.utime(path, (0, 0))
    assert score(project).done_before == 2
    assert not path.exists()


@pytest.mark.parametrize("name", ["manifest.json", "recipe.resolved.yaml", "quarantine/deep/b.jsonl"])
def test_files_that_no_run_wrote_are_not_replaced(project, name):
    project.write_shard("deep/b.jsonl", [{"id": "x"}])  # its row goes to quarantine
    path = project.scores / name
    path.parent.mkdir(parents=True)
    path.write_text('{"mine": 1}\n')
    with pytest.raises(CorpusError, match=name.replace(".", r"\.")):
        score(project)
    assert path.read_text() == '{"mine": 1}\n'


def test_a_glob_that_would_find_the_tables_is_refused(project):
    with pytest.raises(CorpusError, match="must not lie in each other"):
        score(project, "corpus.path='**/*.parquet'", "output=scores")
    assert score(project, "corpus.path=data/*.parquet", "output=scores").rows_scored == 50


def test_a_shard_that_is_gone_costs_itself_only(project):
    (project.root / "data/gone.parquet").symlink_to("nowhere.parquet")
    methods = [{"method": "trak", "models": ["a"], "sketch": KRONECKER}]
    project.write_recipe(methods=methods, targets={"t": {"path": "data/a.parquet"}})
    report = score(project)
    assert not report.clean
    assert report.rows_scored == 80


def test_ids_of_csv_are_as_they_are_written(project):
    """Those of arXiv's papers are no numbers."""
    rows = [{**row, "id": f"2101.0010{i}"} for i, row in enumerate(make_rows(10))]
    lines = [f'{row["id"]},"{row["pixels"]}",{row["label"]}\n' for row in rows]
    (project.root / "data/c.csv").write_text("id,pixels,label\n" + "".join(lines))
    assert score(project).clean
    assert column(project, "c.parquet", "id").tolist() == [row["id"] for row in rows]
    assert validate_scores(str(project.scores)).problems == 0
