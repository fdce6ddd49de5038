"""What do prequential code lengths say of features and of labels? ``python -m benchmarks.quality.readout_switching``.

scikit-learn's digits, 700 of them. **Of features**: the code length of the labels given pixels, 16 principal
components, 16 and 4 random projections, by four readouts that take turns, beside each readout alone, and
beside the test accuracy of each readout. **Of samples**: AUROC of 20 % wrong labels by each sample's code length over
1, 4 and 8 orders of the rows, beside the controls: the loss out of fold (5 folds, the same four readouts, the
mixture's), the same in the sample's own training set, its place in the order, and a random order. Three seeds.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.table import Table
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier

from assay._json import dumps
from assay.methods import ensemble_scores
from assay.retrain import out_of_fold, readout_switching
from benchmarks import options
from benchmarks.timing import RESULTS, machine

SEEDS, ROWS, NOISE = 3, 700, 0.2
READOUTS = {
    "logistic, C .01": LogisticRegression(C=0.01, max_iter=200),
    "logistic, C 1": LogisticRegression(C=1.0, max_iter=200),
    "naive Bayes": GaussianNB(var_smoothing=0.1),
    "15-NN": KNeighborsClassifier(15),
}
Numbers = npt.NDArray[Any]


def digits(seed: int) -> tuple[Numbers, Numbers, Numbers, Numbers]:
    """Standardised pixels and labels, ``ROWS`` to learn and the others to test."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(x))
    x = ((x - x.mean(0)) / (x.std(0) + 1e-6))[order]
    return x[:ROWS], y[order][:ROWS], x[ROWS:], y[order][ROWS:]


def of_features(seed: int) -> dict[str, dict[str, float]]:
    x, y, tests, truth = digits(seed)
    wide, narrow = (np.random.default_rng(seed).normal(size=(64, size)) / 8 for size in (16, 4))
    maps: dict[str, Any] = {
        "pixels": lambda rows: rows,
        "16 principal components": PCA(16, random_state=0).fit(x).transform,
        "16 random projections": lambda rows: rows @ wide,
        "4 random projections": lambda rows: rows @ narrow,
    }
    found = {}
    for name, features in maps.items():
        code = readout_switching(list(READOUTS.values()), features(x), y, orders=2, seed=seed)
        own = {"switching": float(code.totals.mean())}
        own |= {key: float(value) for key, value in zip(READOUTS, code.readouts.mean(0), strict=True)}
        for key, readout in READOUTS.items():
            own[f"accuracy: {key}"] = float(clone(readout).fit(features(x), y).score(features(tests), truth))
        found[name] = own
    return found


def of_samples(seed: int) -> dict[str, float]:
    x, y, _, _ = digits(seed)
    rng = np.random.default_rng(seed)
    wrong, given = rng.random(ROWS) < NOISE, y.copy()
    given[wrong] = (given[wrong] + rng.integers(1, 10, wrong.sum())) % 10
    members = list(READOUTS.values())
    by: dict[str, Numbers] = {}
    for orders in (1, 4, 8):
        code = readout_switching(members, x, given, orders=orders, seed=seed)
        by[f"code length, {orders} orders"] = code.lengths.numpy()
    by["place in the first order (control)"] = -np.argsort(np.random.default_rng(seed).permutation(ROWS)).astype(float)
    folds = out_of_fold(members, x, given, seed=seed)
    by["loss out of fold (control)"] = ensemble_scores(list(folds.logits), folds.labels)["nll"].numpy()
    own = [np.log(clone(member).fit(x, given).predict_proba(x) + 1e-6) for member in members]
    logits = [torch.tensor(each, dtype=torch.float32) for each in own]
    by["loss of the training set (control)"] = ensemble_scores(logits, torch.tensor(given))["nll"].numpy()
    by["random (control)"] = rng.random(ROWS)
    return {name: float(roc_auc_score(wrong, values)) for name, values in by.items()}


def main() -> None:
    options.parser(__doc__).parse_args()
    began, console = time.perf_counter(), Console(width=140)
    samples = [of_samples(seed) for seed in range(SEEDS)]
    features = [of_features(seed) for seed in range(SEEDS)]
    table = Table(title=f"AUROC of {NOISE:.0%} wrong labels among {ROWS} digits, {SEEDS} seeds")
    for name in ("", "mean", "± sd"):
        table.add_column(name)
    for name in samples[0]:
        values = [run[name] for run in samples]
        table.add_row(name, f"{statistics.fmean(values):.3f}", f"{statistics.stdev(values):.3f}")
    console.print(table)
    table = Table(title="nats of all labels, and accuracy on test data")
    for name in ("", *features[0]):
        table.add_column(name)
    for key in features[0]["pixels"]:
        values = [statistics.fmean(run[name][key] for run in features) for name in features[0]]
        table.add_row(key, *(f"{value:.3f}" if key.startswith("acc") else f"{value:.0f}" for value in values))
    console.print(table)
    found = {**machine(), "seeds": SEEDS, "rows": ROWS, "noise": NOISE, "seconds": time.perf_counter() - began}
    found |= {"samples": samples, "features": features}
    (RESULTS / "quality-readout-switching.json").write_text(dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
