"""The rows of the board: a label and a function from the board to scores (N, Q), high where a row helps a query.

A score that is of a row alone is (N,), the same for every query. What cannot speak on a board raises ``NotHere``.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import nn

import assay
from benchmarks.quality.leaderboard.board import Board, NotHere

Array = NDArray[np.float64]
Kind = Literal["assay", "control", "peer"]
Scores = Callable[[Board], Array]
REGISTRY: dict[str, Entry] = {}


@dataclass(frozen=True)
class Entry:
    """A row of the table.

    Attributes:
        scores: what it gives.
        kind: whose it is.
        rivals: labels of other implementations of the same, for paired differences.
        module: a package that it takes; where it is missing, the row says so.
    """

    label: str
    scores: Scores
    kind: Kind
    rivals: Sequence[str] = ()
    module: str | None = None

    @property
    def missing(self) -> str | None:
        """Why it cannot run at all."""
        if self.module is None or importlib.util.find_spec(self.module) is not None:
            return None
        return f"{self.module} is not installed"

    def __call__(self, board: Board) -> Array:
        """(N, Q) finite: rows without a score come last.

        Raises:
            ValueError: another shape, a query without a single score, or an infinite one.
        """
        found = np.asarray(self.scores(board), dtype=np.float64)
        if found.ndim == 1:
            found = np.repeat(found[:, None], board.count, 1)
        if found.shape != (board.size, board.count):
            raise ValueError(f"{self.label}: expected scores {(board.size, board.count)}, got {found.shape}")
        if np.isinf(found).any() or np.isnan(found).all(0).any():
            raise ValueError(f"{self.label}: an infinite score, or a query for which no row has one")
        return np.where(np.isnan(found), np.nanmin(found, 0), found)


def entry(
    label: str, kind: Kind = "assay", *, rivals: Sequence[str] = (), module: str | None = None
) -> Callable[[Scores], Scores]:
    """Put a function on the board."""

    def add(scores: Scores) -> Scores:
        if label in REGISTRY:
            raise ValueError(f"{label!r} is on the board twice")
        REGISTRY[label] = Entry(label, scores, kind, rivals, module)
        return scores

    return add


def scored(board: Board, method: Any, column: str | None = None) -> Array:
    """What a method of assay gives: its targets' columns, (N, Q); or ``column``, (N,)."""
    return _columns(board, method, board.batches, column)


def scored_texts(board: Board, make: Callable[[Any], Any]) -> Array:
    """The same of a method that looks at texts alone, made from the targets."""
    pool, targets = board.views()
    return _columns(board, make(targets), pool, None)


def _columns(board: Board, method: Any, pool: list[Any], column: str | None) -> Array:
    table = assay.score(pool, [method.fit(pool)])
    if column is not None:
        return table[column].to_numpy().astype(np.float64)
    return np.stack([table[f"{method.name}_{name}"].to_numpy() for name in board.names], 1).astype(np.float64)


def by_optimizer(board: Board, what: str) -> None:
    """Refuse a board whose run was not Adam's."""
    if board.checkpoints[-1].adam is None:
        raise NotHere(f"{what} is of Adam's moments, and the run was SGD's")


def classifier_head(model: nn.Module) -> nn.Linear:
    """The output layer of a classifier."""
    found = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    return found


def register() -> dict[str, Entry]:
    """All rows, in the order of the table."""
    for name in ("along", "unrolled", "gradients", "cheap", "peers", "peer_bergson"):
        importlib.import_module(f"benchmarks.quality.leaderboard.{name}")
    return REGISTRY
