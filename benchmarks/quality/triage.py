"""Does TRIAGE find targets that were moved? ``python -m benchmarks.quality.triage``.

Two regressions: scikit-learn's diabetes (real: 442 patients, ten features, the disease's progress a year later) and
Friedman's first function (1,800 samples). 20 % of the training targets are moved by two standard deviations, up or
down. A small network trains on them; ten checkpoints on its way, and a held-out calibration set with right targets.
AUROC of the moved targets by |C − ½|, beside the controls: |residual| of the last checkpoint, the mean over all
checkpoints, and a random order. What the paper's rule flags, of moved and of right targets. And what retraining is
worth: the error on test data of networks trained on all, on what the rule keeps, on as many of the lowest |C − ½|, of
the lowest mean |residual|, at random, and without the moved ones.
"""

from __future__ import annotations

import copy
import statistics
import time
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_diabetes, make_friedman1
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

import assay
from assay._json import dumps
from assay.methods import TRIAGE
from assay.tasks import Regression
from benchmarks import options
from benchmarks.timing import RESULTS, machine

SEEDS, SHARE, SHIFT = 3, 0.2, 2.0
CHECKPOINTS, STEPS, BATCH, RATE = 10, 500, 32, 0.02
Facts = dict[str, float]


def data(name: str, seed: int) -> tuple[Tensor, Tensor]:
    """Standardised features and targets, shuffled."""
    if name == "diabetes":
        x, y = load_diabetes(return_X_y=True)
    else:
        x, y = make_friedman1(1800, noise=1.0, random_state=seed)
    order = np.random.default_rng(seed).permutation(len(x))
    x, y = (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()
    return torch.tensor(x[order], dtype=torch.float32), torch.tensor(y[order], dtype=torch.float32)


def train(x: Tensor, y: Tensor, seed: int) -> list[nn.Module]:
    """Checkpoints of a network, the last after all steps."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(x.shape[1], 32), nn.Tanh(), nn.Linear(32, 1), nn.Flatten(0))
    optimizer = torch.optim.SGD(net.parameters(), RATE, momentum=0.9)
    found: list[nn.Module] = []
    for step in range(STEPS):
        rows = torch.randint(len(x), (BATCH,), generator=generator)
        optimizer.zero_grad()
        (net(x[rows]) - y[rows]).square().mean().backward()
        optimizer.step()
        if step % (STEPS // CHECKPOINTS) == STEPS // CHECKPOINTS - 1:
            found.append(copy.deepcopy(net))
    return found


def rmse(x: Tensor, y: Tensor, test: tuple[Tensor, Tensor], seed: int) -> float:
    net = train(x, y, seed)[-1]
    with torch.no_grad():
        return float((net(test[0]) - test[1]).square().mean().sqrt())


def flagged(confidence: npt.NDArray[Any], variability: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """The paper's rule."""
    sure: npt.NDArray[np.bool_] = variability <= np.percentile(variability, 75)
    return sure & ((confidence <= 0.33) | (confidence >= 0.67))


def one_seed(name: str, seed: int, share: float) -> dict[str, Facts]:
    x, y = data(name, seed)
    n = len(x) // 2
    pool, calibration, test = x[:n], (x[n : n + n // 2], y[n : n + n // 2]), (x[n + n // 2 :], y[n + n // 2 :])
    rng = np.random.default_rng(seed)
    moved = rng.random(n) < share
    given = y[:n] + torch.tensor(moved * SHIFT * rng.choice([-1, 1], n), dtype=torch.float32)
    checkpoints = train(pool, given, seed)
    method = TRIAGE(checkpoints, Regression(), {"calibration": [calibration]}, at="0").fit()
    table = assay.score([(pool, given)], [method])
    score, confidence, variability = (table[f"triage{end}"].to_numpy() for end in ("", "_confidence", "_variability"))
    with torch.no_grad():
        residuals = torch.stack([(given - net(pool)).abs() for net in checkpoints]).numpy()
    flags = flagged(confidence, variability)
    rates = {"flagged": float(flags.mean()), "flagged of right targets": float(flags[~moved].mean())}
    if not share:
        return {"rule": rates}
    orders = {
        "triage": score,
        "last |residual| (control)": residuals[-1],
        "mean |residual| (control)": residuals.mean(0),
        "random (control)": rng.random(n),
    }
    kept = int((~flags).sum())
    chosen = {
        "all": np.ones(n, bool),
        "kept by the rule": ~flags,
        **{f"as many by {key}": np.argsort(np.argsort(own, kind="stable")) < kept for key, own in orders.items()},
        **{
            f"best 80 % by {key}": np.argsort(np.argsort(own, kind="stable")) < round((1 - share) * n)
            for key, own in orders.items()
        },
        "without the moved": ~moved,
    }
    return {
        "auroc": {key: float(roc_auc_score(moved, own)) for key, own in orders.items()},
        "rule": {**rates, "precision": float(moved[flags].mean()), "recall": float(flags[moved].mean())},
        "test error": {key: rmse(pool[mask], given[mask], test, seed) for key, mask in chosen.items()},
    }


def main() -> None:
    options.parser(__doc__).parse_args()
    began, console = time.perf_counter(), Console()
    results: dict[str, Any] = {}
    for name in ("diabetes", "friedman"):
        for share in (SHARE, 0.0):
            runs = [one_seed(name, seed, share) for seed in range(SEEDS)]
            own = {part: {key: [run[part][key] for run in runs] for key in runs[0][part]} for part in runs[0]}
            results[f"{name}, {share:.0%} moved"] = own
            table = Table(title=f"{name}, {share:.0%} of the targets moved, {SEEDS} seeds")
            for column in ("", "", "mean", "± sd"):
                table.add_column(column)
            for part, facts in own.items():
                for key, values in facts.items():
                    table.add_row(part, key, f"{statistics.fmean(values):.3f}", f"{statistics.stdev(values):.3f}")
            console.print(table)
    settings = {"seeds": SEEDS, "share": SHARE, "shift": SHIFT, "checkpoints": CHECKPOINTS, "steps": STEPS}
    found = {**machine(), **settings, "seconds": time.perf_counter() - began, "results": results}
    (RESULTS / "quality-triage.json").write_text(dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
