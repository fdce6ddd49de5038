"""Datamodels: what a model trained on a subset does, as a linear function of who is in it, 2202.00622."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from assay._lazy import require

Floats = npt.NDArray[np.float64]
Train = Callable[[npt.NDArray[np.int64], int], npt.ArrayLike]
"""(indices of the training samples, seed) -> (T,) outputs on the targets, higher is better: margins or −losses."""


@dataclass(frozen=True)
class SmallModelDatamodel:
    """f_t(S) ≈ b_t + Σ_{i∈S} θ_ti, fitted to retrainings of a small model on random subsets S: the ground truth that
    the gradient methods approximate. Equation 2 of the paper.

    Subsets of one size cannot tell a constant in θ from one in b: what is determined is how samples differ.

    Attributes:
        scores: θ, (N, T): what a sample adds to each target's output. Keep high.
        intercepts: b, (T,).
        lds: (T,) Spearman correlation of prediction and output on subsets that a first fit had not seen. Scores whose
            lds is near 0 are noise: train on more subsets, or with more seeds each.
        penalties: the regularisation that cross-validation chose, (T,).
    """

    scores: Floats
    intercepts: Floats
    lds: Floats
    penalties: Floats

    def predict(self, subsets: npt.ArrayLike) -> Floats:
        """(m, N) membership -> (m, T) outputs."""
        out: Floats = np.asarray(subsets, np.float64) @ self.scores + self.intercepts
        return out

    @classmethod
    def retrain(
        cls,
        train: Train,
        samples: int,
        *,
        subsets: int = 256,
        share: float = 0.5,
        seeds: int = 1,
        seed: int = 0,
        kind: Literal["ridge", "lasso"] = "ridge",
    ) -> SmallModelDatamodel:
        """Draw subsets, train on each, and fit.

        Args:
            train: see ``Train``; called ``subsets · seeds`` times.
            samples: N, the size of the pool.
            subsets: m.
            share: α, the part of the pool in a subset.
            seeds: trainings per subset, their outputs averaged: the variance between seeds is noise to the fit.
            seed: of the subsets; trainings get seed, seed + 1, ….
            kind: as in ``fit``.

        Raises:
            ValueError: a share that leaves a subset empty or whole; outputs of changing shape or not finite.
        """
        members = random_subsets(samples, subsets, share, seed)
        outputs = []
        for row in members:
            indices = np.flatnonzero(row)
            runs = [np.atleast_1d(np.asarray(train(indices, seed + s), np.float64)) for s in range(seeds)]
            outputs.append(np.mean(runs, 0))
        return cls.fit(members, np.stack(outputs), seed=seed, kind=kind)

    @classmethod
    def fit(
        cls,
        subsets: npt.ArrayLike,
        outputs: npt.ArrayLike,
        *,
        held_out: float = 0.2,
        seed: int = 0,
        kind: Literal["ridge", "lasso"] = "ridge",
    ) -> SmallModelDatamodel:
        """Fit to trainings that have been done.

        Args:
            subsets: (m, N) membership.
            outputs: (m, T), or (m,) for one target.
            held_out: the share of subsets that ``lds`` is measured on; the scores are of a second fit, to all.
            seed: of the split.
            kind: ``"ridge"``, or ``"lasso"`` as in the paper: sparse, and better only where few samples matter.

        Raises:
            ValueError: shapes that do not match, outputs that are not finite, fewer than 10 subsets.
        """
        x, y = np.asarray(subsets, np.float64), np.asarray(outputs, np.float64)
        y = y[:, None] if y.ndim == 1 else y
        if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
            raise ValueError(f"expected subsets (m, N) and outputs (m, T), got {x.shape} and {y.shape}")
        if not np.isfinite(y).all():
            raise ValueError(f"outputs: {int((~np.isfinite(y)).sum())} of {y.size} are not finite; a training diverged")
        held = max(round(held_out * len(x)), 3)
        if len(x) < 10 or held > len(x) - 5:
            raise ValueError(f"expected at least 10 subsets, 5 of them not held out, got {len(x)} with {held} held out")
        order = np.random.default_rng(seed).permutation(len(x))
        test, rest = order[:held], order[held:]
        first = cls(*_regress(x[rest], y[rest], kind)[:2], np.empty(0), np.empty(0))
        correlate = require("scipy.stats", "cli").spearmanr
        predicted = first.predict(x[test])
        lds = np.array([correlate(a, b).statistic for a, b in zip(predicted.T, y[test].T, strict=True)])
        scores, intercepts, penalties = _regress(x, y, kind)
        return cls(scores, intercepts, lds, penalties)


def random_subsets(samples: int, subsets: int, share: float, seed: int = 0) -> npt.NDArray[np.bool_]:
    """(subsets, samples) membership of uniform draws without replacement, ``share`` of the samples each."""
    size = round(share * samples)
    if not 0 < size < samples:
        raise ValueError(f"share={share}: leaves {size} of {samples} samples; expected some, and not all")
    keys = np.random.default_rng(seed).random((subsets, samples))
    members = np.zeros((subsets, samples), bool)
    np.put_along_axis(members, np.argpartition(keys, size, axis=1)[:, :size], True, axis=1)
    return members


def _regress(x: Floats, y: Floats, kind: str) -> tuple[Floats, Floats, Floats]:
    """Coefficients (N, T), intercepts (T,) and penalties (T,)."""
    linear = require("sklearn.linear_model", "cli")
    if kind == "ridge":
        # In units of the Gram matrix' mean eigenvalue: the grid then fits every m, N and share.
        unit = float(np.square(x - x.mean(0)).sum()) / min(x.shape)
        grid = unit * np.logspace(-3, 4, 29)
        model = linear.RidgeCV(grid, alpha_per_target=True).fit(x, y)
        return model.coef_.reshape(y.shape[1], -1).T, np.atleast_1d(model.intercept_), np.atleast_1d(model.alpha_)
    if kind != "lasso":
        raise ValueError(f"kind {kind!r}; expected 'ridge' or 'lasso'")
    models = [linear.LassoCV(cv=5, random_state=0).fit(x, column) for column in y.T]
    coefficients = np.stack([model.coef_ for model in models], 1)
    return coefficients, np.array([m.intercept_ for m in models]), np.array([m.alpha_ for m in models])
