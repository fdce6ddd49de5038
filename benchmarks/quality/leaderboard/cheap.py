"""What every method has to beat: words, embeddings, losses, chance."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from assay.methods import (
    BM25,
    DSIR,
    Density,
    EmbeddingSimilarity,
    Ensemble,
    Leverage,
    NGramClassifier,
    OODFilter,
    RDSPlus,
    knn_shapley,
)
from assay.probe import Probe
from benchmarks.quality.leaderboard.board import Board, NotHere
from benchmarks.quality.leaderboard.entries import entry, scored, scored_texts

Array = NDArray[np.float64]


@entry("BM25")
def bm25(board: Board) -> Array:
    return scored_texts(board, lambda targets: BM25(targets))


@entry("n-gram classifier, one per query")
def classifier(board: Board) -> Array:
    return scored_texts(board, lambda targets: NGramClassifier(targets, buckets=1 << 14))


@entry("DSIR, one per query")
def dsir(board: Board) -> Array:
    return scored_texts(board, lambda targets: DSIR(targets))


@entry("embedding similarity")
def embeddings(board: Board) -> Array:
    return scored(board, EmbeddingSimilarity(board.model, board.task, board.targets))


@entry("RDS+")
def rds(board: Board) -> Array:
    if board.texts is None:
        raise NotHere("positions have weights, and these rows have none")
    return scored(board, RDSPlus(board.model, board.task, board.targets))


@entry("KNN-Shapley, K = 5")
def shapley_cosine(board: Board) -> Array:
    return shapley(board, "cosine")


@entry("KNN-Shapley, K = 5, Euclidean", rivals=["dattri KNN-Shapley"])
def shapley_euclidean(board: Board) -> Array:
    return shapley(board, "euclidean")


def shapley(board: Board, metric: Literal["cosine", "euclidean"]) -> Array:
    if board.texts is not None:
        raise NotHere("a text has no class")
    x, y = last_hidden(board, board.pool), board.pool[1]
    tx, ty = last_hidden(board, board.queries), board.queries[1]
    each = [knn_shapley([(x, y)], tx[i : i + 1], ty[i : i + 1], 5, metric=metric) for i in range(board.count)]
    return np.stack([values.numpy() for values in each], 1)


def last_hidden(board: Board, batch: Any) -> Tensor:
    """(B, D): a classifier's input of the output layer."""
    assert isinstance(board.model, nn.Sequential)
    with torch.no_grad():
        hidden: Tensor = board.model[:-1](batch[0])
    return hidden


@entry("nearness to the queries (OODFilter)")
def nearness(board: Board) -> Array:
    return -scored(board, OODFilter(board.model, board.task, board.targets), "ood_distance")


@entry("ensemble's disagreement")
def disagreement(board: Board) -> Array:
    return scored(board, Ensemble(board.ensemble, board.task), "ensemble_mutual_information")


@entry("leverage")
def leverage(board: Board) -> Array:
    return scored(board, Leverage(board.model, board.task), "leverage")


@entry("1 / density")
def density(board: Board) -> Array:
    return scored(board, Density(board.model, board.task), "density_weight")


@entry("the sample's own loss", "control")
def own_loss(board: Board) -> Array:
    probe = Probe(board.model, board.task, factors=(), logits=False)
    return np.concatenate([probe(batch).losses.double().numpy() for batch in board.batches])


@entry("random", "control")
def chance(board: Board) -> Array:
    return np.random.default_rng(0).standard_normal((board.size, board.count))
