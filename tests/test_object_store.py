"""Runs over an object store that throttles, fails, dawdles and cuts connections."""

from __future__ import annotations

import json

import fsspec
import numpy as np
import pytest
from s3fs import S3FileSystem

import assay
from assay.cli import main
from assay.corpus.shards import find_shards
from assay.corpus.storage import Store
from assay.engine import local, run, shard, staging, units
from assay.engine.parts import join_parts, score_part
from assay.engine.plan import make_plan
from assay.engine.processes import Processes
from assay.engine.workshop import open_workshop
from assay.recipe import load_recipe
from tests.object_store import BUCKET, serve
from tests.small_project import make_project, make_rows

ROOT = f"s3://{BUCKET}"
LISTED = {"by": "ensemble_nll", "top": 7}


@pytest.fixture(scope="module")
def store():
    """The server, found by whoever asks for S3, and asked again without a wait."""
    with serve() as (server, options), pytest.MonkeyPatch.context() as patch:
        patch.setitem(fsspec.config.conf, "s3", options)
        patch.setattr("botocore.retryhandler.delay_exponential", lambda *_, **__: 0.0)
        yield server
    S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="module")
def project(store, tmp_path_factory):
    """A project whose corpus lies in the bucket, and is scored where nothing can go wrong."""
    made = make_project(tmp_path_factory.mktemp("project"))
    made.write_shard("c.parquet", make_rows(40, 2))
    fsspec.filesystem("s3").put(str(made.root / "data"), f"{BUCKET}/data", recursive=True)
    run(load_recipe(made.path))
    return made


def overrides(output):
    return [f"corpus.path={ROOT}/data", f"output={ROOT}/{output}"]


def score(project, output):
    return run(load_recipe(project.path, overrides(output)))


def rows(scores):
    """Every row of every table, with its shard."""
    return assay.read(str(scores)).to_table().to_pylist()


def test_marks_of_folders_are_no_files(project):
    """As S3's console makes them, also of the folder itself: a corpus is whole, and an output is empty."""
    fs = fsspec.filesystem("s3")
    for name in ("marked/", "marked/sub/", "marked-out/"):
        fs.call_s3("put_object", Bucket=BUCKET, Key=name, Body=b"")
    fs.pipe(f"{BUCKET}/marked/sub/a.jsonl", b"{}")
    for url in (f"{ROOT}/marked", f"{ROOT}/marked/", f"{ROOT}/marked/*", f"{ROOT}/marked/**"):
        corpus = find_shards(url)
        assert ([shard.path for shard in corpus.shards], corpus.left_out) == (["sub/a.jsonl"], ()), url
    assert Store.at(f"{ROOT}/marked-out").files() == []
    out = f"{ROOT}/marked-out"
    assert main(["select", str(project.scores), "--by", "mimic", "--top", "0.5", "--out", out]) == 0


@pytest.mark.parametrize(
    "faults",
    [{"throttled": 7, "error": 11, "slow": 13}, {"cut": 4}],
    ids=lambda faults: "-".join(faults),
)
def test_faults_that_pass_cost_time_only(store, project, faults):
    output = "-".join(faults)
    with store.misbehaving(**faults):
        summary = score(project, output)
    assert summary.clean
    assert store.met.keys() == faults.keys()
    assert rows(f"{ROOT}/{output}") == rows(project.scores)


@pytest.mark.parametrize(("name", "fault"), [("c.parquet", "cut"), ("deep/b.jsonl", "error")])
def test_a_shard_that_cannot_be_had_is_named_and_scored_when_it_can(store, project, name, fault):
    output = f"unread-{fault}"
    with store.misbehaving("GET", f"/data/{name}", **{fault: 1}):
        summary = score(project, output)
    assert list(summary.unreadable) == [name]
    assert summary.scored == 2
    again = score(project, output)
    assert again.clean
    assert (again.done_before, again.scored) == (2, 1)
    assert rows(f"{ROOT}/{output}") == rows(project.scores)
    fs = fsspec.filesystem("s3", skip_instance_cache=True)  # whose listings are not those of before
    assert not [path for path in fs.find(f"{ROOT}/{output}") if "quarantine" in path]


def test_a_table_that_cannot_be_written_stops_the_run_which_then_goes_on(store, project):
    output = "unwritten"
    with (
        store.misbehaving("PUT", "/deep/b.parquet", error=1),
        pytest.raises(OSError, match=r"encountered an error.*deep/b\.parquet"),
    ):
        score(project, output)
    again = score(project, output)
    assert again.clean
    assert (again.done_before, again.scored) == (2, 1)
    assert rows(f"{ROOT}/{output}") == rows(project.scores)


