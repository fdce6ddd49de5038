"""The leaderboard at its smallest: its truth trains the run, methods come in order, its bank refuses others'."""

from __future__ import annotations

import importlib
import inspect
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import assay.methods
from benchmarks.quality.leaderboard import classifiers, digits, report
from benchmarks.quality.leaderboard.__main__ import QUICK, chosen, measure
from benchmarks.quality.leaderboard.bank import Bank
from benchmarks.quality.leaderboard.board import Board
from benchmarks.quality.leaderboard.entries import Entry, register
from benchmarks.quality.leaderboard.forks import Job, forked
from benchmarks.quality.leaderboard.judging import judged, recall, truth_of
from benchmarks.quality.leaderboard.report import filled, markdown
from benchmarks.quality.leaderboard.truth import losses_without

SMALL = replace(digits.QUICK, members=1, steps=28, drops=20, queries=5, larger=(0.3,))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bank")


@pytest.fixture(scope="module")
def case(root: Path) -> dict[str, Any]:
    entries = register()
    return measure(classifiers.build(SMALL, root), {label: entries[label] for label in QUICK}, at_once=0)


def test_methods_come_in_the_order_of_what_they_know(case: dict[str, Any]) -> None:
    lds = {label: row["lds"]["value"] for label, row in case["methods"].items()}
    assert not case["absent"]
    assert min(case["metasmoothness"]) > 0.95
    assert lds["MAGIC"] > 0.95
    assert lds["MAGIC"] > lds["EK-FAC"] + 0.03
    assert lds["EK-FAC"] > lds["TRAK, K = 1"] + 0.1  # projected to 64 numbers
    assert lds["TRAK, K = 1"] > lds["random"] + 0.1
    assert lds["EK-FAC + CG"] > lds["random"] + 0.3
    worth = case["methods"]["MAGIC"]
    assert worth["minus"]["EK-FAC"]["lds"]["interval"][0] > 0  # paired, for intervals alone overlap
    for measure_ in ("qld", "tail"):
        assert worth[measure_]["interval"][0] > case["methods"]["random"][measure_]["interval"][1]
    assert worth["larger"]["0.3"]["value"] > 0.9
    assert 0.8 < worth["lds"]["slope"] < worth["larger"]["0.3"]["slope"] < 3  # a first derivative: less than what it is


def test_a_page_has_the_tables_of_its_marks(case: dict[str, Any]) -> None:
    name = case["name"]
    page = f"a\n<!-- {name} -->\nold\n<!-- end of {name} -->\nb\n<!-- other -->\nkept\n<!-- end of other -->\n"
    page += f"<!-- {name}: random; MAGIC -->\n<!-- end of {name} -->\nc\n"
    found = filled(page, {name: case})
    assert found == filled(found, {name: case})
    whole, few = (part.split("<!-- end")[0] for part in found.split(f"<!-- {name}")[1:])
    assert "old" not in found
    assert "kept" in found
    assert whole.count("\n| ") == 1 + len(case["methods"])
    assert [line.split(" | ")[0] for line in few.splitlines() if line.startswith("| ")] == ["| ", "| MAGIC", "| random"]
    with pytest.raises(ValueError, match=r"digits-quick: no row 'magic'; expected some of \['MAGIC'"):
        filled(page.replace("MAGIC", "magic"), {name: case})


def test_the_truths_loop_trains_the_run(root: Path, case: dict[str, Any]) -> None:
    board = classifiers.build(SMALL, root)
    with torch.no_grad():
        own = classifiers.losses(board.model, board.queries).numpy()
    (base,) = losses_without(board, [()], 0)
    np.testing.assert_allclose(base, own, atol=1e-5)


def test_a_new_method_costs_its_own_retrainings_alone(
    root: Path, case: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[int, ...]] = []
    from benchmarks.quality.leaderboard import truth

    real = truth.losses_of
    monkeypatch.setattr(truth, "losses_of", lambda board, rows: (made.extend(rows), real(board, rows))[1])
    board = classifiers.build(SMALL, root)
    known = truth_of(board, 0)
    assert len(made) == 1  # the one that is made again, to see that the bank is not stale
    scores = {"rows in their order": np.repeat(-np.arange(200.0)[:, None], board.count, 1)}
    before = len(made)
    rows = judged(board, known, scores, np.zeros((200, board.count)), {}, 0)
    assert len(made) == before + 2  # rows 0 and 1, for all queries, and again one that was there
    assert set(rows["rows in their order"]) == {"lds", "larger", "qld", "tail", "minus"}
    nothing = judged(board, known, {"0": np.zeros((200, board.count))}, np.zeros((200, board.count)), {}, None)["0"]
    assert (nothing["lds"]["value"], nothing["lds"]["slope"]) == (0, None)


