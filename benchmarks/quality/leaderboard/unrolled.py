"""Methods that unroll training in segments, or solve with the curvature at its end in other ways."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from assay.methods import ASTRA, EKFAC, EKFACCG, SOURCE, TracIn
from benchmarks.quality.leaderboard.board import Board
from benchmarks.quality.leaderboard.entries import entry, scored

Array = NDArray[np.float64]


def _source(board: Board, **settings: str) -> Array:
    found = board.checkpoints
    states = [c.adam for c in found if c.adam is not None] or None
    method = SOURCE(
        [c.model for c in found], board.task, board.targets, [c.rate for c in found], optimizers=states, **settings
    )
    return scored(board, method)


@entry("SOURCE")
def source(board: Board) -> Array:
    return _source(board)


@entry("SOURCE, EK-FAC's curvature")
def source_ekfac(board: Board) -> Array:
    return _source(board, curvature="ekfac")


@entry("EK-FAC + CG, λ = 1/Ση")
def by_rates(board: Board) -> Array:
    rates = sum(c.rate for c in board.checkpoints)
    return scored(board, EKFACCG(board.model, board.task, board.targets, rate_sum=rates))


@entry("ASTRA")
def astra(board: Board) -> Array:
    return scored(board, ASTRA(board.model, board.task, board.targets))


@entry("EK-FAC in Shampoo's basis")
def shampoo(board: Board) -> Array:
    return scored(board, EKFAC(board.model, board.task, board.targets, basis="shampoo"))


@entry("TracIn, checkpoints of all epochs", rivals=["dattri TracIn"])
def tracin(board: Board) -> Array:
    models, rates = [c.model for c in board.checkpoints], [c.rate for c in board.checkpoints]
    return scored(board, TracIn(models, board.task, board.targets, rates))
