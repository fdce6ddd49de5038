"""What scores are worth: by retraining, by one more step, by planted facts. Intervals and paired differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.quality.lds import interval, lds
from benchmarks.quality.leaderboard.bank import Rows
from benchmarks.quality.leaderboard.board import Board
from benchmarks.quality.leaderboard.truth import losses_without

Array = NDArray[np.float64]
RESAMPLES = 1000
TAIL = 10  # rows whose steps are taken, one by one
AGAINST = ("EK-FAC", "BM25")  # what every row is compared with, beside its rivals


@dataclass(frozen=True)
class Removals:
    """What retraining without a share of the rows did.

    Attributes:
        drops: (R, n) rows, drawn once.
        rises: (R, Q) of the queries' losses after them.
    """

    drops: torch.Tensor
    rises: Array


@dataclass(frozen=True)
class Truth:
    """What retraining says of a board.

    Attributes:
        removals: by share.
        base: (Q,) losses of the run.
    """

    removals: Mapping[float, Removals]
    base: Array


def drops_of(board: Board) -> dict[float, torch.Tensor]:
    """By share (R, n) rows."""
    generator, drops = torch.Generator().manual_seed(1), dict[float, torch.Tensor]()
    for share in (board.share, *board.larger):
        orders = [torch.randperm(board.size, generator=generator) for _ in range(board.drops)]
        drops[share] = torch.stack(orders)[:, : max(1, round(share * board.size))]
    return drops


def truth_of(board: Board, at_once: int) -> Truth:
    """From the bank, or trained."""
    drops = drops_of(board)
    found = losses_without(board, [(), *(_rows(row) for own in drops.values() for row in own)], at_once)
    rises = (found[1:] - found[0]).reshape(len(drops), board.drops, -1)
    return Truth({s: Removals(own, r) for (s, own), r in zip(drops.items(), rises, strict=True)}, found[0])


def judged(
    board: Board,
    truth: Truth,
    scores: Mapping[str, Array],
    tails: Array,
    rivals: Mapping[str, Sequence[str]],
    n: int | None,
) -> dict[str, dict[str, Any]]:
    """By label what its scores are worth.

    Args:
        tails: (N, Q), see ``truth.tail_patches``.
        rivals: labels that a label is compared with.
        n: processes that retrain for the QLD; 0: this one; None: none does, and what takes retrainings that the bank
            lacks has no QLD.
    """
    rises = _top_rises(board, truth, scores, n)
    rows: dict[str, dict[str, Any]] = {}
    draws: dict[str, dict[str, Array]] = {}
    for label, score in scores.items():
        predicted, of_lds = lds_of(score, truth.removals[board.share])
        best = np.argsort(-score, 0, kind="stable")[:TAIL]
        of_tail = np.take_along_axis(tails, best, 0).mean(0)
        draws[label] = {"lds": of_lds}
        rows[label] = {
            "lds": predicted,
            "larger": {f"{share:g}": lds_of(score, truth.removals[share])[0] for share in board.larger},
            "tail": {"value": float(f"{of_tail.mean():.4g}"), "interval": _interval(_means(of_tail), 9)},
            **({"recall": recall(score, board.gold)} if board.gold else {}),
        }
    for label, rise in rises.items():
        draws[label]["qld"] = _means(rise)
        rows[label]["qld"] = {"value": round(float(rise.mean()), 5), "interval": _interval(draws[label]["qld"])}
    for label, row in rows.items():
        others = [other for other in (*AGAINST, *rivals.get(label, ())) if other in rows and other != label]
        row["minus"] = {
            other: {
                measure: {
                    "value": round(row[measure]["value"] - rows[other][measure]["value"], 5),
                    "interval": _interval(draws[label][measure] - draws[other][measure]),
                }
                for measure in ("lds", "qld")
                if measure in row and measure in rows[other]
            }
            for other in others
        }
    return rows


def lds_of(score: Array, removals: Removals) -> tuple[dict[str, Any], Array]:
    """The LDS with its interval, ``slope``: by how much the rises are more than Σ score of the dropped, by least
    squares, which says something of scores in the loss' units, and nothing (None) of scores that are 0; and the LDS'
    resamples."""
    value, draws = lds(score, removals.drops, removals.rises, RESAMPLES // 5)
    guess = np.stack([score[rows].sum(0) for rows in removals.drops.numpy()])
    length = float((guess * guess).sum())
    slope = float(f"{(guess * removals.rises).sum() / length:.4g}") if length > 0 else None
    return {"value": round(value, 4), "interval": interval(draws), "slope": slope}, draws


def _top_rises(board: Board, truth: Truth, scores: Mapping[str, Array], n: int | None) -> dict[str, Array]:
    """By label (Q,): the rise of each query's loss after training without its own best 1 %."""
    size = max(1, board.size // 100)
    tops = {
        label: [_rows(column) for column in np.argsort(-score, 0, kind="stable")[:size].T]
        for label, score in scores.items()
    }
    if n is None:
        tops = {label: each for label, each in tops.items() if not board.bank.missing(each)}
    if not tops:
        return {}
    found = losses_without(board, [rows for each in tops.values() for rows in each], n or 0)
    split = found.reshape(len(tops), board.count, board.count)
    return {label: own.diagonal() - truth.base for label, own in zip(tops, split, strict=True)}


def recall(score: Array, gold: Mapping[int, Sequence[int]]) -> dict[str, float]:
    """Of the rows that state a query's fact: the mean reciprocal rank of the first, how often one is first, and the
    share of them among as many best rows as there are. Ties in the rows' order."""
    firsts, shares = [], []
    for query, rows in gold.items():
        order = np.argsort(-score[:, query], kind="stable")
        ranks = np.flatnonzero(np.isin(order, rows)) + 1
        firsts.append(int(ranks[0]))
        shares.append(float((ranks <= len(rows)).mean()))
    reciprocal = [1 / rank for rank in firsts]
    return {
        "mrr": round(float(np.mean(reciprocal)), 4),
        "first": round(float(np.mean([rank == 1 for rank in firsts])), 4),
        "share": round(float(np.mean(shares)), 4),
    }


def _rows(values: Any) -> Rows:
    return tuple(sorted(int(v) for v in values))


def _means(values: Array) -> Array:
    """(resamples,) means over queries, the same queries for every method."""
    rng = np.random.default_rng(0)
    found: Array = values[rng.integers(len(values), size=(RESAMPLES, len(values)))].mean(1)
    return found


def _interval(draws: Array, digits: int = 5) -> list[float]:
    return [round(float(q), digits) for q in np.quantile(draws, (0.025, 0.975))]
