"""Cross-fitting: every sample judged only by models that were not trained on it.

A model that has seen a wrong label predicts it; in-sample losses make noise invisible.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from assay._lazy import require
from assay.probe.quiet import undisturbed
from assay.retrain import samples
from assay.tasks.base import call

# Instead of exact zeros (a forest's, neighbours'): the tree that never saw a class does not know that it is impossible.
PROBABILITY_FLOOR = 1e-6

Fit = Callable[[Any, Any], Any]

_log = logging.getLogger("assay")


@dataclass(frozen=True)
class OutOfFold:
    """Predictions of K models for N samples, each from the fold's model that did not train on the sample.

    ``logits`` (K, N, C) float32; ``folds`` (N,) the fold, from 0, in which a sample was held out; ``models`` K lists,
    one model per fold; ``labels`` (N,) int64, the given labels as columns of ``logits``, as the scores take them;
    ``classes`` (C,) what each column stands for.
    """

    logits: Tensor
    folds: NDArray[np.int64]
    models: list[list[Any]]
    labels: Tensor
    classes: NDArray[Any]


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
            sequence of such models already trained, one per fold in the order of the folds' numbers (then ``folds``
            must say which samples each fold held out). ``y`` of ``fit`` are class numbers (N,) int64.
        x: inputs: an array, a tensor, a scipy sparse matrix, a data frame, a torch data set, a list (of texts, say), or
            a mapping of names to such. Callables get tensors for arrays, and everything else as it is.
        y: (N,) labels, wrong ones included: 0..C−1, or class names or truth values, numbered in their order.
        folds: their number (stratified by label, shuffled by ``seed``), or (N,) the fold of every sample: any integers
            ≥ 0. Only so do copies of a sample share a fold; in another one they have been trained on.
        seed: of the shuffle.
        batch_size: rows per prediction of a callable.

    Returns:
        ``OutOfFold``: logits (K, N, C); log-probabilities of scikit-learn classifiers. Where such a classifier gives
        exactly 0, or has never seen a class, its logit is log 1e-6 or, if that is lower, the lowest of the row. A class
        that some fold's models are not trained on is named in a warning, and so are rows of logits that are not finite.

    Raises:
        TypeError, ValueError: an argument, named, that is none of these; a fold that trains on fewer than two classes;
            not as many models as folds, or models whose outputs do not fit the classes.
    """
    x = samples.inputs(x)
    n = samples.count(x)
    labels, classes = samples.class_numbers(y)
    if not n:
        raise ValueError("x: expected samples, got none")
    if len(labels) != n:
        raise ValueError(f"y: expected one label per sample, shape ({n},), got {labels.shape}")
    check_members(members)
    check_batch_size(batch_size)
    fold_of = _assign(labels, folds, seed)
    count = int(fold_of.max()) + 1
    if not all(_is_trained(member) for member in members):
        _check_training(labels, fold_of, classes)
    logits = torch.full((len(members), n, len(classes)), torch.nan)
    trained: list[list[Any]] = []
    for k, member in enumerate(members):
        if _is_trained(member) and len(member) != count:
            raise ValueError(f"members[{k}]: expected one trained model per fold, {count}, got {len(member)}")
        trained.append([])
        for fold in range(count):
            train, held_out = np.flatnonzero(fold_of != fold), np.flatnonzero(fold_of == fold)
            where = f"members[{k}], fold {fold}"
            model = (
                member[fold]
                if _is_trained(member)
                else train_member(member, samples.take(x, train), labels[train], where)
            )
            trained[k].append(model)
            predicted = predict_member(model, x, held_out, classes, batch_size, where)
            if broken := int((~predicted.logsumexp(1).isfinite()).sum()):
                _log.warning("out_of_fold: %s gives no probabilities in %d of %d rows", where, broken, len(held_out))
            logits[k, held_out] = predicted
    return OutOfFold(logits, fold_of, trained, torch.from_numpy(labels), classes)


def check_batch_size(batch_size: Any) -> None:
    """ValueError unless it is a number of rows."""
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size!r}")


