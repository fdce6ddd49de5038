"""What is trained on labels of which some are wrong, and how it is judged, whatever the images are.

One seed is one split, one noise, one start (a `World`). The reference is the same start trained on trusted samples that
nobody else trains on; in-run influence has no reference and takes their gradient instead, a batch of them in each step.
Every selection trains with the same optimizer and number of steps: plain SGD; online weights by GraNd, RHO-loss, mimic
(of the head, of all layers) and in-run influence, the last two as filters, too; stage 2, which cuts the mean mimic of
an observed run by each identifier and trains on what is kept; the right labels alone (oracle).

The temperature is Reweighter's default everywhere. (At a tenth of it the network on the digits collapses: its first
steps are made of a few samples each.)
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from sklearn.metrics import f1_score
from torch import Tensor, nn

from assay import select
from assay._json import dumps
from assay.corpus.tables import make_table
from assay.methods import Column, GradMimic, GraNd, InRunInfluence
from assay.tasks import Classification
from assay.train import Reweighter
from benchmarks.timing import RESULTS, machine

NOISE = (0.4, 0.5, 0.6)
BATCH = 64
TASK = Classification()


@dataclass(frozen=True)
class World:
    """One seed's data and start."""

    x: Tensor
    given: Tensor  # the training samples' labels, some of them wrong
    right: Tensor
    is_wrong: Tensor
    test: tuple[Tensor, Tensor]
    trusted: tuple[Tensor, Tensor]
    start: nn.Module  # an nn.Sequential, whose last module is the head
    batches: list[Tensor]
    trusted_batches: list[Tensor]  # that the reference is trained on
    every: int  # the steps from one test to the next


def mislabelled(labels: Tensor, classes: int, noise: float) -> tuple[Tensor, Tensor]:
    """Labels of which a share is another class, any alike, and which those are; drawn from torch's own numbers."""
    count = len(labels)
    is_wrong = torch.zeros(count, dtype=torch.bool)
    is_wrong[torch.randperm(count)[: int(noise * count)]] = True
    return torch.where(is_wrong, (labels + torch.randint(1, classes, (count,))) % classes, labels), is_wrong


def accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    with torch.no_grad():
        return float((model(data[0]).argmax(1) == data[1]).float().mean())


Backward = Callable[[Tensor, Tensor], None]


def train(world: World, model: nn.Module, backward: Backward, batches: Sequence[Tensor]) -> list[float]:
    """Test accuracies, one every ``world.every`` steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    found = []
    for step, rows in enumerate(batches, 1):
        optimizer.zero_grad()
        backward(F.cross_entropy(model(world.x[rows]), world.given[rows], reduction="none"), rows)
        optimizer.step()
        if step % world.every == 0:
            found.append(accuracy(model, world.test))
    return found


def plain(losses: Tensor, rows: Tensor) -> None:
    losses.mean().backward()


def trained_reference(world: World) -> nn.Module:
    model = copy.deepcopy(world.start)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    x, y = world.trusted
    for rows in world.trusted_batches:
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    return model


def reweighted(world: World, method: Callable[[nn.Module], Any], **settings: Any) -> tuple[list[float], pa.Table]:
    """Online weights -> the accuracies, and what was scored."""
    reference_losses = settings.pop("reference_losses", None)
    model = copy.deepcopy(world.start)
    reweighter = Reweighter(model, method(model), **settings)

    def backward(losses: Tensor, rows: Tensor) -> None:
        theirs = None if reference_losses is None else reference_losses[rows]
        reweighter.backward(losses, rows, reference_losses=theirs)

    return train(world, model, backward, world.batches), reweighter.table()


def filtered(world: World, kept: Tensor) -> list[float]:
    """The batches' samples of which only some are left, as many to a batch, trained on plainly."""
    rows = torch.nonzero(kept).flatten()
    generator = torch.Generator().manual_seed(0)
    batches = [rows[torch.randperm(len(rows), generator=generator)[:BATCH]] for _ in world.batches]
    return train(world, copy.deepcopy(world.start), plain, batches)


def mean_scores(journal: pa.Table) -> pa.Table:
    """A score table of every sample's mean mimic in training."""
    means = journal.group_by("id").aggregate([("mimic", "mean")])
    rows = np.array([int(i) for i in means["id"].to_pylist()])
    scores = means["mimic_mean"].to_numpy().astype(np.float32)
    return make_table(rows, [str(row) for row in rows], {"mimic": scores}, [Column("mimic", "high", "mean")], {})


IDENTIFIERS: dict[str, Callable[[pa.Table, float], Any]] = {
    "mimic > 0": lambda table, noise: select.threshold(table, "mimic", 0.0),
    "GMM": lambda table, noise: select.gmm(table, "mimic"),
    "k-means": lambda table, noise: select.kmeans(table, "mimic"),
    "share known": lambda table, noise: select.top(table, "mimic", 1 - noise),
}


