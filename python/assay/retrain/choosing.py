"""Choosing one of many trained models for a new task: recall by what is known, select by training a few, 2404.00069."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from assay._lazy import require
from assay.retrain.checks import Floats, Rows, finite, numbers, positive, whole
from assay.retrain.samples import class_numbers, short

Train = Callable[[int, int], float]
"""(model, epoch from 0) -> validation accuracy on the new task, after one more epoch of training that model on it."""


@dataclass(frozen=True)
class Choice:
    """The model that was chosen, and what is known of all.

    Attributes:
        model: its name, or its number as text.
        epochs: of training, over all models.
        table: a row per model: ``model``, ``cluster``, ``representative``, ``average_accuracy`` over the benchmarks,
            ``leep``, ``recall`` (the first phase's score, keep high), ``recalled``, ``epochs`` it was trained,
            ``accuracy`` it had then and ``predicted`` final one (both null if it was not), ``chosen``.
    """

    model: str
    epochs: int
    table: pa.Table


@dataclass(frozen=True)
class Recalled:
    """The first phase's result for M models.

    Attributes:
        clusters: (M,) numbers of clusters, from 0 in the order of their first models.
        representatives: of the clusters of several models, the one that is best on average; in the clusters' order.
        scores: (M,) keep high.
        kept: the models with the highest scores, best first.
    """

    clusters: Rows
    representatives: Rows
    scores: Floats
    kept: Rows


def leep(probabilities: npt.ArrayLike, labels: Any) -> float:
    """How well a model's own classes tell a new task's: mean_i log Σ_z P̂(y_i | z) θ(x_i)_z, at most 0 (2002.12462).

    P̂(y, z) = 1/n Σ_{i: y_i = y} θ(x_i)_z. Predictions that do not depend on the input have −H(y).

    Args:
        probabilities: θ(x), (n, Z): the model's probabilities of its own Z classes for the new task's samples.
        labels: (n,) the new task's.

    Raises:
        ValueError: shapes that do not match, rows that are no probabilities.
    """
    theta = finite(probabilities, "probabilities")
    numbered, classes = class_numbers(labels)
    if theta.ndim != 2 or not theta.size or len(theta) != len(numbered):
        raise ValueError(f"expected probabilities (n, Z) and labels (n,), got {theta.shape} and {numbered.shape}")
    off = np.flatnonzero((theta < 0).any(1) | (np.abs(theta.sum(1) - 1) > 1e-3))
    if len(off):
        raise ValueError(
            f"probabilities: row {off[0]} has values from {theta[off[0]].min():.3g} that sum to "
            f"{theta[off[0]].sum():.6g}; expected probabilities, of logits their softmax"
        )
    theta = theta / theta.sum(1, keepdims=True)
    joint = np.zeros((len(classes), theta.shape[1]))
    np.add.at(joint, numbered, theta)
    marginal = joint.sum(0)
    given = joint / np.where(marginal > 0, marginal, 1)  # P̂(y | z); a class z that nobody is given adds 0
    return float(np.log((given[numbered] * theta).sum(1).clip(max=1)).mean())  # rounding alone is above 1


def model_distances(accuracies: npt.ArrayLike, top: int = 5) -> Floats:
    """(M, B) accuracies on benchmarks -> (M, M): the mean of the ``top`` largest differences."""
    known = _accuracies(accuracies, top)
    apart = np.sort(np.abs(known[:, None] - known[None]), axis=2)[:, :, -top:]
    return np.asarray(apart.mean(2), dtype=np.float64)


def recall(
    accuracies: npt.ArrayLike, leeps: npt.ArrayLike, *, keep: int = 15, threshold: float = 0.09, top: int = 5
) -> Recalled:
    """Which of M models may be good at a new task, of what they were on B benchmarks and of their LEEPs.

    Models are clustered by ``model_distances``, average linkage, up to ``threshold``. In a cluster of several a model's
    score is average accuracy × exp(LEEP); that of a model that is alone is average accuracy × the mean over the
    clusters' representatives r of cos(accuracies, accuracies of r) · exp(LEEP_r). Where all are alone, each has its own
    LEEP.

    Args:
        accuracies: (M, B), of more than ``top`` benchmarks.
        leeps: (M,) ``leep`` on the new task. NaN: not known, a representative's stands for it.
        keep: how many models.

    Raises:
        ValueError: fewer benchmarks, values that are no accuracies, a LEEP above 0 or one that is missing.
    """
    known = _accuracies(accuracies, top)
    count = len(known)
    own = numbers(leeps, "leeps")
    if own.shape != (count,) or (own > 0).any():
        raise ValueError(f"leeps: expected {count} numbers of at most 0, or NaN, got {own.shape}: {short(leeps)}")
    whole("keep", keep, 1)
    positive("threshold", threshold)
    clusters = _clusters(model_distances(known, top), threshold)
    average = known.mean(1)
    members = [np.flatnonzero(clusters == c) for c in range(clusters.max() + 1)]
    several = [rows for rows in members if len(rows) > 1]
    best = np.array([rows[average[rows].argmax()] for rows in several], dtype=np.int64)
    needed = best if len(best) else np.arange(count)
    if np.isnan(own[needed]).any():
        raise ValueError(f"leeps: model {needed[np.isnan(own[needed]).argmax()]} stands for others; its own is missing")
    worth = np.exp(own)
    for rows, r in zip(several, best, strict=True):
        worth[rows] = np.where(np.isnan(worth[rows]), worth[r], worth[rows])
    if len(best):
        unit = known / np.linalg.norm(known, axis=1, keepdims=True).clip(min=1e-300)
        alone = np.setdiff1d(np.arange(count), np.concatenate(several))
        worth[alone] = (unit[alone] @ unit[best].T * worth[best]).mean(1)
    scores = average * worth
    return Recalled(clusters, best, scores, np.argsort(-scores, kind="stable")[:keep])


def predicted_accuracy(current: float, validation: npt.ArrayLike, final: npt.ArrayLike, groups: int = 4) -> float:
    """A model's final accuracy on a new task, by how it went on B others that had about as much by then.

    The benchmarks are clustered by ``validation``, 1-D k-means; the mean of ``final`` over the cluster to whose mean
    ``current`` is nearest.

    Args:
        current: validation accuracy on the new task at some epoch.
        validation, final: (B,) on the benchmarks at that epoch, and in the end.
        groups: clusters; fewer where there are fewer values.
    """
    now, early, late = finite(current, "current"), finite(validation, "validation"), finite(final, "final")
    if early.ndim != 1 or not early.size or early.shape != late.shape:
        raise ValueError(f"expected validation and final accuracies (B,), got {early.shape} and {late.shape}")
    values = np.unique(early)
    k = min(whole("groups", groups, 1), len(values))
    starts = values[np.round(np.linspace(0, len(values) - 1, k)).astype(int)]  # ends and between: no luck
    fitted = require("sklearn.cluster", "cli").KMeans(k, init=starts[:, None], n_init=1).fit(early[:, None])
    centres, members = fitted.cluster_centers_[:, 0], fitted.labels_
    return float(late[members == np.abs(centres - now).argmin()].mean())


def choose_model(
    train: Train,
    accuracies: npt.ArrayLike,
    curves: npt.ArrayLike,
    leeps: npt.ArrayLike,
    *,
    names: Sequence[str] | None = None,
    keep: int = 15,
    epochs: int = 5,
    threshold: float = 0.09,
    top: int = 5,
    groups: int = 4,
) -> Choice:
    """Choose one of M models: ``recall`` some, then train these on the new task and drop what falls behind.

    After each epoch a model is dropped if one that is better now is predicted to be better in the end as well
    (``predicted_accuracy``); then all but the better half of the epoch's models, by what they have now. The one that is
    left is trained to the end.

    Args:
        train: called once per model and epoch.
        accuracies: (M, B) final ones on B benchmarks, more than ``top``.
        curves: (M, B, E ≥ epochs) validation accuracies on the same, after each epoch.
        leeps: (M,), as in ``recall``.
        names: of the models; None: their numbers.
        keep, threshold, top: as in ``recall``.
        epochs: that a model is trained, at most.
        groups: as in ``predicted_accuracy``.

    Raises:
        ValueError: as ``recall``; curves of other shapes, names that are not M different ones; an accuracy that
            ``train`` returned and is none.
    """
    known = _accuracies(accuracies, top)
    count = len(known)
    whole("epochs", epochs, 1)
    whole("groups", groups, 1)
    past = _shares(curves, "curves")
    if past.ndim != 3 or past.shape[:2] != known.shape or past.shape[2] < epochs:
        raise ValueError(f"curves: expected {(*known.shape, epochs)} or more epochs, got {past.shape}")
    labels = [str(m) for m in range(count)] if names is None else [str(name) for name in names]
    if len(labels) != count or len(set(labels)) != count:
        raise ValueError(f"names: expected {count} different ones, got {short(labels)}")
    found = recall(known, leeps, keep=keep, threshold=threshold, top=top)
    live = list(map(int, found.kept))
    trained, now, ahead = np.zeros(count, np.int64), np.full(count, np.nan), np.full(count, np.nan)
    for epoch in range(epochs):
        for m in live:
            now[m] = _trained(train, m, epoch)
            trained[m] += 1
            ahead[m] = predicted_accuracy(now[m], past[m, :, epoch], known[m], groups)
        live = _survivors(live, now, ahead)
    chosen = live[0]  # the best: survivors are sorted
    return Choice(labels[chosen], int(trained.sum()), _table(labels, found, known, leeps, trained, now, ahead, chosen))


def _survivors(live: Sequence[int], now: Floats, ahead: Floats) -> list[int]:
    """At most half of the models, the better ones first; never none."""
    left = [m for m in live if not any(now[j] > now[m] and ahead[j] > ahead[m] for j in live)]
    left.sort(key=lambda m: -now[m])
    return left[: math.ceil(len(live) / 2)]


def _trained(train: Train, model: int, epoch: int) -> float:
    accuracy = train(model, epoch)
    if not isinstance(accuracy, (int, float, np.number)) or not 0 <= accuracy <= 1:
        raise ValueError(
            f"train: model {model}, epoch {epoch}: expected an accuracy from 0 to 1, got {short(accuracy)}"
        )
    return float(accuracy)


def _clusters(distances: Floats, threshold: float) -> Rows:
    """(M,) numbers of clusters, from 0 in the order of their first members."""
    if len(distances) == 1:
        return np.zeros(1, np.int64)
    hierarchy = require("scipy.cluster.hierarchy", "cli")
    condensed = distances[np.triu_indices(len(distances), 1)]
    given = hierarchy.fcluster(hierarchy.linkage(condensed, "average"), threshold, "distance")
    _, first, inverse = np.unique(given, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first)).astype(np.int64)[inverse.reshape(-1)]


def _accuracies(values: npt.ArrayLike, top: int) -> Floats:
    whole("top", top, 1)
    known = _shares(values, "accuracies")
    if known.ndim != 2 or not len(known) or known.shape[1] <= top:
        raise ValueError(f"accuracies: expected (M, B) of more than {top} benchmarks, got {known.shape}")
    return known


def _shares(values: npt.ArrayLike, name: str) -> Floats:
    known = finite(values, name)
    if ((known < 0) | (known > 1)).any():
        raise ValueError(f"{name}: expected accuracies from 0 to 1, got {known.min():g} to {known.max():g}")
    return known


def _table(
    labels: Sequence[str],
    found: Recalled,
    known: Floats,
    leeps: npt.ArrayLike,
    trained: Rows,
    now: Floats,
    ahead: Floats,
    chosen: int,
) -> pa.Table:
    models = np.arange(len(labels))
    return pa.table(
        {
            "model": labels,
            "cluster": found.clusters,
            "representative": np.isin(models, found.representatives),
            "average_accuracy": known.mean(1),
            "leep": pa.array(numbers(leeps, "leeps"), from_pandas=True),
            "recall": found.scores,
            "recalled": np.isin(models, found.kept),
            "epochs": trained,
            "accuracy": pa.array(now, from_pandas=True),
            "predicted": pa.array(ahead, from_pandas=True),
            "chosen": models == chosen,
        }
    )
