"""Do trajectories of training find wrong labels? ``python -m benchmarks.quality.trajectories [--quick]``.

scikit-learn's digits, 1,000 of them to train on, 20 % of whose labels are wrong (symmetric noise), and a small network
that learns them by heart over 60 epochs of SGD: at the end it agrees with most of the wrong labels, so that one look at
it is worth less than its whole way there. What was recorded on that way (``Dynamics`` and ``GraNd``, observed) is
scored by AUROC against the planted wrong labels: AUM, forgetting, data maps' coordinates, EL2N and gradient length in
the first epochs, the mean loss; after all epochs and after the first ten. Beside them stand the loss in the last
of those epochs alone, and a random order. Five seeds: one is one split, one noise, one start, one order of the batches.

Each score counts in the direction of "wrong": low AUM, confidence and correctness, high forgetting, variability, loss,
EL2N and gradient length. That variability or forgetting points the other way is a result, not an error.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from assay._json import dumps
from assay.methods import Dynamics, GraNd, Method
from assay.tasks import Classification
from assay.train import Reweighter, trajectories
from benchmarks import options
from benchmarks.quality.online.classification import mislabelled
from benchmarks.timing import RESULTS, machine

TRAIN, NOISE, BATCH = 1000, 0.2, 50
EPOCHS, EARLY = 60, 10
TASK = Classification()


@dataclass(frozen=True)
class World:
    """One seed's data."""

    x: Tensor
    given: Tensor  # the training samples' labels, some of them wrong
    right: Tensor
    is_wrong: Tensor
    test: tuple[Tensor, Tensor]
    seed: int


def make_world(seed: int) -> World:
    pixels, digits = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(digits)
    torch.manual_seed(seed)
    order = torch.randperm(len(x))
    train, test = order[:TRAIN], order[TRAIN:]
    given, is_wrong = mislabelled(y[train], 10, NOISE)
    return World(x[train], given, y[train], is_wrong, (x[test], y[test]), seed)


def observed(world: World, method: type[Dynamics | GraNd], epochs: int) -> tuple[nn.Module, pa.Table]:
    """Train with the method looking on -> the network, and what was recorded."""
    torch.manual_seed(world.seed)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    scored: Method = method(model, TASK)
    reweighter = Reweighter(model, scored, mode="observe")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(epochs):
        for rows in torch.randperm(TRAIN).view(-1, BATCH):
            optimizer.zero_grad()
            logits, labels = model(world.x[rows]), world.given[rows]
            losses = F.cross_entropy(logits, labels, reduction="none")
            reweighter.backward(losses, rows, logits=logits, labels=labels)
            optimizer.step()
    return model, reweighter.table()


def scores(dynamics: pa.Table, lengths: pa.Table | None = None) -> dict[str, pa.Table]:
    """By name a table with the score in its second column; the higher, the likelier is the label wrong."""
    maps, forgotten = trajectories.data_map(dynamics), trajectories.forgetting(dynamics)
    found = {
        "AUM": negated(trajectories.aum(dynamics), "aum"),
        "forgetting": forgotten.select(["id", "forgetting_order"]),
        "forgetting, count alone": forgotten.select(["id", "forgetting"]),
        "confidence (data map)": negated(maps, "confidence"),
        "variability (data map)": maps.select(["id", "variability"]),
        "correctness (data map)": negated(maps, "correctness"),
        "mean loss": trajectories.mean(dynamics, "loss"),
        "last epoch's loss": dynamics.slice(dynamics.num_rows - TRAIN).select(["id", "loss"]),
    }
    for first in (1, 5, 10):
        found[f"EL2N, first {first}"] = trajectories.early(dynamics, "el2n", first=first)
        if lengths is not None:
            found[f"GraNd, first {first}"] = trajectories.early(lengths, "grand", first=first)
    return found


def negated(table: pa.Table, name: str) -> pa.Table:
    return pa.table({"id": table["id"], name: pc.negate(table[name])})


def until(table: pa.Table, epochs: int) -> pa.Table:
    """What was recorded in the first epochs."""
    return table.filter(pc.less_equal(table["step"], epochs * (TRAIN // BATCH)))


def auroc(world: World, table: pa.Table) -> float:
    rows = np.array([int(i) for i in table["id"].to_pylist()])
    return float(roc_auc_score(world.is_wrong.numpy()[rows], table.column(1).to_numpy()))


def one_seed(seed: int, epochs: int = EPOCHS) -> dict[str, Mapping[str, float]]:
    """AUROC by score, of what was recorded in all epochs and in the first ones; and what the network has learned."""
    world = make_world(seed)
    model, dynamics = observed(world, Dynamics, epochs)
    _, lengths = observed(world, GraNd, min(epochs, EARLY))
    chance = pa.table({"id": [str(i) for i in range(TRAIN)], "random": torch.rand(TRAIN).numpy()})
    whole = {name: auroc(world, own) for name, own in scores(dynamics, lengths).items()}
    early = {name: auroc(world, own) for name, own in scores(until(dynamics, EARLY)).items() if "first" not in name}
    with torch.no_grad():
        said, test = model(world.x).argmax(1), model(world.test[0]).argmax(1)
    learned = (said == world.given)[world.is_wrong].float().mean()
    return {
        "all epochs": {**whole, "random": auroc(world, chance)},
        "first epochs": early,
        "network": {
            "wrong labels learned by heart": float(learned),
            "test accuracy": float((test == world.test[1]).float().mean()),
        },
    }


def summary(runs: list[dict[str, Mapping[str, float]]]) -> dict[str, dict[str, list[float]]]:
    """By part and score the seeds' numbers."""
    return {part: {name: [run[part][name] for run in runs] for name in own} for part, own in runs[0].items()}


def show(console: Console, found: dict[str, dict[str, list[float]]]) -> None:
    count = len(next(iter(found["network"].values())))
    table = Table(title=f"AUROC of wrong labels, {NOISE:.0%} of {TRAIN} digits, {count} seeds")
    for column in ("score", f"{EPOCHS} epochs", "± sd", f"first {EARLY}", "± sd"):
        table.add_column(column)
    for name, values in found["all epochs"].items():
        cells = [name]
        for own in (values, found["first epochs"].get(name)):
            spread = statistics.stdev(own) if own and len(own) > 1 else 0.0
            cells += [f"{statistics.fmean(own):.3f}", f"{spread:.3f}"] if own else ["", ""]
        table.add_row(*cells)
    console.print(table)
    for name, values in found["network"].items():
        console.print(f"{name}: {statistics.fmean(values):.3f}")


def main() -> None:
    quick = options.quick(__doc__)
    began = time.perf_counter()
    found = summary([one_seed(seed) for seed in range(1 if quick else 5)])
    show(Console(), found)
    if not quick:
        settings = {"train": TRAIN, "noise": NOISE, "batch": BATCH, "epochs": EPOCHS, "first_epochs": EARLY}
        result = {**machine(), **settings, "seconds": time.perf_counter() - began, "auroc": found}
        (RESULTS / "quality-trajectories.json").write_text(dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
