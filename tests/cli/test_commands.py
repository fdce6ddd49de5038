"""The command: exit codes, one-line errors, and what it prints."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pyarrow.parquet as pq
import pytest

from assay.cli import main
from tests.small_project import make_project, make_rows


@pytest.fixture
def project(tmp_path, monkeypatch):
    made = make_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    return made


def test_score_select_ls(project, capsys):
    assert main(["score", "recipe.yaml"]) == 0
    assert "rows in 80 = scored 80 + quarantined 0" in capsys.readouterr().out
    assert main(["score", "recipe.yaml"]) == 0
    assert "2 done before" in capsys.readouterr().out
    assert main(["select", "scores", "--by", "mimic", "--top", "0.5", "--out", "curated"]) == 0
    assert "rows in 80 = kept 40 + dropped 40 + quarantined 0" in capsys.readouterr().out
    assert pq.read_metadata(project.root / "curated/a.parquet").num_rows < 50
    assert main(["select", "scores", "--by", "mimic", "--top", "9", "--format", "indices", "--out", "rows"]) == 0
    assert "indices: rows" in capsys.readouterr().out
    assert pq.read_table(project.root / "rows/indices").num_rows == 9
    weights = ["--by", "mimic", "--top", "9", "--format", "weights", "--out", "weights"]
    assert main(["select", "scores", *weights]) == 2
    assert "--format weights: --top weighs all rows that it keeps alike" in capsys.readouterr().err
    assert main(["select", "scores", *weights, "--temperature", "0.5"]) == 0
    capsys.readouterr()
    assert pq.read_table(project.root / "weights/weights").column_names == ["id", "weight"]
    assert main(["ls", "scores", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [line["state"] for line in listed["shards"]] == ["done", "done"]
    assert (listed["running"], listed["scored"], listed["quarantined"]) == (False, 80, 0)
    os.utime(project.root / "data/a.parquet")
    project.write_shard("new.jsonl", make_rows(2, 7))
    assert main(["ls", "scores"]) == 0
    said = capsys.readouterr().out
    assert "3 shards: 1 changed, 1 done, 1 missing\nrows 80 = scored 80 + quarantined 0\n" in said
    assert "no run is writing into it; `assay score` does what is missing" in said


def test_quarantine_makes_exit_code_one(project, capsys):
    rows = make_rows(5, 3)
    rows[2]["label"] = 99
    project.write_shard("bad.jsonl", rows)
    (project.root / "data/torn.parquet").write_bytes(b"PAR1")
    for _ in range(2):  # a rerun that has nothing to do must not forget
        assert main(["score", "recipe.yaml"]) == 1
        captured = capsys.readouterr()
        assert "1 unreadable" in captured.out
        assert "rows in 85 = scored 84 + quarantined 1" in captured.out
        assert "quarantine" in captured.err
    assert main(["select", "scores", "--random", "0.5", "--out", "curated"]) == 1
    assert "1 unreadable shards are not in it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["score", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (
            ["score", "recipe.yaml", "--set", "batch.tokns=1"],
            "batch.tokns: unknown key; did you mean",
        ),
        (["score", "recipe.yaml", "--shard", "3/2"], "--shard 3/2: expected I/N"),
        (["score", "recipe.yaml", "--set", "corpus.path=data/*.csv"], "no shard found"),
        (["score", "recipe.yaml", "--set", "output=models/a.safetensors/x"], "a.safetensors"),
        (["score", "recipe.yaml", "--bogus"], "No such option"),
        (["score"], "Missing argument"),
        (["bogus"], "No such command"),
        (["validate", "recipe.yaml", "--set", "task.classes=5"], "task.classes is 5"),
        (["select", "scores", "--by", "mimic", "--top", "0.5", "--out", "x"], "no manifest.json"),
        (["select", "scores", "--out", "x"], "expected exactly one of"),
        (["ls", "data"], "no manifest.json"),
    ],
)
def test_misuse_is_one_line_and_exit_code_two(project, capsys, arguments, message):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("assay: ")
    assert captured.err.count("\n") == 1


def test_a_changed_recipe_is_exit_code_two_unless_asked_for(project, capsys):
    assert main(["score", "recipe.yaml"]) == 0
    assert main(["score", "recipe.yaml", "--set", "seed=1"]) == 2
    assert "seed: 0 → 1" in capsys.readouterr().err
    assert main(["score", "recipe.yaml", "--set", "seed=1", "--rescore"]) == 0


def test_dry_run_and_validate_write_nothing(project, capsys):
    assert main(["score", "recipe.yaml", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "2 shards to score (0 of them again), 0 done" in out
    assert "reference: ref" in out
    assert main(["validate", "recipe.yaml"]) == 0
    assert "mimic (keep high)" in capsys.readouterr().out
    assert not project.scores.exists()


def test_quiet_is_quiet_and_logs_are_lines(project, capsys, monkeypatch):
    assert main(["score", "recipe.yaml", "--quiet"]) == 0
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
    assert main(["score", "recipe.yaml", "--set", "output=again", "--interval", "0"]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "rows/s" in line]
    assert lines
    assert "2 shards" in lines[0]


def test_control_characters_of_the_data_stay_out_of_the_terminal(project, capsys):
    name = "evil\x1b[31m\n.jsonl"
    project.write_shard(name, make_rows(2, 7))
    (project.root / "data/torn\x1b[2J.parquet").write_bytes(b"PAR1")
    assert main(["score", "recipe.yaml"]) == 1
    assert main(["ls", "scores"]) == 0
    captured = capsys.readouterr()
    assert "\x1b[31m" not in captured.out + captured.err
    assert "\x1b[2J" not in captured.out + captured.err
    assert r"\x1b[2J" in captured.err


def test_an_internal_error_is_one_line_unless_debugging(project, capsys, monkeypatch):
    def fail(*arguments, **options):
        raise KeyError("deep inside")

    monkeypatch.setattr("assay.engine.run", fail)
    assert main(["score", "recipe.yaml"]) == 2
    assert "internal error: KeyError" in capsys.readouterr().err
    monkeypatch.setenv("ASSAY_DEBUG", "1")
    with pytest.raises(KeyError):
        main(["score", "recipe.yaml"])


def test_version_help_doctor(capsys):
    import assay

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"assay {assay.__version__}\n"
    for arguments in ([], ["--help"], ["demo"]):
        assert main(arguments) == 0
        assert "Usage" in capsys.readouterr().out
    assert main(["doctor"]) == 0
    assert "torch" in capsys.readouterr().out


def run_command(*arguments: str, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "assay", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.slow
def test_every_process_writes_the_same_bytes(project):
    """Nothing may hang on the order of a set, which Python shuffles anew in every process."""
    written = []
    for seed in ("0", "1"):
        process = run_command("score", "recipe.yaml", "--quiet", env=os.environ | {"PYTHONHASHSEED": seed})
        assert process.communicate(timeout=60) == ("", "")
        written.append(project.tables())
        shutil.rmtree(project.scores)
    assert written[0] == written[1]


def test_an_interrupt_leaves_whole_tables_and_says_how_to_go_on(project):
    rows, shards = make_rows(20, 100), 300  # many, so that the signal comes long before the last
    for i in range(shards):
        project.write_shard(f"{i:03}.jsonl", rows)
    # What started the tests may ignore the signal, as a shell's background jobs do, and children inherit that.
    process = run_command("score", "recipe.yaml", preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    while not any(project.scores.glob("*.parquet")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "assay: interrupted; run the same command again to go on where it stopped"
    tables = list(project.scores.rglob("*.parquet"))
    assert 0 < len(tables) < shards
    assert all(pq.read_metadata(path).num_rows for path in tables)
    assert not list(project.scores.rglob("*.tmp"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_output_is_one_line(project, capsys):
    project.scores.mkdir()
    project.scores.chmod(0o500)
    assert main(["score", "recipe.yaml"]) == 2
    captured = capsys.readouterr()
    assert "Permission denied" in captured.err
    assert captured.err.count("\n") == 1


def test_a_full_disk_is_one_line_and_leaves_nothing(project, capsys):
    """/dev/full takes no byte; a file system of our own would need privileges."""
    import errno

    from assay.corpus import score_files

    class Full:
        def __init__(self, *arguments, **options):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "scores/a.parquet")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(score_files.pq, "ParquetWriter", Full)
        assert main(["score", "recipe.yaml", "--quiet"]) == 2
    captured = capsys.readouterr()
    assert captured.err == "assay: scores/a.parquet: No space left on device\n"
    assert not [path for path in project.scores.rglob("*") if path.suffix in (".tmp", ".parquet")]
    assert main(["score", "recipe.yaml"]) == 0


def test_other_makers_files_put_no_control_characters_on_the_terminal(project, capsys):
    """The manifest's columns, a method's name in a recipe, an unreadable folder of scores."""
    assert main(["score", str(project.path)]) == 0
    path = project.scores / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["columns"].append({"name": "\x1b[2Jevil\x07"})
    path.write_text(json.dumps(manifest))
    assert main(["ls", str(project.scores)]) == 0
    for broken in ("null", "[]", '{"corpus": 3}', "[" * 100_000, "\x00", '{"columns": [{"name": 1}]}'):
        path.write_text(broken)
        capsys.readouterr()
        assert main(["ls", str(project.scores)]) == 2
        assert "not a manifest of `assay score`" in capsys.readouterr().err
    methods = [{"method": "ensemble", "models": ["a", "b"], "name": "\x1b[31mred"}]
    project.write_recipe(methods=methods)
    main(["validate", str(project.path)])
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err


def test_a_corpus_all_in_quarantine_is_no_success(project, capsys):
    for shard in (project.root / "data").rglob("*.*"):
        shard.unlink()
    project.write_shard("a.jsonl", [{"id": "x", "pixels": None, "label": 0}])
    assert main(["score", str(project.path)]) == 1
    capsys.readouterr()
    out = str(project.root / "out")
    assert main(["select", str(project.scores), "--by", "mimic", "--top", "0.5", "--out", out]) == 1
    assert "no row has scores: all are in quarantine" in capsys.readouterr().err


def test_what_is_not_read_is_named_and_no_success(project, capsys):
    (project.root / "data/more.jsonl.lz4").write_bytes(b"")
    assert main(["score", str(project.path)]) == 1
    said = capsys.readouterr()
    assert "left out: 1 files or folders (more.jsonl.lz4: " in said.out
    out = str(project.root / "out")
    assert main(["select", str(project.scores), "--by", "mimic", "--top", "0.5", "--out", out]) == 1
    assert "left out: 1 files or folders (more.jsonl.lz4: " in capsys.readouterr().err
