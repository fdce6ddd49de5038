"""Runs over an object store that throttles, fails, dawdles and cuts connections."""

from __future__ import annotations

import fsspec
import pytest
from s3fs import S3FileSystem

import assay
from assay.cli import main
from assay.engine import run, shard
from assay.recipe import load_recipe
from tests.object_store import BUCKET, serve
from tests.small_project import make_project, make_rows

ROOT = f"s3://{BUCKET}"


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
