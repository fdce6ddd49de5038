"""`assay select --where`."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from assay.cli import main
from tests.small_scores import make_scores


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