def one_seed(world: World, noise: float) -> dict[str, Any]:
    """The accuracies in training by selection, the identifiers' F1, the reference's accuracy."""
    reference = trained_reference(world)
    with torch.no_grad():
        theirs = F.cross_entropy(reference(world.x), world.given, reduction="none")
    head = f"{len(world.start) - 1}"  # type: ignore[arg-type]

    def mimic(layers: str | None) -> Callable[[nn.Module], GradMimic]:
        return lambda model: GradMimic(model, reference, TASK, layers)

    def in_run(model: nn.Module) -> InRunInfluence:
        x, y = world.trusted
        count = -(-len(x) // BATCH)
        batches = list(zip(x.chunk(count), y.chunk(count), strict=True))
        return InRunInfluence(model, TASK, {"trusted": batches}, normalise=True)

    online = {
        "GraNd, online": reweighted(world, lambda model: GraNd(model, TASK)),
        "RHO, online": reweighted(world, mimic(head), by="rho", reference_losses=theirs),
        "mimic, online, head": reweighted(world, mimic(head), layers=head),
        "mimic, online, all layers": reweighted(world, mimic(None)),
        "mimic, best half of a batch": reweighted(world, mimic(None), mode="filter", keep=0.5),
        "in-run influence, online": reweighted(world, in_run),
        "in-run influence, best half of a batch": reweighted(world, in_run, mode="filter", keep=0.5),
    }
    curves = {"SGD": train(world, copy.deepcopy(world.start), plain, world.batches)}
    curves |= {name: curve for name, (curve, _) in online.items()}
    curves["oracle"] = filtered(world, ~world.is_wrong)
    table = mean_scores(reweighted(world, mimic(None), mode="observe")[1])
    rows = torch.tensor(table["row"].to_numpy())  # of those that came
    scores = {}
    for name, identify in IDENTIFIERS.items():
        kept = torch.zeros(len(world.given), dtype=torch.bool)
        kept[rows[torch.tensor(identify(table, noise).mask)]] = True
        scores[name] = float(f1_score(world.is_wrong[rows].numpy(), ~kept[rows].numpy()))
        curves[f"mimic, then {name}"] = filtered(world, kept)
    found = {"curves": curves, "f1": scores, "reference": accuracy(reference, world.test), "every": world.every}
    return found | {"weights": {name: of_weights(world, journal) for name, (_, journal) in online.items()}}


def of_weights(world: World, journal: pa.Table) -> dict[str, float]:
    """How many samples a batch's weights amount to, as a share of it, and the share of all weight on wrong labels."""
    weights = journal["weight"].to_numpy().reshape(len(world.batches), -1)
    rows = torch.tensor([int(i) for i in journal["id"].to_pylist()])
    wrong = world.is_wrong[rows].numpy().reshape(weights.shape)
    share = float((1 / np.square(weights).mean(1)).mean())  # weights of mean 1
    return {"effective_share": share, "weight_on_wrong": float(weights[wrong].sum() / weights.sum())}


def steps_to(curve: Sequence[float], goal: float, every: int) -> int | None:
    """The first step at which the accuracy is at least the goal."""
    return next((every * (i + 1) for i, value in enumerate(curve) if value >= goal), None)


def summary(runs: Sequence[dict[str, Any]], plain: str = "SGD") -> list[dict[str, Any]]:
    """By selection the final accuracies, and the shares of the steps to that of training without one, ``plain``."""
    rows = []
    for name in runs[0]["curves"]:
        final = [statistics.fmean(run["curves"][name][-5:]) for run in runs]
        share = []
        for run in runs:
            baseline = run["curves"][plain]
            steps = steps_to(run["curves"][name], statistics.fmean(baseline[-5:]), run["every"])
            share.append(None if steps is None else steps / (run["every"] * len(baseline)))
        reached = [value for value in share if value is not None]
        median = statistics.median(reached) if len(reached) == len(share) else None
        row = {"selection": name, "accuracy": final, f"steps_to_{plain.lower()}": share, "median_steps": median}
        each = [run["weights"][name] for run in runs if name in run.get("weights", {})]
        rows.append(row | {key: [own[key] for own in each] for key in (each[0] if each else ())})
    return rows


def show(console: Console, title: str, runs: Sequence[dict[str, Any]], plain: str = "SGD") -> None:
    table = Table(title=f"{title}, {len(runs)} seeds")
    for column in ("training", "test accuracy", "± sd", f"steps to that of {plain}"):
        table.add_column(column)
    for row in summary(runs, plain):
        spread = statistics.stdev(row["accuracy"]) if len(runs) > 1 else 0.0
        steps = "not by every seed" if row["median_steps"] is None else f"{row['median_steps']:.0%}"
        table.add_row(row["selection"], f"{statistics.fmean(row['accuracy']):.3f}", f"{spread:.3f}", steps)
    table.add_row("the reference itself", f"{statistics.fmean(run['reference'] for run in runs):.3f}", "", "")
    console.print(table)
    f1 = {name: statistics.fmean(run["f1"][name] for run in runs) for name in IDENTIFIERS}
    console.print("F1 of what is wrong: " + ", ".join(f"{name} {value:.3f}" for name, value in f1.items()))


def compared(
    models: Mapping[str, Callable[[float, int], World]], noises: Sequence[float], seeds: int, file: str | None
) -> None:
    """Show each model, by name from noise and seed to its world, and write all of them to a file of the results."""
    console, began, results = Console(), time.process_time(), []
    for model, make_world in models.items():
        for noise in noises:
            runs = [one_seed(make_world(noise, seed), noise) for seed in range(seeds)]
            show(console, f"{model}, {noise:.0%} of the labels wrong", runs)
            f1 = {name: [run["f1"][name] for run in runs] for name in IDENTIFIERS}
            own = {"model": model, "noise": noise, "rows": summary(runs), "f1": f1}
            results.append(own | {"reference": [run["reference"] for run in runs]})
    if file is not None:
        steps = len(runs[0]["curves"]["SGD"]) * runs[0]["every"]
        found = {**machine(), "steps": steps, "cpu_seconds": time.process_time() - began, "results": results}
        (RESULTS / file).write_text(dumps(found, indent=1) + "\n")
