"""Cross-fitting: every sample judged only by models that were not trained on it.

A model that has seen a wrong label predicts it; in-sample losses make noise invisible.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from assay._lazy import require

# Under the probabilities of estimators that give exact zeros (a forest, neighbours): the tree that never saw a class
# does not know that it is impossible.
PROBABILITY_FLOOR = 1e-6

Fit = Callable[[Any, Any], Any]


@dataclass(frozen=True)
class OutOfFold:
    """Predictions of K models for N samples, each from the fold's model that did not train on the sample.

    ``logits`` (K, N, C) float32; ``folds`` (N,) the fold in which a sample was held out; ``models`` K lists, one model
    per fold.
    """

    logits: Tensor
    folds: NDArray[np.int64]
    models: list[list[Any]]


def out_of_fold(
    members: Sequence[Any],
    x: Any,
    y: ArrayLike,
    *,
    folds: int | ArrayLike = 5,
    seed: int = 0,
    batch_size: int = 1024,
) -> OutOfFold:
    """Train (or take) K × folds models and predict every sample with those that did not see it.

    Args:
        members: K of: a scikit-learn classifier (``fit`` and ``predict_proba``; cloned per fold); a function
            ``fit(x, y)`` that returns a trained ``nn.Module``, or anything callable from inputs to logits; or a
            sequence of such models already trained, one per fold (then ``folds`` must say which samples each fold
            held out).
        x: inputs, indexable by an integer array along the first dimension (NumPy array or tensor).
        y: (N,) labels 0..C−1, as given, wrong ones included.
        folds: their number (stratified by label, shuffled by ``seed``), or (N,) the fold of every sample.
        seed: of the shuffle.
        batch_size: rows per prediction.

    Returns:
        ``OutOfFold``: logits (K, N, C). Probabilities p of scikit-learn classifiers become log max(p, 1e-6).

    Raises:
        ValueError: a label is negative, a fold trains on nothing, or there are not as many models as folds.
    """
    labels = np.asarray(y)
    if labels.ndim != 1 or len(labels) != len(x) or not len(labels):
        raise ValueError(f"y: expected one label per sample, shape ({len(x)},), got {labels.shape}")
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
        raise ValueError(f"y: expected integer labels 0..C−1, got {labels.dtype} with minimum {labels.min()}")
    fold_of = _assign(labels, folds, seed)
    count = int(fold_of.max()) + 1
    classes = int(labels.max()) + 1
    logits = torch.full((len(members), len(labels), classes), torch.nan)
    trained: list[list[Any]] = []
    for k, member in enumerate(members):
        if isinstance(member, Sequence) and len(member) != count:
            raise ValueError(f"members[{k}]: expected one trained model per fold, {count}, got {len(member)}")
        models = []
        for fold in range(count):
            train, held_out = np.flatnonzero(fold_of != fold), np.flatnonzero(fold_of == fold)
            model = member[fold] if isinstance(member, Sequence) else _train(member, x[train], labels[train])
            models.append(model)
            logits[k, held_out] = _predict(model, x[held_out], classes, batch_size)
        trained.append(models)
    return OutOfFold(logits, fold_of, trained)


def _assign(labels: NDArray[Any], folds: int | ArrayLike, seed: int) -> NDArray[np.int64]:
    if not isinstance(folds, int):
        given = np.asarray(folds, dtype=np.int64)
        if given.shape != labels.shape:
            raise ValueError(f"folds: expected one per sample, shape {labels.shape}, got {given.shape}")
        if len(np.unique(given)) < 2:
            raise ValueError("folds: expected at least two different folds; one would leave nothing to train on")
        return given
    if not 2 <= folds <= len(labels):
        raise ValueError(f"folds: expected 2 to {len(labels)} (the number of samples), got {folds}")
    splitter = require("sklearn.model_selection", "cli").StratifiedKFold(folds, shuffle=True, random_state=seed)
    out = np.empty(len(labels), dtype=np.int64)
    for fold, (_, held_out) in enumerate(splitter.split(labels, labels)):
        out[held_out] = fold
    return out


def _train(member: Any, x: Any, y: NDArray[Any]) -> Any:
    if hasattr(member, "fit") and hasattr(member, "predict_proba"):
        return require("sklearn.base", "cli").clone(member).fit(np.asarray(x), y)
    return member(x, y)


def _predict(model: Any, x: Any, classes: int, batch_size: int) -> Tensor:
    """(n, classes) logits of one trained model."""
    if hasattr(model, "predict_proba"):
        probabilities = np.zeros((len(x), classes))
        probabilities[:, model.classes_] = model.predict_proba(np.asarray(x))
        return torch.from_numpy(np.log(np.maximum(probabilities, PROBABILITY_FLOOR))).float()
    training = isinstance(model, nn.Module) and model.training
    if isinstance(model, nn.Module):
        model.eval()
    with torch.no_grad():
        pieces = [model(torch.as_tensor(x[i : i + batch_size])) for i in range(0, len(x), batch_size)]
    if training:
        model.train()
    out = torch.cat([torch.as_tensor(getattr(piece, "logits", piece)).float().cpu() for piece in pieces])
    if out.shape != (len(x), classes):
        raise ValueError(f"model: expected logits of shape ({len(x)}, {classes}), got {tuple(out.shape)}")
    return out