def test_rows_measured_one_by_one_are_those_measured_at_once(tmp_path: Path) -> None:
    made: list[str] = []

    def drawn(label: str, seed: int, rivals: tuple[str, ...] = ()) -> Entry:
        def scores(board: Board) -> Any:
            made.append(label)
            return np.random.default_rng(seed).standard_normal((board.size, board.count))

        return Entry(label, scores, "peer" if seed == 2 else "assay", rivals)

    entries = {e.label: e for e in (drawn("EK-FAC", 1, ("its peer",)), drawn("its peer", 2), drawn("BM25", 3))}
    board = classifiers.build(replace(SMALL, steps=8, drops=8, queries=2), tmp_path)
    together = measure(board, entries, 0)["methods"]
    later = measure(board, {"EK-FAC": entries["EK-FAC"]}, 0, beside=entries)
    assert made == ["EK-FAC", "its peer", "BM25", "EK-FAC"]
    assert later["methods"].keys() == together.keys()
    for label, row in later["methods"].items():
        for what in ("lds", "qld", "minus", "kind"):
            assert row[what] == together[label][what]
    (heading,) = [line for line in markdown(later).splitlines() if "LDS | less" in line]
    assert heading == "|  | LDS | less EK-FAC | QLD | less BM25 | tail patch | s | MB |"
    assert "| EK-FAC − *its peer* |" in markdown(later)


def test_what_was_not_measured_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, labels = tmp_path / "page.md", ["MAGIC", "random", "oracle"]
    page.write_text("<!-- figure -->\n<!-- digits -->\n<!-- end of digits -->\n")
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "DOCS", tmp_path)
    monkeypatch.setattr(report, "PAGES", (page.name,))
    found = {"value": 0.5, "interval": [0.4, 0.6]}
    lost = {"value": math.nan, "interval": [math.nan, math.inf]}  # a retraining diverged
    row = {"lds": found, "qld": lost, "tail": found, "minus": {}, "kind": "assay", "seconds": 1.0, "megabytes": None}
    board = {"name": "digits", "title": "a board", "bank": "1", "train": 9, "queries": 2, "steps": 3, "drops": 4}
    board |= {"share": 0.01, "larger": [], "metasmoothness": [1.0], "query_loss": 0.1, "absent": {"BM25": "no texts"}}
    report.write([{**board, "methods": {"MAGIC": row}}], 1.0, labels, some=True)
    assert "Not measured so far: random; oracle." in page.read_text()
    report.write([{**board, "methods": {"random": row}}], 1.0, labels, some=True)
    told = page.read_text()
    assert told.count("| nan [nan, inf] |") == 2
    assert all(text in told for text in ("| MAGIC |", "| random |", "Not measured so far: oracle.", "BM25 (no texts)"))
    with pytest.raises(SystemExit, match="measure all of it first"):
        report.write([{**board, "bank": "2", "methods": {}}], 1.0, [], some=True)


def test_a_qld_that_was_not_taken_is_said(root: Path, case: dict[str, Any]) -> None:
    score = np.random.default_rng(7).standard_normal((200, 5))
    entries = {"random": register()["random"], "new": Entry("new", lambda board: score, "assay")}
    board = classifiers.build(SMALL, root)
    before = len(board.bank.known)
    found = measure(board, entries, 0, qld=False)
    assert len(board.bank.known) == before
    assert found["methods"]["random"]["qld"] == case["methods"]["random"]["qld"]
    assert "qld" not in found["methods"]["new"]
    (line,) = [line for line in markdown(found).splitlines() if line.startswith("| new |")]
    assert line.split(" | ")[3] == "not taken"


