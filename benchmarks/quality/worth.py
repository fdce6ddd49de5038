"""What experiments on digits share: the digits, what scores find and chosen rows are worth, a table of it by seeds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from torch import Tensor

import assay
from assay._json import dumps
from assay.methods.base import Method
from benchmarks.timing import RESULTS, machine

Scores = npt.NDArray[Any]
Rows = npt.NDArray[np.bool_]
Data = tuple[Tensor, Tensor]
Numbers = Mapping[str, Mapping[str, float]]
"""By what was scored or chosen, by what was measured."""


def digits(seed: int, *, standardised: bool = True) -> Data:
    """All 1,797 of scikit-learn's, pixels and classes, in an order of the seed's. Pixels are in [0, 1], or each of mean
    0 and variance 1 but for those that never change."""
    pixels, classes = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(pixels))
    x = (pixels - pixels.mean(0)) / (pixels.std(0) + 1e-6) if standardised else pixels / 16
    return torch.tensor(x[order], dtype=torch.float32), torch.tensor(classes[order])


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """(N, M) of the rows of both."""
    return torch.nn.functional.normalize(a) @ torch.nn.functional.normalize(b).T


def accuracy(train: Data, rows: Rows, test: Data) -> float:
    """Of a logistic regression on some rows."""
    fitted = LogisticRegression(max_iter=1000).fit(train[0].numpy()[rows], train[1].numpy()[rows])
    return float(fitted.score(test[0].numpy(), test[1].numpy()))


def auroc(wanted: Any, scores: Any) -> float:
    return float(roc_auc_score(np.asarray(wanted), np.asarray(scores)))


def found(own: Any, scores: Any, share: float) -> dict[str, float]:
    """How scores rank what is wanted, and its share of so many of the highest."""
    own, scores = np.asarray(own), np.asarray(scores)
    best = np.argsort(-scores, kind="stable")[: round(share * len(scores))]
    return {"AUROC": auroc(own, scores), "share of the best": float(own[best].mean())}


def scored(method: Method, batches: Sequence[Any]) -> Scores:
    """The method's first column."""
    return assay.score(batches, [method])[method.columns[0].name].to_numpy().astype(np.float64)


def of_draws(draw: Callable[[int], Rows], judge: Callable[[Rows], Mapping[str, float]], seed: int) -> dict[str, float]:
    """Means of what is measured, of three draws."""
    judged = [judge(draw(3 * seed + i)) for i in range(3)]
    return {key: statistics.fmean(each[key] for each in judged) for key in judged[0]}


def experiment(name: str, parts: Mapping[str, tuple[Callable[[int], Numbers], int]], quick: bool) -> None:
    """Each part at as many seeds as it has, a table of it, and all of them to ``quality-<name>.json``.

    Args:
        quick: one seed, and no file.
    """
    console, result, began = Console(), dict[str, Any](), time.perf_counter()
    torch.set_num_threads(1)
    for part, (one_seed, count) in parts.items():
        runs = [one_seed(seed) for seed in range(1 if quick else count)]
        result[part] = {row: {key: [run[row][key] for run in runs] for key in own} for row, own in runs[0].items()}
        show(console, f"{part}, {len(runs)} seeds, {time.perf_counter() - began:.0f} s so far", result[part])
    if not quick:
        found = {**machine(), "seconds": time.perf_counter() - began, **result}
        (RESULTS / f"quality-{name}.json").write_text(dumps(found, indent=1) + "\n")


def show(console: Console, title: str, found: Mapping[str, Mapping[str, list[float]]]) -> None:
    """Means and standard deviations over the seeds."""
    keys = list(dict.fromkeys(key for own in found.values() for key in own))
    table = Table("", *keys, title=title)
    for row, own in found.items():
        table.add_row(row, *(_cell(own[key]) if key in own else "" for key in keys))
    console.print(table)


def _cell(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"