def check_members(members: Any, trained: bool = True) -> None:
    """TypeError or ValueError unless each can be trained or, where that will do, is one trained model per fold."""
    if not isinstance(members, Sequence) or isinstance(members, str):
        raise TypeError(f"members: expected a list of models to train, got {type(members).__name__}; write [model]")
    if not members:
        raise ValueError("members: expected at least one, got none")
    for k, member in enumerate(members):
        if (trained and _is_trained(member)) or _is_classifier(member):
            continue
        found = f"the class {member.__name__}; give an instance" if isinstance(member, type) else type(member).__name__
        if hasattr(member, "fit") and not isinstance(member, type):
            found += ", whose predict_proba is missing (CalibratedClassifierCV gives one)"
        elif isinstance(member, nn.Module):
            found += ", a single network: it can't be judged which samples it has seen"
        elif callable(member) and not isinstance(member, type):
            continue
        expected = "a scikit-learn classifier, a function fit(x, y)"
        expected = f"{expected}, or a list of trained models, one per fold" if trained else expected
        raise TypeError(f"members[{k}]: expected {expected}; got {found}")


def _is_trained(member: Any) -> bool:
    return isinstance(member, (Sequence, nn.ModuleList)) and not isinstance(member, str)


def _is_classifier(member: Any) -> bool:
    return hasattr(member, "fit") and hasattr(member, "predict_proba") and not isinstance(member, type)


def _assign(labels: NDArray[np.int64], folds: Any, seed: Any) -> NDArray[np.int64]:
    """(N,) folds, numbered from 0 in the order of the numbers that were given."""
    try:
        given = np.asarray(samples.to_numpy(folds))
        whole = given.dtype.kind in "iu" or (given.ndim > 0 and bool((given % 1 == 0).all()))
    except (TypeError, ValueError):
        whole = False
    if not whole:
        found = samples.short(folds)
        raise ValueError(f"folds: expected their number, or one integer ≥ 0 per sample, got {found}")
    if not given.ndim:
        return _stratified(labels, int(given), seed)
    if given.shape != labels.shape:
        raise ValueError(f"folds: expected one per sample, shape {labels.shape}, got {given.shape}")
    if given.min() < 0:
        row = int(given.argmin())
        raise ValueError(
            f"folds: expected integers ≥ 0, got {given[row]} in row {row}: nobody would predict that sample"
        )
    numbers, fold_of = np.unique(given, return_inverse=True)
    if len(numbers) < 2:
        raise ValueError("folds: expected at least two different folds; one would leave nothing to train on")
    return fold_of.reshape(-1).astype(np.int64)


def _stratified(labels: NDArray[np.int64], folds: int, seed: Any) -> NDArray[np.int64]:
    if not 2 <= folds <= len(labels):
        raise ValueError(f"folds: expected 2 to {len(labels)} (the number of samples), got {folds}")
    if not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**32:
        raise ValueError(f"seed: expected an integer from 0 to 2³² − 1, got {seed!r}")
    most = int(np.bincount(labels).max())
    if folds > most:
        raise ValueError(f"folds: expected at most {most}, the samples of the largest class, got {folds}")
    splitter = require("sklearn.model_selection", "cli").StratifiedKFold(folds, shuffle=True, random_state=seed)
    out = np.empty(len(labels), dtype=np.int64)
    for fold, (_, held_out) in enumerate(splitter.split(labels, labels)):
        out[held_out] = fold
    return out


def _check_training(labels: NDArray[np.int64], fold_of: NDArray[np.int64], classes: NDArray[Any]) -> None:
    """An error for a fold that trains on one class; a warning for classes that a fold holds out whole."""
    unseen: dict[int, list[Any]] = {}
    for fold in range(int(fold_of.max()) + 1):
        train = np.unique(labels[fold_of != fold])
        if len(train) < 2:
            where = "y" if len(np.unique(labels)) == 1 else f"folds: outside fold {fold}"
            only = classes.tolist()[train[0]]
            raise ValueError(f"{where}: expected at least two classes to train on, got only {only!r}")
        if len(missing := np.setdiff1d(labels[fold_of == fold], train)):
            unseen[fold] = classes[missing].tolist()
    if unseen:
        _log.warning(
            "out_of_fold: models that are not trained on a class will find its labels wrong: %s; merge or drop such "
            "classes, or give folds that split them",
            "; ".join(f"fold {fold}: class {', '.join(map(repr, names))}" for fold, names in unseen.items()),
        )