def test_a_row_comes_with_what_it_is_read_beside() -> None:
    entries = register()
    peer = set(chosen(entries, ["traker TRAK"]))
    assert {"TRAK, all members", "dattri TRAK", "EK-FAC", "kronfluence EK-FAC", "BM25", "random"} <= peer
    assert "LESS" not in peer
    assert set(chosen(entries, ["traker TRAK"], kept=entries)) == {"traker TRAK"}
    assert chosen(entries, []) == entries
    with pytest.raises(SystemExit, match="--only astrology: no such row"):
        chosen(entries, ["astrology"])


def test_a_bank_of_another_board_is_refused(tmp_path: Path) -> None:
    facts = {"board": "b", "run": "1", "members": "", "queries": "", "optimizer": "", "torch": "2"}
    mine, other = Bank(tmp_path, facts), Bank(tmp_path, facts | {"run": "2"})
    assert mine.folder != other.folder
    other.tensors("run", lambda: {"states": torch.zeros(2)})
    (other.folder / "run.safetensors").rename(mine.folder / "run.safetensors")
    with pytest.raises(ValueError, match=r"another board's trainings gave: run found '2', expected '1'; delete"):
        mine.tensors("run", dict)
    (mine.folder / "run.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot be read"):
        mine.tensors("run", dict)


def test_a_stale_bank_is_refused(tmp_path: Path) -> None:
    setting = replace(SMALL, steps=8, queries=2)
    board = classifiers.build(setting, tmp_path)
    losses_without(board, [()], 0)
    path = board.bank.folder / "retrainings.safetensors"
    kept = load_file(path)
    save_file({**kept, "losses": kept["losses"] + 0.01}, path, {"key": board.bank.key})
    with pytest.raises(ValueError, match="stale; delete the folder"):
        losses_without(classifiers.build(setting, tmp_path), [()], 0)


def test_another_order_is_another_bank(tmp_path: Path) -> None:
    changes = {}, {"rate": 0.02}, {"steps": 24}
    folders = {classifiers.build(replace(SMALL, **change), tmp_path).bank.folder for change in changes}
    assert len(folders) == 3


def test_recall_counts_the_rows_that_state_a_fact() -> None:
    score = np.array([[5.0, 0], [4, 1], [3, 2], [2, 9], [1, 8]])
    assert recall(score, {0: [1, 2], 1: [3, 4]}) == {"mrr": 0.75, "first": 0.5, "share": 0.75}


def test_scores_of_another_shape_or_without_a_number_are_refused(root: Path) -> None:
    board = classifiers.build(SMALL, root)
    with pytest.raises(ValueError, match=r"expected scores \(200, 5\), got \(5, 200\)"):
        Entry("x", lambda board: np.zeros((5, 200)), "assay")(board)
    with pytest.raises(ValueError, match="no row has one"):
        Entry("x", lambda board: np.full(200, np.nan), "assay")(board)
    partly = np.arange(200.0)
    partly[3] = np.nan
    assert (Entry("x", lambda board: partly, "assay")(board)[3] == 0).all()  # the least


def test_a_peer_that_is_not_installed_is_named() -> None:
    assert (
        Entry("x", lambda board: np.zeros(1), "peer", module="no_such_peer").missing == "no_such_peer is not installed"
    )


def test_a_job_that_fails_or_dies_is_its_own_row() -> None:
    def fail() -> None:
        raise RuntimeError("this one\nand more")

    def spin() -> None:
        while True:
            pass

    jobs = {
        "fine": Job(lambda: torch.ones(3)),
        "fails": Job(fail),
        "dies": Job(lambda: os._exit(1)),
        "spins": Job(spin),
    }
    done = dict(forked(jobs, 2, limit=1))
    assert done["fine"].error is None
    assert done["fine"].value.tolist() == [1, 1, 1]
    assert done["fails"].error == "RuntimeError: this one"
    assert done["dies"].error == "its process died (1)"
    assert done["spins"].error == "took too long"


def test_every_method_with_targets_is_on_the_board() -> None:
    register()
    modules = [
        importlib.import_module(f"benchmarks.quality.leaderboard.{name}")
        for name in ("along", "unrolled", "gradients", "cheap")
    ]
    missing = [
        name
        for name in assay.methods.__all__
        if inspect.isclass(kind := getattr(assay.methods, name))
        and (given := inspect.signature(kind).parameters.get("targets")) is not None
        and "Targets" in str(given.annotation)
        and not any(hasattr(module, name) for module in modules)
        and name != "TRIAGE"  # of regressions alone, and its targets are there to calibrate
    ]
    assert not missing