@pytest.mark.parametrize("fault", ["error", "cut"])
def test_a_store_that_is_down_is_one_line(store, project, fault, capsys):
    settings = [word for override in overrides("down") for word in ("--set", override)]
    with store.misbehaving(**{fault: 1}):
        assert main(["score", str(project.path), "--quiet", *settings]) == 2
        assert main(["ls", f"{ROOT}/cut"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert all(line.startswith("assay: ") and "internal error" not in line for line in said)


def test_a_shard_that_is_replaced_while_it_is_read_is_not_scored_as_either(store, project, monkeypatch):
    """Requests for one shard's ranges may meet two contents."""
    local, remote = project.root / "data/a.parquet", f"{BUCKET}/replaced/a.parquet"
    fs = fsspec.filesystem("s3")
    fs.put(str(local), remote)
    plain = shard.score_samples

    def replaced(*arguments):
        fs.put(str(project.root / "data/c.parquet"), remote)
        return plain(*arguments)

    monkeypatch.setattr(shard, "score_samples", replaced)
    recipe = load_recipe(project.path, [f"corpus.path={ROOT}/replaced", f"output={ROOT}/replaced-scores"])
    summary = run(recipe)
    assert "changed while it was being scored" in summary.unreadable["a.parquet"]
    assert summary.rows_scored == 0


def test_a_plan_asks_for_listings_whatever_number_of_shards_there_is(store, project):
    """Also where methods are fitted to the corpus, whose files' fingerprints are part of the plan."""
    fs, methods = fsspec.filesystem("s3"), "methods=[{method: leverage, model: a}]"
    asked = []
    fs.put(str(project.root / "data"), f"{BUCKET}/many", recursive=True)
    for more in (0, 12):
        for i in range(more):
            fs.put(str(project.root / "data/c.parquet"), f"{BUCKET}/many/more-{i}.parquet")
        before = store.requests
        plan = make_plan(load_recipe(project.path, [f"corpus.path={ROOT}/many", f"output={ROOT}/none", methods]))
        asked.append(store.requests - before)
        assert len(plan.todo) == 3 + more
    assert asked[0] == asked[1]


def test_a_shortlist_is_made_of_shards_as_they_were_scored(store, project, monkeypatch):
    """The corpus is listed once; that a shard was replaced between then and its scoring is seen by a second look."""
    fs, asked = fsspec.filesystem("s3"), []
    fs.put(str(project.root / "data"), f"{BUCKET}/ranked", recursive=True)
    before = local.refuse_strangers

    def replaced(output):
        if not asked:
            fs.put(str(project.root / "data/c.parquet"), f"{BUCKET}/ranked/a.parquet")
        asked.append(output.url)
        before(output)

    monkeypatch.setattr(local, "refuse_strangers", replaced)
    listed = []
    monkeypatch.setattr("assay.engine.plan.find_shards", lambda path: (listed.append(path), find_shards(path))[1])
    methods = [{"method": "ensemble", "models": ["a", "b"]}, {**project.recipe["methods"][1], "shortlist": LISTED}]
    where = [f"corpus.path={ROOT}/ranked", f"output={ROOT}/ranked-scores", f"methods={json.dumps(methods)}"]
    summary = run(load_recipe(project.path, where))
    assert summary.clean
    assert (summary.scored, summary.rows_scored) == (3, 40 + 30 + 40)
    assert np.count_nonzero(~np.isnan([row["mimic"] for row in rows(f"{ROOT}/ranked-scores")])) == LISTED["top"]
    assert listed == [f"{ROOT}/ranked"]
    assert run(load_recipe(project.path, where)).done_before == 3


def test_parts_of_a_large_shard_wait_in_the_store_until_they_are_joined(store, project, monkeypatch):
    monkeypatch.setattr(shard, "WINDOW_ROWS", 4)
    plan = make_plan(load_recipe(project.path, [*overrides("parts"), "methods=[{method: ensemble, models: [a, b]}]"]))
    workshop, fs = open_workshop(plan), fsspec.filesystem("s3")
    large = next(each for each in plan.todo if each.path == "c.parquet")
    with staging.staging(plan.output, sees_local_files=False) as name:
        paths = [name(), name()]
        parts = [score_part(workshop, large, shard.Share(i, 2), path, lambda *_: None) for i, path in enumerate(paths)]
        assert all(map(staging.is_there, paths))
        join_parts(parts, plan.identity, workshop.columns, 0, large, plan.output)
    shard.score_shard(workshop, large, Store.at(f"{ROOT}/whole"))
    assert fs.cat(f"{ROOT}/parts/c.parquet") == fs.cat(f"{ROOT}/whole/c.parquet")
    assert staging.sweep(plan.output) == []
    monkeypatch.setattr(staging, "_ABANDONED_AFTER_SECONDS", -5.0)
    assert len(staging.sweep(plan.output)) == 2
    assert not any(map(staging.is_there, paths))


@pytest.mark.slow
def test_workers_who_see_the_store_alone_score_a_shard_together(store, project, monkeypatch):
    """As Ray's actors do on other nodes: what they stage is seen by way of the store."""
    monkeypatch.setenv("FSSPEC_S3", json.dumps(fsspec.config.conf["s3"]))
    monkeypatch.setattr(Processes, "sees_local_files", False)
    monkeypatch.setattr(units, "SPLIT_BYTES", 10)
    methods = "methods=[{method: ensemble, models: [a, b]}]"
    score_with = [*overrides("crew"), methods, "run.devices='cpu,cpu'"]
    summary = run(load_recipe(project.path, score_with))
    run(load_recipe(project.path, [*overrides("one"), methods, "run.devices=cpu"]))
    assert (summary.workers, summary.clean) == (2, True)
    fs = fsspec.filesystem("s3")
    assert fs.find(f"{ROOT}/crew/.parts") == []
    for path in ("a", "deep/b", "c"):
        assert fs.cat(f"{ROOT}/crew/{path}.parquet") == fs.cat(f"{ROOT}/one/{path}.parquet")


def test_a_store_that_is_served_again_is_empty() -> None:
    for _ in range(2):
        with serve() as (_, options):
            fs = fsspec.filesystem("s3", **options, skip_instance_cache=True, use_listings_cache=False)
            assert not fs.ls(BUCKET)
            fs.pipe_file(f"{BUCKET}/a", b"a")
