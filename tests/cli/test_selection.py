"""`assay select --where`."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import assay
from assay.cli import main
from tests.small_scores import Column, make_scores


@pytest.fixture
def scores(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = np.array([0.5, np.nan, -1.0, 2.0], np.float32)
    return make_scores(tmp_path, {"a": {"mimic": values, "loss": values[::-1].copy()}})


def test_rows_that_pass_a_condition_are_written(scores, tmp_path, capsys):
    pytest.importorskip("duckdb")
    assert main(["select", scores, "--where", "mimic > 0 and\n loss < 9", "--out", "out"]) == 0
    said = capsys.readouterr().out
    assert "where mimic > 0 and loss < 9: 2 of 4 rows pass, 1 have no mimic (NaN), 1 have no loss (NaN)" in said
    assert "every row, where mimic > 0 and loss < 9: kept 2 of 4 rows (50.0%)" in said
    assert "rows in 4 = kept 2 + dropped 2 + quarantined 0" in said
    assert pq.read_table(tmp_path / "out/a.parquet")["id"].to_pylist() == ["a-0", "a-3"]
    assert main(["select", scores, "--where", "mimic > 0", "--by", "mimic", "--top", "0.5", "--out", "half"]) == 0
    assert json.loads((tmp_path / "half/manifest.json").read_text())["where"]["passed"] == 2
    assert pq.read_table(tmp_path / "half/a.parquet")["id"].to_pylist() == ["a-3"]


def test_a_mistake_is_shown_with_a_caret(scores, tmp_path, capsys):
    pytest.importorskip("duckdb")
    assert main(["select", scores, "--where", "loss\x1b > 0 or mimik < 1", "--out", "out"]) == 2
    assert capsys.readouterr().err.split("\n")[0].startswith("assay: --where: ")
    assert main(["select", scores, "--where", "loss > 0 or mimik < 1", "--out", "out"]) == 2
    assert capsys.readouterr().err == (
        "assay: --where: there is no score mimik; did you mean mimic?\n  loss > 0 or mimik < 1\n              ^\n"
    )
    assert not (tmp_path / "out").exists()


def test_without_duckdb_the_extra_is_named(scores, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "duckdb", None)
    assert main(["select", scores, "--where", "mimic > 0", "--out", "out"]) == 2
    assert "duckdb is not installed; it comes with `pip install 'assay[sql]'`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [(["b"], "--with b: expected NAME=DIR"), (["b=x", "b=y"], "--with b=y: b is x already; expected another name")],
)
def test_other_runs_need_a_name_each(scores, given, message, capsys):
    options = [word for text in given for word in ("--with", text)]
    assert main(["select", scores, "--where", "mimic > 0", *options, "--out", "out"]) == 2
    assert message in capsys.readouterr().err


def test_another_run_stands_beside(scores, tmp_path, capsys):
    pytest.importorskip("duckdb")
    other = make_scores(tmp_path, {"a": {"mimic": np.array([1, 1, 1, 1], np.float32)}}, name="other")
    assert main(["select", scores, "--where", "mimic > b.mimic", "--with", f"b={other}", "--out", "out"]) == 0
    assert pq.read_table(tmp_path / "out/a.parquet")["id"].to_pylist() == ["a-3"]


def test_coverage_of_every_difficulty_from_the_command_line(tmp_path, monkeypatch, capsys):
    """`--ccs` keeps what `select.ccs` keeps of all shards together, and says so in the manifest and to `explain`."""
    monkeypatch.chdir(tmp_path)
    loss = np.random.default_rng(0).exponential(size=(2, 100)).astype(np.float32)
    loss[0, 5] = np.nan
    scores = make_scores(tmp_path, {name: {"loss": loss[i]} for i, name in enumerate("ab")})
    command = ["select", scores, "--by", "loss", "--ccs", "0.3", "--hard", "high"]
    assert main([*command, "--drop", "0.2", "--seed", "3", "--out", "out"]) == 0
    expected = assay.select.ccs(pa.table({"loss": loss.reshape(-1)}), "loss", 0.3, 3, hard="high", drop=0.2)
    assert expected.summary() in capsys.readouterr().out
    fates = [row for name in "ab" for row in pq.read_table(tmp_path / f"out/_selection/{name}.parquet").to_pylist()]
    assert [row["kept"] for row in fates] == expected.mask.tolist()
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["rule"] == "loss, 0.3 by 50 strata without the hardest 0.2, seed 3"
    assert manifest["facts"] == expected.facts
    assert manifest["facts"]["hardest_dropped"] == 40
    hardest = int(np.nanargmax(loss[0]))
    assert main(["explain", scores, f"a-{hardest}", "--selection", "out"]) == 0
    assert "dropped: among the 40 hardest by loss" in capsys.readouterr().out
    assert main([*command, "--out", "default"]) == 0
    assert json.loads((tmp_path / "default/manifest.json").read_text())["facts"]["hardest_dropped"] == 20


def test_what_covers_every_difficulty_is_weighed_by_the_end_that_is_kept(tmp_path, monkeypatch, capsys):
    """A score that says no end to keep, of which `--hard` says which is hard and `--keep` which is worth more."""
    monkeypatch.chdir(tmp_path)
    loss = np.arange(10, dtype=np.float32)
    scores = make_scores(tmp_path, {"a": {"loss": loss}}, {"loss": Column("loss", "none")})
    command = ["select", scores, "--by", "loss", "--ccs", "4", "--hard", "high", "--format", "weights"]
    assert main([*command, "--temperature", "1", "--out", "out"]) == 2
    assert "does not say which end of it to keep" in capsys.readouterr().err
    assert main([*command, "--temperature", "1", "--keep", "low", "--out", "out"]) == 0
    (path,) = (tmp_path / "out/weights").iterdir()
    written = pq.read_table(path)
    kept = np.array([int(name.split("-")[1]) for name in written["id"].to_pylist()])
    expected = np.exp(-loss[kept].astype(np.float64))
    np.testing.assert_allclose(written["weight"].to_numpy(), 4 * expected / expected.sum(), rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ccs", "2"], "--hard is missing: --ccs needs to know which end of the score is hard"),
        (["--ccs", "2", "--hard", "up"], "--hard up: expected high or low"),
        (["--ccs", "2", "--hard", "low", "--keep", "high"], "--keep high: has no effect with --ccs"),
        (["--ccs", "2", "--hard", "low", "--group", "shard"], "--group shard: has no effect with --ccs"),
        (["--ccs", "2", "--hard", "low", "--drop", "1.5"], "drop=1.5: expected a share"),
        (["--ccs", "4", "--hard", "low"], "amount=4: 4 rows, but 3 of 4 are left"),
        (["--ccs", "x", "--hard", "low"], "'x' is no amount"),
        (["--top", "2", "--hard", "low"], "--hard low: has no effect with --top; expected with --ccs"),
        (["--top", "2", "--drop", "0.2"], "--drop 0.2: has no effect with --top; expected with --ccs"),
        (["--where", "loss > 0", "--drop", "0.2"], "--drop 0.2: has no effect with --where alone"),
        (["--top", "2", "--ccs", "2"], "got --top, --ccs"),
    ],
)
def test_options_of_coverage_that_are_refused(scores, options, message, capsys):
    assert main(["select", scores, "--by", "mimic", *options, "--out", "out"]) == 2
    assert message in capsys.readouterr().err
