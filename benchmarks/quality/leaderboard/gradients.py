"""Methods that take gradients of trained models."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from assay.methods import (
    EKFAC,
    EKFACCG,
    TRAK,
    DsDm,
    GradientCosine,
    GradMimic,
    GraNd,
    Influence,
    InfluenceDistillation,
    Kernel,
    LoGra,
    TrackStar,
)
from assay.ops import Kronecker, Mask, Rademacher, Sparse
from assay.retrain import Adam, Training
from benchmarks.quality.leaderboard.along import EXACT
from benchmarks.quality.leaderboard.board import Board, with_parameters
from benchmarks.quality.leaderboard.entries import entry, scored

Array = NDArray[np.float64]
K = 64  # of TRAK, its peers and the small sketch: well below the pool, or the second moment overfits


@entry("EK-FAC + CG")
def ekfac_cg(board: Board) -> Array:
    return scored(board, EKFACCG(board.model, board.task, board.targets))


@entry("EK-FAC", rivals=["kronfluence EK-FAC", "kronfluence EK-FAC, damping .1 mean", "dattri EK-FAC"])
def ekfac(board: Board) -> Array:
    return scored(board, EKFAC(board.model, board.task, board.targets))


@entry("gradient cosine", rivals=["dattri Grad-Cos", "bergson gradient cosine"])
def cosine(board: Board) -> Array:
    return scored(board, GradientCosine(board.model, board.task, board.targets))


@entry("gradient dot", rivals=["dattri Grad-Dot"])
def dot(board: Board) -> Array:
    return scored(board, Influence([board.model], board.task, board.targets, Kernel(), EXACT))


@entry("LoGra")
def logra(board: Board) -> Array:
    return scored(board, LoGra([board.model], board.task, board.targets))


@entry("LoGra, 4 × 4 a layer")
def logra_small(board: Board) -> Array:
    return scored(board, LoGra([board.model], board.task, board.targets, sketch=Kronecker(4, 4)))


@entry("GraSS")
def grass(board: Board) -> Array:
    return scored(board, LoGra([board.model], board.task, board.targets, sketch=Mask(32, 32, then=Sparse(256))))


@entry("TrackStar", rivals=["bergson TrackStar"])
def trackstar(board: Board) -> Array:
    return scored(board, TrackStar([board.model], board.task, board.targets))


@entry("TRAK, K = 1")
def trak_one(board: Board) -> Array:
    return scored(board, TRAK(board.ensemble[:1], board.task, board.targets, sketch=Kronecker(8, 8)))


@entry("TRAK, all members", rivals=["traker TRAK", "dattri TRAK"])
def trak(board: Board) -> Array:
    return scored(board, TRAK(board.ensemble, board.task, board.targets, sketch=Kronecker(8, 8)))


@entry("TRAK (Rademacher), all members", rivals=["traker TRAK", "dattri TRAK"])
def trak_dense(board: Board) -> Array:
    return scored(board, TRAK(board.ensemble, board.task, board.targets, sketch=Rademacher(K)))


@entry("DsDm, all queries one task")
def dsdm(board: Board) -> Array:
    return scored(board, DsDm(board.ensemble, board.task, board.targets, sketch=Kronecker(8, 8)), "dsdm")


@entry("influence distillation")
def distillation(board: Board) -> Array:
    method = InfluenceDistillation(
        board.model, board.task, board.targets, landmarks=board.size // 5, sketch=EXACT, at=None
    )
    return scored(board, method)


@entry("gradient mimic, reference trained on the queries")
def mimic(board: Board) -> Array:
    everything = [np.arange(board.count)] * 20
    rate = max(board.run.rates)
    further = Training(board.model, board.task, board.queries, everything, Adam([rate / 10] * 20, eps_root=1e-12))
    reference = with_parameters(board.model, further.train())
    return scored(board, GradMimic(board.model, reference, board.task), "mimic")


@entry("GraNd")
def grand(board: Board) -> Array:
    return scored(board, GraNd(board.model, board.task), "grand")
