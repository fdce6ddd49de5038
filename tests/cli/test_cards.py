"""`assay show`: the samples themselves beside their scores."""

from __future__ import annotations

import json
import os

import pytest
from rich.cells import cell_len

from assay.cli import main
from tests.small_models import TEXTS, save_model, write_recipe
from tests.small_project import make_project

EVIL = "evil \x1b[2J\u202ereversed\u202c [red]markup[/red] " + "x" * 400


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Scored texts, one of them hostile."""
    root = tmp_path_factory.mktemp("texts")
    write_recipe(root, {"a": save_model(root / "a")})
    rows = [{"text": text} for text in [*TEXTS, EVIL]]
    (root / "data/a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["score", str(root / "recipe.yaml"), "--quiet"]) == 0
    return root


def test_both_ends_with_their_samples(texts, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "72")
    assert main(["show", str(texts / "scores"), "--by", "ensemble_nll", "--worst", "9", "--best", "2"]) == 0
    out = capsys.readouterr().out
    assert "9 worst of 9 rows (highest ensemble_nll)" in out
    assert "2 best of 9 rows (lowest ensemble_nll)" in out
    assert all(text in out for text in TEXTS)
    assert r"evil \x1b[2J\u202ereversed\u202c [red]markup[/red] xxx" in out
    for line in out.splitlines():
        assert line.isprintable()
        assert cell_len(line) <= 72


def test_json_has_every_value_in_full(texts, capsys):
    assert main(["show", str(texts / "scores"), "--worst", "9", "--json"]) == 0
    out = capsys.readouterr().out
    assert out.isascii()
    shown = json.loads(out)
    assert [card["place"] for card in shown] == list(range(1, 10))
    assert {card["sample"]["text"] for card in shown} == {*TEXTS, EVIL}
    values = [card["scores"]["ensemble_nll"] for card in shown]
    assert values == sorted(values, reverse=True)
    assert {card["end"] for card in shown} == {"worst"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--by", "ensemble_nl"], "--by ensemble_nl: "),
        (["--by", "ensemble_entropy"], "--keep high or low"),
        (["--worst", "-1"], "--worst -1: expected 0 or more"),
        (["--corpus", "nowhere"], "nowhere"),
    ],
)
def test_misuse_is_one_line(texts, capsys, arguments, message):
    assert main(["show", str(texts / "scores"), *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not captured.out


def test_what_cannot_be_shown_is_named_and_no_success(tmp_path, capsys):
    project = make_project(tmp_path)
    assert main(["score", str(project.path), "--quiet"]) == 0
    os.utime(project.root / "data/a.parquet")
    assert main(["show", str(project.scores), "--by", "mimic", "--worst", "1"]) == 1
    captured = capsys.readouterr()
    assert "(deep/b.jsonl:" in captured.out
    assert captured.err == ("assay: 1 shards are not in it (a.parquet: the file has changed since it was scored)\n")
    assert main(["show", str(project.scores), "--tokens"]) == 2
    assert "a classification task have no tokens" in capsys.readouterr().err


def test_a_corpus_that_has_moved_is_found_where_it_is_now(tmp_path, capsys):
    project = make_project(tmp_path)
    assert main(["score", str(project.path), "--quiet"]) == 0
    (project.root / "data").rename(project.root / "elsewhere")
    assert main(["show", str(project.scores), "--by", "mimic"]) == 2
    assert "if the corpus has moved, say where it is with --corpus" in capsys.readouterr().err
    assert main(["show", str(project.scores), "--by", "mimic", "--corpus", str(project.root / "elsewhere")]) == 0