def train_member(member: Any, x: Any, y: NDArray[np.int64], where: str) -> Any:
    """A model trained on these rows alone; the member itself stays untrained. ``where`` begins errors."""
    if _is_classifier(member):
        fresh = require("sklearn.base", "cli").clone(member, safe=False)
        return _asked(where, fresh.fit, _features(x, where), y)
    model = member(x, y)
    if model is None:
        raise TypeError(f"{where}: expected fit(x, y) to return the trained model, got None")
    return model


def _asked(where: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """What a classifier answers; where it does not take its arguments, an error that says whose and which."""
    try:
        return function(*arguments)
    except (TypeError, ValueError) as error:
        kind = type(arguments[0]).__name__
        raise ValueError(f"{where}: the classifier does not take x ({kind}): {samples.short(error)}") from error


def _features(x: Any, where: str) -> Any:
    """Inputs as scikit-learn takes them."""
    if isinstance(x, Mapping):
        raise TypeError(
            f"x: {where} is a scikit-learn classifier, which takes no mapping; give an array or a data frame"
        )
    return samples.to_numpy(x)


def predict_member(
    model: Any, x: Any, rows: NDArray[np.int64], classes: NDArray[Any], batch_size: int, where: str
) -> Tensor:
    """(n, C) logits of one trained model."""
    if hasattr(model, "predict_proba"):
        return _log_probabilities(model, _features(samples.take(x, rows), where), classes, where)
    if not callable(model):
        raise TypeError(
            f"{where}: expected a trained model, callable or with predict_proba, got {type(model).__name__}"
        )
    with undisturbed(model) if isinstance(model, nn.Module) else nullcontext(), torch.no_grad():
        pieces = [
            _logits(model, samples.take(x, rows[i : i + batch_size]), where) for i in range(0, len(rows), batch_size)
        ]
    out = torch.cat(pieces)
    if out.shape[1] != len(classes):
        raise ValueError(f"{where}: expected logits of shape ({len(rows)}, {len(classes)}), got {tuple(out.shape)}")
    return out


def _logits(model: Any, x: Any, where: str) -> Tensor:
    x = {name: _tensor(column) for name, column in x.items()} if isinstance(x, Mapping) else _tensor(x)
    output = call(model, x) if isinstance(model, nn.Module) else model(x)
    values = getattr(output, "logits", output)
    if isinstance(values, np.ndarray):
        values = torch.from_numpy(values)
    n = samples.count(x)
    if not isinstance(values, Tensor) or values.ndim != 2 or len(values) != n:
        found = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"{where}: expected logits of shape ({n}, C), got {found}")
    return values.float().cpu()


def _tensor(x: Any) -> Any:
    return torch.as_tensor(x) if isinstance(x, np.ndarray) and x.dtype.kind in "biuf" else x


def _log_probabilities(model: Any, x: Any, classes: NDArray[Any], where: str) -> Tensor:
    with np.errstate(divide="ignore"):
        # Where it can, a classifier gives logarithms that its probabilities have rounded to 0 (naive Bayes).
        logs = getattr(model, "predict_log_proba", None) or (lambda rows: np.log(model.predict_proba(rows)))
        known = _asked(where, logs, x)
    known, columns = np.asarray(known, dtype=np.float64), _columns(model, classes, where)
    n = samples.count(x)
    if known.shape != (n, len(columns)):
        raise ValueError(f"{where}: expected probabilities of shape ({n}, {len(columns)}), got {known.shape}")
    known = np.where(np.isneginf(known), math.inf, known)
    floor = np.minimum(known.min(1, keepdims=True), math.log(PROBABILITY_FLOOR))
    out = np.repeat(floor, len(classes), axis=1)
    out[:, columns] = np.where(np.isposinf(known), floor, known)
    return torch.from_numpy(out).float()


def _columns(model: Any, classes: NDArray[Any], where: str) -> NDArray[np.int64]:
    """Where a classifier's classes are among all: numbers where it was trained here, numbers or names elsewhere."""
    own = np.asarray(getattr(model, "classes_", np.arange(len(classes))))
    known = {label: c for c, label in enumerate(range(len(classes)) if own.dtype.kind in "biuf" else classes.tolist())}
    columns = [known.get(label, -1) for label in own.tolist()] if own.ndim == 1 else []
    if not columns or min(columns) < 0:
        raise ValueError(
            f"{where}: expected a classifier of classes among {classes.tolist()!r:.200}, got {own.tolist()!r:.200}"
        )
    return np.array(columns, dtype=np.int64)
