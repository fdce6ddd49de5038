"""`--retry-quarantined`: what is tried again ends as in an undisturbed run, and what is not is left alone."""

from __future__ import annotations

import multiprocessing
import os

import pytest

from assay.cli import main
from assay.corpus.errors import ShardError
from assay.corpus.quarantine import QuarantineWriter
from assay.corpus.score_files import ScoreWriter
from assay.corpus.scores_folder import State, open_scores
from assay.corpus.validation import validate_scores
from assay.engine import processes, shard
from assay.engine.kept_features import FeatureWriters
from assay.engine.local import run
from assay.recipe.recipe import load_recipe
from tests.small_project import make_rows

SKETCH = {"kind": "kronecker", "rows": 2, "cols": 2}
OOM = "ran out of memory on its own"


@pytest.fixture
def project(project):
    """With a row that has no label, for good."""
    rows = make_rows(30, 1)
    rows[11]["label"] = None
    project.write_shard("deep/b.jsonl", rows)
    return project


def score(project, *overrides, **options):
    return run(load_recipe(str(project.path), overrides), **options)


def failing(patch, *ids):
    """Samples of these ids run out of memory."""
    original = shard.score_samples

    def score_samples(scorer, encoder, samples, *arguments):
        scores, failed = original(scorer, encoder, samples, *arguments)
        return scores, failed | {i: OOM for i, sample in enumerate(samples) if sample.id in ids}

    patch.setattr(shard, "score_samples", score_samples)


def disturbed(project, *ids, **options):
    """Score while samples of these ids run out of memory."""
    with pytest.MonkeyPatch.context() as patch:
        failing(patch, *ids)
        return score(project, **options)


def written(folder):
    """Every file but those that say where it lies."""
    own = ("manifest.json", "recipe.resolved.yaml")
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.*") if p.is_file() and p.name not in own
    }


def undisturbed(project):
    score(project, "output=undisturbed")
    return written(project.root / "undisturbed")


def test_rows_whose_cause_is_gone_get_their_scores_and_the_others_do_not(project):
    project.write_shard("c.jsonl", make_rows(9, 2))
    summary = disturbed(project, "s0-3", "s0-7")
    assert summary.rows_quarantined == 3
    assert [(row, reason) for _, row, _, reason in project.quarantine()] == [(3, OOM), (7, OOM), (11, "label is null")]
    untouched = os.stat(project.scores / "c.parquet")
    assert score(project).done_before == 3  # not without being asked to

    summary = disturbed(project, "s0-7", retry=True)
    assert (summary.done_before, summary.scored, summary.rescored) == (1, 2, 2)
    assert "quarantined rows tried again: 3; now quarantined: 2" in summary.lines()
    assert [(row, reason) for _, row, _, reason in project.quarantine()] == [(7, OOM), (11, "label is null")]

    summary = score(project, retry=True)
    assert (summary.retried, summary.still_quarantined, summary.rows_scored) == (2, 1, 88)
    assert not summary.clean
    assert written(project.scores) == undisturbed(project)
    now = os.stat(project.scores / "c.parquet")
    assert (now.st_mtime_ns, now.st_ino) == (untouched.st_mtime_ns, untouched.st_ino)


def test_only_the_own_part_is_tried_again(project):
    disturbed(project, "s0-3")
    summary = score(project, part=(2, 2), retry=True)
    assert (summary.retried, summary.scored) == (1, 1)
    assert OOM in [reason for *_, reason in project.quarantine()]


@pytest.mark.parametrize(
    ("when", "stage"),
    [
        pytest.param("before", QuarantineWriter, marks=pytest.mark.slow),
        ("after", QuarantineWriter),
        pytest.param("after", FeatureWriters, marks=pytest.mark.slow),
        pytest.param("before", ScoreWriter, marks=pytest.mark.slow),
        pytest.param("after", ScoreWriter, marks=pytest.mark.slow),
    ],
)
def test_a_kill_in_the_middle_loses_nothing(project, stage, when):
    """At every step of writing: nothing that a table or a list says is believed beside the other's new version."""
    disturbed(project, "s0-3")
    table, save = (project.scores / "a.parquet").read_bytes(), stage.save

    def killed(*arguments):
        if when == "after":
            save(*arguments)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            score(project, retry=True)
    is_written = stage is ScoreWriter and when == "after"
    if not is_written:
        assert (project.scores / "a.parquet").read_bytes() == table
    is_half = not is_written and not (stage is QuarantineWriter and when == "before")
    states = [status.state for status in open_scores(str(project.scores)).shards]
    assert states[0] is (State.CHANGED if is_half else State.DONE)
    found = []
    validate_scores(str(project.scores), None, lambda problem: found.append(problem.path))
    assert ("a.parquet" in found) == is_half

    assert score(project).scored == is_half  # without being asked to
    score(project, retry=True)
    assert written(project.scores) == undisturbed(project)


def test_a_shard_that_cannot_be_read_this_time_keeps_what_is_known_of_it(project, monkeypatch):
    disturbed(project, "s0-3")
    before = written(project.scores)
    read = shard.read

    def flaky(what, *arguments):
        if what.path == "a.parquet":
            raise ShardError("OSError: [Errno 5] Input/output error")
        return read(what, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(shard, "read", flaky)
        summary = score(project, retry=True)
    assert "Input/output error" in summary.unreadable["a.parquet"]
    assert (summary.retried, summary.still_quarantined, summary.rows, summary.rows_scored) == (2, 2, 80, 78)
    assert written(project.scores) == before
    (project.root / "data/a.parquet").write_bytes(b"PAR1")
    assert "a.parquet" in score(project, retry=True).unreadable
    assert not (project.scores / "a.parquet").exists()  # it speaks of an input that is no more


@pytest.mark.parametrize("devices", ["cpu", pytest.param("cpu,cpu", marks=pytest.mark.slow)])
def test_stored_features_do_not_hide_the_rows_that_they_lack(project, monkeypatch, devices):
    """In workers, too: they have to be told."""
    trak = {"method": "trak", "models": ["a"], "sketch": SKETCH, "keep_features": "float32", "targets": ["t"]}
    project.write_shard("../t.jsonl", make_rows(5, 8))
    project.write_recipe(methods=[trak], targets={"t": {"path": "t.jsonl"}})
    disturbed(project, "s0-3")
    monkeypatch.setattr(processes, "START", "forkserver")
    multiprocessing.get_context("forkserver").set_forkserver_preload(["assay.engine.worker", "assay.engine.local"])
    summary = score(project, f"run.devices='{devices}'", retry=True)
    assert (summary.workers, summary.reused, summary.still_quarantined) == (len(devices.split(",")), 0, 1)
    assert written(project.scores) == undisturbed(project)


def test_the_command(project, monkeypatch, capsys):
    disturbed(project, "s0-3")
    monkeypatch.chdir(project.root)
    assert main(["score", "recipe.yaml", "--retry-quarantined", "--dry-run"]) == 0
    assert "2 shards to score (2 of them again), 0 done" in capsys.readouterr().out
    assert main(["score", "recipe.yaml", "--retry-quarantined"]) == 1  # one row is still there
    assert "quarantined rows tried again: 2; now quarantined: 1" in capsys.readouterr().out
