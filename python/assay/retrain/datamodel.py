"""Datamodels: what a model trained on a subset does, as a linear function of who is in it, 2202.00622."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from assay._lazy import require
from assay.retrain.checks import Floats, fraction, numbers, whole
from assay.retrain.samples import short

Kind = Literal["ridge", "lasso"]
Train = Callable[[npt.NDArray[np.int64], int], npt.ArrayLike]
"""(indices of the training samples, seed) -> (T,) outputs on the targets, higher is better: margins or −losses."""


HELD_OUT = 0.2


@dataclass(frozen=True)
class SmallModelDatamodel:
    """f_t(S) ≈ b_t + Σ_{i∈S} θ_ti, fitted to retrainings of a small model on random subsets S: the ground truth that
    the gradient methods approximate. Equation 2 of the paper.

    Subsets of one size cannot tell a constant in θ from one in b: what is determined is how samples differ.

    Attributes:
        scores: θ, (N, T): what a sample adds to each target's output. Keep high. NaN for a sample that is in every
            subset, or in none: nothing is known of it.
        intercepts: b, (T,).
        lds: (T,) Spearman correlation of prediction and output on subsets that a first fit had not seen. Scores whose
            lds is near 0 are noise: train on more subsets, or with more seeds each. NaN where either does not vary.
        penalties: the regularisation that cross-validation chose, (T,).
    """

    scores: Floats
    intercepts: Floats
    lds: Floats
    penalties: Floats

    def predict(self, subsets: npt.ArrayLike) -> Floats:
        """(m, N) membership, or (N,) -> (m, T) outputs, or (T,); samples without a score add nothing."""
        members = numbers(subsets, "subsets")
        if members.ndim not in (1, 2) or members.shape[-1] != len(self.scores):
            raise ValueError(f"subsets: expected membership (m, {len(self.scores)}), got shape {members.shape}")
        out: Floats = members @ np.nan_to_num(self.scores) + self.intercepts
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
        kind: Kind = "ridge",
    ) -> SmallModelDatamodel:
        """Draw subsets, train on each, and fit.

        Args:
            train: see ``Train``; called ``subsets · seeds`` times.
            samples: N, the size of the pool.
            subsets: m.
            share: α, the part of the pool in a subset.
            seeds: trainings per subset, their outputs averaged: of few, the scores and ``lds`` are partly about these
                seeds, which all subsets share.
            seed: of the subsets; each subset's trainings get seed, seed + 1, ….
            kind: as in ``fit``.

        Raises:
            ValueError: before the first training, fewer than 10 subsets, a share that leaves a subset empty or whole,
                no seeds, an unknown kind; at the first such training, outputs of changing shape or not finite.
        """
        members = random_subsets(samples, subsets, share, seed)
        _check_fit(len(members), HELD_OUT, seed, kind)
        whole("seeds", seeds, 1)
        if not callable(train):
            raise ValueError(f"train: expected a function (indices, seed) -> outputs, got {type(train).__name__}")
        outputs: list[Floats] = []
        for number, row in enumerate(members):
            runs: list[Floats] = []
            for s in range(seeds):
                run = np.atleast_1d(numbers(train(np.flatnonzero(row), seed + s), "train"))
                known = (outputs or runs or [run])[0].shape
                if run.ndim != 1 or not run.size or run.shape != known:
                    raise ValueError(f"train: expected outputs (T,) of one length, got {run.shape}, first {known}")
                if not np.isfinite(run).all():
                    raise ValueError(
                        f"train: the outputs of subset {number}, seed {seed + s} are not finite: {short(run)}"
                    )
                runs.append(run)
            outputs.append(np.mean(runs, 0))
        return cls.fit(members, np.stack(outputs), seed=seed, kind=kind)

    @classmethod
    def fit(
        cls,
        subsets: npt.ArrayLike,
        outputs: npt.ArrayLike,
        *,
        held_out: float = HELD_OUT,
        seed: int = 0,
        kind: Kind = "ridge",
    ) -> SmallModelDatamodel:
        """Fit to trainings that have been done.

        Args:
            subsets: (m, N) membership, 0 or 1.
            outputs: (m, T), or (m,) for one target.
            held_out: the share of subsets that ``lds`` is measured on; the scores are of a second fit, to all.
            seed: of the split.
            kind: ``"ridge"``, or ``"lasso"`` as in the paper: sparse, and better only where few samples matter.

        Raises:
            ValueError: shapes that do not match, subsets that are no membership or all alike, outputs that are not
                finite, fewer than 10 subsets.
        """
        x, y = numbers(subsets, "subsets"), numbers(outputs, "outputs")
        y = y[:, None] if y.ndim == 1 else y
        if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or not x.size or not y.size:
            raise ValueError(f"expected subsets (m, N) and outputs (m, T), got {x.shape} and {y.shape}")
        if (wrong := (x != 0) & (x != 1)).any():
            raise ValueError(f"subsets: expected membership, 0 or 1 for each sample, got {x[wrong][0]:g}")
        if not np.isfinite(y).all():
            raise ValueError(f"outputs: {int((~np.isfinite(y)).sum())} of {y.size} are not finite; a training diverged")
        held = _check_fit(len(x), held_out, seed, kind)
        undetermined = (x == x[0]).all(0)
        if undetermined.all():
            raise ValueError("subsets: expected different ones, got the same one again and again")
        order = np.random.default_rng(seed).permutation(len(x))
        test, rest = order[:held], order[held:]
        first = cls(*_regress(x[rest], y[rest], kind)[:2], np.empty(0), np.empty(0))
        correlate = require("scipy.stats", "cli").spearmanr
        predicted = first.predict(x[test])
        lds = np.array([correlate(a, b).statistic for a, b in zip(predicted.T, y[test].T, strict=True)])
        scores, intercepts, penalties = _regress(x, y, kind)
        return cls(np.where(undetermined[:, None], np.nan, scores), intercepts, lds, penalties)


def random_subsets(samples: int, subsets: int, share: float, seed: int = 0) -> npt.NDArray[np.bool_]:
    """(subsets, samples) membership of uniform draws without replacement, ``share`` of the samples each."""
    whole("samples", samples, 1)
    whole("subsets", subsets, 1)
    whole("seed", seed, 0)
    size = round(fraction("share", share) * samples)
    if not 0 < size < samples:
        raise ValueError(f"share={share}: leaves {size} of {samples} samples; expected some, and not all")
    keys = np.random.default_rng(seed).random((subsets, samples))
    members = np.zeros((subsets, samples), bool)
    np.put_along_axis(members, np.argpartition(keys, size, axis=1)[:, :size], True, axis=1)
    return members


def _check_fit(subsets: int, held_out: float, seed: int, kind: str) -> int:
    """How many subsets are held out, or what is wrong with the fit's settings."""
    if kind not in get_args(Kind):
        raise ValueError(f"kind {kind!r}; expected 'ridge' or 'lasso'")
    whole("seed", seed, 0)
    if not 0 < fraction("held_out", held_out) < 1:
        raise ValueError(f"held_out: expected a share of the subsets between 0 and 1, got {held_out}")
    held = max(round(held_out * subsets), 3)
    if subsets < 10 or held > subsets - 5:
        raise ValueError(f"expected at least 10 subsets, 5 of them not held out, got {subsets} with {held} held out")
    return held


def _regress(x: Floats, y: Floats, kind: str) -> tuple[Floats, Floats, Floats]:
    """Coefficients (N, T), intercepts (T,) and penalties (T,)."""
    linear = require("sklearn.linear_model", "cli")
    if kind == "ridge":
        # In units of the Gram matrix' mean eigenvalue: the grid then fits every m, N and share.
        unit = float(np.square(x - x.mean(0)).sum()) / min(x.shape) or 1.0
        grid = unit * np.logspace(-3, 4, 29)
        model = linear.RidgeCV(grid, alpha_per_target=True).fit(x, y)
        return model.coef_.reshape(y.shape[1], -1).T, np.atleast_1d(model.intercept_), np.atleast_1d(model.alpha_)
    models = [linear.LassoCV(cv=5, random_state=0).fit(x, column) for column in y.T]
    coefficients = np.stack([model.coef_ for model in models], 1)
    return coefficients, np.array([m.intercept_ for m in models]), np.array([m.alpha_ for m in models])
