"""Judge every method on the same checkpoints: ``python -m benchmarks.quality.leaderboard --help``."""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from assay.retrain import metasmoothness
from benchmarks import options
from benchmarks.quality.leaderboard import classifiers, digits, images, report, text
from benchmarks.quality.leaderboard.board import Board
from benchmarks.quality.leaderboard.entries import Entry, register
from benchmarks.quality.leaderboard.forks import Done, Job, forked, here
from benchmarks.quality.leaderboard.judging import judged, truth_of
from benchmarks.quality.leaderboard.truth import tail_patches

BOARDS = {
    "digits": partial(classifiers.build, digits.DIGITS),
    "digits-sgd": partial(classifiers.build, digits.SGD_DIGITS),
    "digits-rough": partial(classifiers.build, digits.ROUGH),
    "images": partial(classifiers.build, images.IMAGES),
    "text": partial(text.build, text.TEXT),
}
QUICK = ["MAGIC", "EK-FAC + CG", "EK-FAC", "LoGra, 4 × 4 a layer", "TRAK, K = 1", "the sample's own loss", "random"]
ALWAYS = ("EK-FAC", "BM25", "random")  # what any row is read beside
TAILS, SMOOTHNESS = "tails", "smoothness"


def measure(
    board: Board,
    entries: Mapping[str, Entry],
    at_once: int,
    beside: Mapping[str, Entry] = MappingProxyType({}),
    qld: bool = True,
) -> dict[str, Any]:
    """A board with some rows, so many processes at a time; 0: in this one.

    Args:
        beside: rows that are judged with them by the scores that the bank has of them.
        qld: retrain without each row's best, where the bank does not know.
    """
    _ = board.model, board.ensemble  # before the processes divide: they share them
    own = _run(board, entries, at_once)
    done = {label: one for label in beside if label not in entries and (one := board.bank.scores(label))} | own
    tails, smoothness = (_value(board, name, done.pop(name)) for name in (TAILS, SMOOTHNESS))
    truth = truth_of(board, at_once)
    known = {**beside, **entries}
    scores = {label: one.value for label, one in done.items() if one.error is None}
    rivals = {label: known[label].rivals for label in scores}
    rows = judged(board, truth, scores, tails, rivals, at_once if qld else None)
    for label, row in rows.items():
        row |= {
            "kind": known[label].kind,
            "seconds": round(done[label].seconds, 2),
            "megabytes": None if (used := done[label].megabytes) is None else round(used, 1),
        }
    missing = {label: e.missing for label, e in entries.items() if e.missing}
    failed = {label: one.error.removeprefix("NotHere: ") for label, one in done.items() if one.error}
    return {
        "name": board.name,
        "title": board.title,
        "bank": board.bank.key[:12],
        "train": board.size,
        "queries": board.count,
        "steps": board.run.steps,
        "drops": board.drops,
        "share": board.share,
        "larger": list(board.larger),
        "metasmoothness": np.round(smoothness, 4).tolist(),
        "query_loss": round(float(truth.base.mean()), 4),
        "random_drop_raises_loss_by": round(float(truth.removals[board.share].rises.mean()), 6),
        "methods": rows,
        "absent": {**missing, **failed},
    }


def _run(board: Board, entries: Mapping[str, Entry], at_once: int) -> dict[str, Done]:
    """The scores of all rows that can be had, kept as they come; tail patches and metasmoothness."""
    jobs = {label: Job(partial(e, board), e.module) for label, e in entries.items() if not e.missing}
    jobs[TAILS] = Job(partial(_of_board, board, TAILS, lambda: torch.from_numpy(tail_patches(board))))
    jobs[SMOOTHNESS] = Job(partial(_of_board, board, SMOOTHNESS, lambda: metasmoothness(board.run, directions=2)))
    found = dict[str, Done]()
    for label, done in forked(jobs, at_once) if at_once else here(jobs):
        found[label] = done
        if label in entries and not done.error:
            board.bank.keep_scores(label, done)
    return {label: found[label] for label in jobs}


def _of_board(board: Board, name: str, make: Callable[[], Tensor]) -> NDArray[np.float64]:
    return np.asarray(board.bank.tensors(name, lambda: {name: make()})[name])


def _value(board: Board, name: str, done: Done) -> NDArray[np.float64]:
    if done.error:
        raise RuntimeError(f"{board.name}: {name}: {done.error}")
    return np.asarray(done.value)


def chosen(entries: Mapping[str, Entry], only: Sequence[str], kept: Container[str] = ()) -> dict[str, Entry]:
    """Those whose labels contain one of some words (all, without any), and of what they are read beside what is not
    kept: their rivals, rivals' rivals and what is always there.

    Raises:
        SystemExit: a word that is in no label.
    """
    if not only:
        return dict(entries)
    named = set[str]()
    for word in only:
        found = [label for label in entries if label == word]
        found = found or [label for label in entries if word.casefold() in label.casefold()]
        if not found:
            raise SystemExit(f"--only {word}: no such row; there are {', '.join(entries)}")
        named.update(found)
    wanted, pairs = {*named, *ALWAYS}, [{label, other} for label, e in entries.items() for other in e.rivals]
    while more := {label for pair in pairs if pair & wanted for label in pair} - wanted:
        wanted |= more
    return {label: e for label, e in entries.items() if label in named or (label in wanted and label not in kept)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.quality.leaderboard", description=__doc__)
    parser.add_argument("--board", choices=[*BOARDS, "all"], action="append")
    parser.add_argument("--only", nargs="+", default=[], metavar="METHOD", help="words of rows' names")
    parser.add_argument("--no-qld", action="store_true", help="retrain for no single row: only QLDs that are kept")
    parser.add_argument("--quick", action="store_true", help="a small board and a few methods")
    parser.add_argument("--write", action="store_true", help="put what is found into benchmarks/results")
    parser.add_argument("--bank", type=Path, default=options.cache("leaderboard"), help="where trainings are kept")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="at a time, one thread each; 0: this one")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.quick and given.write:
        parser.error("--quick is no measurement: expected it without --write")
    begun, console, entries = time.perf_counter(), Console(width=150), register()
    with ExitStack() as stack:
        if given.quick:
            root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            boards = [classifiers.build(digits.QUICK, root)]
            entries = {label: entries[label] for label in QUICK}
        else:
            names = given.board or ["all"]
            boards = [build(given.bank) for name, build in BOARDS.items() if name in names or "all" in names]
        cases = []
        for board in boards:
            kept = {label: e for label, e in entries.items() if board.bank.scores(label)}
            rows = chosen(entries, given.only, kept)
            beside = kept if given.only else {}
            cases.append(measure(board, rows, given.processes, beside, not given.no_qld))
            report.show(console, cases[-1])
    console.print(f"{time.perf_counter() - begun:.0f} s")
    if given.write:
        report.write(cases, time.perf_counter() - begun, entries, bool(given.only))


if __name__ == "__main__":
    main()
