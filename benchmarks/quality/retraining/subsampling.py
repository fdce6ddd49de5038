"""Model-specific subsampling on digits with wrong labels: logistic regression on what is chosen, beside random rows.

900 digits of which a share has a wrong label, 100 clean ones to validate, 797 to judge. 200 are chosen in five rounds.
The control that costs nothing trains one model on the validation digits and takes the rows of least loss; another adds
the validation digits themselves to random rows.
"""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

from assay.retrain import subsample
from assay.tasks import Classification

POOL, VALIDATION, SIZE, PENALTY = 900, 100, 200, 0.01
NOISE = (0.0, 0.2, 0.4)
Labelled = tuple[Tensor, Tensor]


def world(noise: float, seed: int) -> tuple[Labelled, NDArray[np.bool_], Labelled, Labelled]:
    """Pool, which of its labels are wrong, validation, test."""
    features, digits = load_digits(return_X_y=True)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(features))
    x, y = torch.tensor(features[order] / 16, dtype=torch.float32), digits[order].copy()
    wrong = np.zeros(POOL, bool)
    wrong[rng.choice(POOL, round(noise * POOL), replace=False)] = True
    y[:POOL][wrong] = (y[:POOL][wrong] + rng.integers(1, 10, int(wrong.sum()))) % 10
    labels = torch.tensor(y)
    cuts = [slice(POOL), slice(POOL, POOL + VALIDATION), slice(POOL + VALIDATION, None)]
    pool, validation, test = ((x[cut], labels[cut]) for cut in cuts)
    return pool, wrong, validation, test


def fitted(x: Tensor, y: Tensor) -> nn.Module:
    """Mean loss + PENALTY/2 ‖θ‖², weight and bias, of ten classes whether the rows have them or not."""
    model, own = nn.Linear(64, 10).double(), x.double()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=1000, tolerance_grad=1e-7, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        size = torch.stack([p.square().sum() for p in model.parameters()]).sum()
        loss = nn.functional.cross_entropy(model(own), y) + PENALTY / 2 * size
        loss.backward()
        return loss

    optimizer.step(objective)
    return model.float()


def accuracy(model: nn.Module, test: Labelled) -> float:
    with torch.no_grad():
        return float((model(test[0]).argmax(1) == test[1]).float().mean())


def one(noise: float, seed: int) -> dict[str, Any]:
    pool, wrong, validation, test = world(noise, seed)
    x, y = pool

    def train(rows: NDArray[np.int64], seed: int) -> nn.Module:
        return fitted(x[rows], y[rows])

    def grown(explore: float, rounds: int) -> Any:
        return subsample(
            train,
            pool,
            validation,
            Classification(),
            SIZE,
            penalty=PENALTY,
            explore=explore,
            rounds=rounds,
            seed=seed,
        )

    rng = np.random.default_rng(1000 + seed)
    guide = fitted(*validation)
    with torch.no_grad():
        losses = nn.functional.cross_entropy(guide(x), y, reduction="none").numpy()
    runs = {
        "influence, ε = 0.1": grown(0.1, 5),
        "influence, ε = 0": grown(0.0, 5),
        "influence, one round": grown(0.1, 1),
    }
    chosen = {name: run.rows for name, run in runs.items()}
    chosen["least loss of a validation model (control)"] = np.argsort(losses, kind="stable")[:SIZE]
    chosen["random"] = rng.permutation(POOL)[:SIZE]
    found = {name: accuracy(train(rows, 0), test) for name, rows in chosen.items()}
    mixed = [torch.cat([a[chosen["random"]], b]) for a, b in zip(pool, validation, strict=True)]
    found["random and the validation rows (control)"] = accuracy(fitted(*mixed), test)
    found["the validation rows alone (control)"] = accuracy(guide, test)
    found["all 900"] = accuracy(train(np.arange(POOL), 0), test)
    first = runs["influence, ε = 0.1"]
    return {
        "accuracy": found,
        "wrong": {name: float(wrong[rows].mean()) for name, rows in chosen.items()},
        "losses": first.losses.tolist(),
        "predicted": first.predicted.tolist(),
        "residuals": first.residuals.tolist(),
    }


def run(quick: bool) -> dict[str, Any]:
    seeds = 1 if quick else 5
    return {f"{noise:g}": [one(noise, seed) for seed in range(seeds)] for noise in NOISE}


def table(found: dict[str, Any]) -> Table:
    runs = {noise: found[f"{noise:g}"] for noise in NOISE}
    out = Table(
        title=f"Accuracy ± sd of {SIZE} chosen of {POOL} digits, {len(runs[0.0])} seeds; in brackets: wrong labels"
    )
    out.add_column("chosen by")
    for noise in NOISE:
        out.add_column(f"{noise:.0%} wrong")
    for name in runs[0.0][0]["accuracy"]:
        cells = []
        for own in runs.values():
            values = [run["accuracy"][name] for run in own]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            wrong = [run["wrong"].get(name) for run in own]
            tail = f" ({statistics.fmean(wrong):.2f})" if wrong[0] is not None else ""
            cells.append(f"{statistics.fmean(values):.3f} ± {spread:.3f}{tail}")
        out.add_row(name, *cells)
    return out
