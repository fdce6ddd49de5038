"""Do the scores find wrong labels? Digits at 20/40/60 % noise: ``python -m benchmarks.quality.detection``.

Out-of-fold ensemble and mimic, beside the controls (reference loss, random), and mimic towards an unrelated reference
with the correlation by which GradMimic tells.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import KNeighborsClassifier

import assay
from assay.demo.digits import network, train
from assay.methods import GradMimic, ensemble_scores
from assay.retrain import out_of_fold
from benchmarks import options
from benchmarks.timing import write

SEEDS = 3
POOL = 900


def noisy(noise: float, seed: int) -> tuple[torch.Tensor, np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    from sklearn.datasets import load_digits

    features, true = load_digits(return_X_y=True)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(features))
    x = (features - features.mean(0)) / (features.std(0) + 1e-6)
    given = true[order].copy()
    flipped = rng.choice(len(given), int(noise * len(given)), replace=False)
    given[flipped] = (given[flipped] + rng.integers(1, 10, len(flipped))) % 10
    return torch.tensor(x[order], dtype=torch.float32), given, true[order]


def mimic(model: torch.nn.Module, reference: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[Any, float]:
    method = GradMimic(model, reference, assay.tasks.Classification())
    table = assay.score([(x, y)], [method])
    return table, float(method.metadata()["lineage_correlation"])


def one(noise: float, seed: int) -> dict[str, float]:
    x, given, true = noisy(noise, seed)
    wrong = given != true
    members = [
        LogisticRegression(max_iter=300, C=0.05),
        RandomForestClassifier(100, random_state=seed),
        KNeighborsClassifier(15),
    ]
    ensemble = ensemble_scores(list(out_of_fold(members, x.numpy(), given, seed=seed).logits), torch.tensor(given))
    found = {
        f"ensemble_{n}": float(roc_auc_score(wrong, -ensemble[n].numpy()))
        for n in ("normalized_margin", "margin", "self_confidence", "agreement", "mutual_information")
    }
    found["random"] = float(roc_auc_score(wrong, np.random.default_rng(seed).random(len(wrong))))

    xs, ys, clean = x[:POOL], torch.tensor(given[:POOL]), (x[POOL:], torch.tensor(true[POOL:]))
    start = network(64, 64, 10, seed=seed)
    model = train(start, xs, ys, epochs=2, lr=0.01, seed=seed)
    related = train(start, *clean, epochs=20, lr=0.05, seed=seed)
    unrelated = train(network(64, 64, 10, seed=seed + 100), *clean, epochs=20, lr=0.05, seed=seed)
    for name, reference in (("mimic", related), ("mimic, unrelated reference", unrelated)):
        table, correlation = mimic(model, reference, xs, ys)
        found[name] = float(roc_auc_score(wrong[:POOL], -table["mimic"].to_numpy()))
        found[f"correlation: {name}"] = correlation
        if name == "mimic":
            found["reference_loss (control)"] = float(roc_auc_score(wrong[:POOL], table["reference_loss"].to_numpy()))
            found["rho"] = float(roc_auc_score(wrong[:POOL], -table["rho"].to_numpy()))
    return found


def main() -> None:
    options.parser(__doc__).parse_args()
    cases = []
    table = Table(title=f"AUROC of finding wrong labels on digits, mean over {SEEDS} seeds")
    table.add_column("score")
    columns: dict[str, list[str]] = defaultdict(list)
    for noise in (0.2, 0.4, 0.6):
        runs = [one(noise, seed) for seed in range(SEEDS)]
        means = {name: statistics.fmean(run[name] for run in runs) for name in runs[0]}
        cases.append({"noise": noise, "seeds": SEEDS, "mean": means, "runs": runs})
        table.add_column(f"{noise:.0%}", justify="right")
        for name, value in means.items():
            columns[name].append(f"{value:.4f}")
    for name, values in columns.items():
        table.add_row(name, *values)
    Console(width=100).print(table)
    print("written to", write("detection", cases).name)


if __name__ == "__main__":
    main()
