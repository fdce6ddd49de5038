"""Why does an exact derivative not tell all of a drop? ``python -m benchmarks.quality.leaderboard.kinks``.

Adam's first steps are signs of gradients, so that a run jumps where one of them turns; ε_root in the root makes the
jump a slope of width √ε_root. MAGIC's LDS for each ε_root, where the board's drops take all of their rows' weight, a
tenth of it, and, in float64, a ten-thousandth; what it says itself that its scores miss; the run's metasmoothness and
loss.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from assay._json import dumps
from assay.retrain import Adam, Training, magic
from benchmarks import options
from benchmarks.quality.lds import predicted, spearman
from benchmarks.quality.leaderboard.__main__ import BOARDS
from benchmarks.quality.leaderboard.board import Array, Board
from benchmarks.quality.leaderboard.judging import drops_of
from benchmarks.quality.leaderboard.truth import query_losses, retrained
from benchmarks.timing import RESULTS, machine

EPS_ROOTS = (1e-12, 1e-10, 1e-8, 1e-6)
LOST = (1.0, 0.1)  # of the dropped rows' weight
TINY = 1e-4


def with_eps_root(board: Board, eps_root: float) -> Board:
    run = board.run
    assert isinstance(run.optimizer, Adam)
    optimizer = replace(run.optimizer, eps_root=eps_root)
    return replace(board, run=Training(run.model, run.losses, run.data, run.rows, optimizer))


def in_float64(board: Board) -> Any:
    """What the truth takes of a board, in float64."""

    def doubled(batch: Any) -> Any:
        return tuple(part.double() if part.is_floating_point() else part for part in batch)

    def batch(rows: Any) -> Any:
        return doubled(run.batch(rows))

    run, model = board.run, copy.deepcopy(board.run.model).double()
    twin = SimpleNamespace(model=model, rows=run.rows, rates=run.rates, optimizer=run.optimizer, batch=batch)
    return SimpleNamespace(run=twin, losses=board.losses, queries=doubled(board.queries), at_once=board.at_once)


def rises(board: Any, drops: torch.Tensor, size: int, lost: float) -> Array:
    """(R, Q): of the queries' losses where each drop's rows lose that part of their weight, per weight lost."""
    weights = torch.ones(1 + len(drops), size, dtype=next(board.run.model.parameters()).dtype)
    weights[1:].scatter_(1, drops, 1 - lost)
    losses = np.concatenate([query_losses(board, retrained(board, part)) for part in weights.split(board.at_once)])
    found: Array = (losses[1:] - losses[0]) / lost
    return found


def measure(board: Board, eps_root: float) -> dict[str, Any]:
    board, drops = with_eps_root(board, eps_root), drops_of(board)[board.share]
    found = magic(board.run, board.targets)
    guess = predicted(np.asarray(found.scores), drops)

    def lds(own: Any, lost: float) -> float:
        return round(float(spearman(guess, rises(own, drops, board.size, lost)).mean()), 4)

    return {
        "board": board.name,
        "eps_root": eps_root,
        "lds": {str(lost): lds(board, lost) for lost in LOST} | {str(TINY): lds(in_float64(board), TINY)},
        "missed": round(found.missed, 4),
        "metasmoothness": found.metasmoothness.numpy().round(4).tolist(),
        "query_loss": round(float(found.losses.mean()), 4),
    }


def shown(cases: list[dict[str, Any]]) -> Table:
    columns = ["board", "ε_root", *(f"LDS, {lost} of their weight" for lost in cases[0]["lds"])]
    table = Table(*columns, "missed", "metasmoothness", "query loss")
    for case in cases:
        numbers = [*case["lds"].values(), case["missed"], case["metasmoothness"], case["query_loss"]]
        table.add_row(case["board"], f"{case['eps_root']:g}", *map(str, numbers))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.leaderboard.kinks", description=__doc__)
    parser.add_argument("--bank", type=Path, default=options.cache("leaderboard"), help="the leaderboard's")
    given = parser.parse_args()
    torch.set_num_threads(1)
    boards = [BOARDS[name](given.bank) for name in ("digits", "images")]
    cases = [measure(board, eps_root) for board in boards for eps_root in EPS_ROOTS]
    Console().print(shown(cases))
    path = RESULTS / "quality-kinks.json"
    path.write_text(dumps({"machine": machine(), "cases": cases}, indent=1) + "\n")
    print("written to", path.relative_to(RESULTS.parent.parent))


if __name__ == "__main__":
    main()
