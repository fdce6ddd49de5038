"""What a student recovers of the gap to true labels: ``python -m benchmarks.quality.weak_to_strong [--quick]``.

scikit-learn's digits. Three small models (four tanh units; with ReLU all of a model's may die) learn from 60 labelled
digits that nobody else sees; their mixture is the weak supervisor and labels 1,000 others. The student is the small
convolutional network of the online benchmark; it never sees a true label. One seed is one split and one start; every
student has the same start, the same batches (but for those of selections) and number of steps. PGR is the performance
gap recovered (2312.09390): 0 is the weak mixture's own accuracy on the 737 digits left over, 1 is that of the same
student on true labels.

The confidence loss has the paper's coefficients and a ramp over its warm-up, a tenth of the steps; nothing here is
tuned. The paper's students are pretrained, so that weak labels elicit what they know already: this one starts from
nothing.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

from assay._json import dumps
from assay.ops import ensemble_stats
from assay.train.losses import confidence, distillation_of_logits, performance_gap_recovered, ramp
from benchmarks import options
from benchmarks.quality.online.classification import accuracy
from benchmarks.quality.online.digits import small_cnn
from benchmarks.timing import RESULTS, machine

WEAK, LABELLED, POOL, BATCH = 3, 60, 1000, 64
CEILING = "true labels (the ceiling)"

Loss = Callable[[Tensor, Tensor, int], Tensor]  # logits, rows of the pool, step -> losses


@dataclass(frozen=True)
class World:
    """One seed's data, weak supervision and start."""

    x: Tensor  # the pool
    right: Tensor
    test: tuple[Tensor, Tensor]
    weak_logits: Tensor  # (models, pool, 10)
    weak_accuracy: float
    start: nn.Module
    batches: list[Tensor]

    @property
    def labels(self) -> Tensor:
        """The weak mixture's."""
        return self.weak_logits.softmax(-1).mean(0).argmax(1)


def weak_model(x: Tensor, y: Tensor) -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.Tanh(), nn.Linear(4, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(200):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def make_world(seed: int, steps: int) -> World:
    pixels, digits = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels / 16, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(digits)
    torch.manual_seed(seed)
    order = torch.randperm(len(x))
    labelled, pool, test = order[:LABELLED], order[LABELLED : LABELLED + POOL], order[LABELLED + POOL :]
    weak = [weak_model(x[labelled], y[labelled]) for _ in range(WEAK)]
    with torch.no_grad():
        logits = torch.stack([model(x[pool]) for model in weak])
        theirs = torch.stack([model(x[test]).softmax(1) for model in weak]).mean(0).argmax(1)
    batches = [torch.randperm(POOL)[:BATCH] for _ in range(steps)]
    weak_accuracy = float((theirs == y[test]).float().mean())
    return World(x[pool], y[pool], (x[test], y[test]), logits, weak_accuracy, small_cnn(), batches)


def train(world: World, loss: Loss, kept: Tensor | None = None) -> float:
    """The student's accuracy on the test digits, trained on the pool or on the rows ``kept`` of it."""
    model = copy.deepcopy(world.start)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    for step, rows in enumerate(world.batches):
        if kept is not None:
            rows = kept[torch.randperm(len(kept), generator=generator)[:BATCH]]
        optimizer.zero_grad()
        loss(model(world.x[rows]), rows, step).mean().backward()
        optimizer.step()
    return accuracy(model, world.test)


def one_seed(seed: int, steps: int) -> dict[str, Any]:
    """Accuracies by training, and the weak supervision's own."""
    world = make_world(seed, steps)
    labels, logits = world.labels, world.weak_logits

    def cross_entropy(targets: Tensor) -> Loss:
        return lambda z, rows, step: F.cross_entropy(z, targets[rows], reduction="none")

    def confident(alpha: float) -> Loss:
        return lambda z, rows, step: confidence(z, labels[rows], ramp(step, steps // 10, alpha))

    def distilled(**options: Any) -> Loss:
        return lambda z, rows, step: distillation_of_logits(z, logits[:, rows], **options)

    stats = ensemble_stats(logits, fields=["confidence"])
    assert stats.confidence is not None
    surest = stats.confidence.argsort(descending=True)[: POOL // 2]
    agreed = torch.nonzero((logits.argmax(-1) == labels).all(0))[:, 0]
    plain = partial(train, world, cross_entropy(labels))
    accuracies = {
        "weak labels": plain(),
        "confidence loss, alpha 0.5": train(world, confident(0.5)),
        "confidence loss, alpha 0.75": train(world, confident(0.75)),
        "distillation, T = 1": train(world, distilled()),
        "distillation, T = 2": train(world, distilled(temperature=2.0)),
        "distillation, reverse, T = 1": train(world, distilled(reverse=True)),
        "weak labels of the surest half": plain(surest),
        "weak labels that all agree on": plain(agreed),
        "weak labels of a random half": plain(torch.randperm(POOL)[: POOL // 2]),
        CEILING: train(world, cross_entropy(world.right)),
    }
    is_right = (labels == world.right).float()
    facts = {"all": is_right, "surest half": is_right[surest], "agreed": is_right[agreed]}
    right = {name: float(values.mean()) for name, values in facts.items()}
    return {"accuracy": accuracies, "weak": world.weak_accuracy, "right": right, "agreed": len(agreed)}


def summary(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """By training: every seed's accuracy and PGR."""
    return [
        {
            "training": name,
            "accuracy": [run["accuracy"][name] for run in runs],
            "pgr": [
                performance_gap_recovered(run["weak"], run["accuracy"][name], run["accuracy"][CEILING]) for run in runs
            ],
        }
        for name in runs[0]["accuracy"]
    ]


def show(console: Console, runs: Sequence[dict[str, Any]]) -> None:
    table = Table(title=f"A student of {WEAK} weak models on digits, {len(runs)} seeds")
    for column in ("training", "test accuracy", "± sd", "PGR", "± sd"):
        table.add_column(column)
    weak = [run["weak"] for run in runs]
    for row in [{"training": "the weak models themselves", "accuracy": weak, "pgr": [0.0] * len(runs)}, *summary(runs)]:
        numbers = [f(row[key]) for key in ("accuracy", "pgr") for f in (statistics.fmean, _spread)]
        table.add_row(row["training"], *(f"{number:.3f}" for number in numbers))
    console.print(table)
    right = {name: statistics.fmean(run["right"][name] for run in runs) for name in runs[0]["right"]}
    console.print("Right among the weak labels: " + ", ".join(f"{name} {share:.3f}" for name, share in right.items()))
    console.print(f"All weak models agree on {statistics.fmean(run['agreed'] for run in runs):.0f} of {POOL}")


def _spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def main() -> None:
    quick = options.quick(__doc__)
    seeds, steps = (1, 100) if quick else (10, 200)
    began = time.perf_counter()
    runs = [one_seed(seed, steps) for seed in range(seeds)]
    show(Console(), runs)
    if not quick:
        facts = {key: [run[key] for run in runs] for key in ("weak", "right", "agreed")}
        found = {**machine(), "steps": steps, "seconds": time.perf_counter() - began, **facts, "results": summary(runs)}
        (RESULTS / "quality-weak-to-strong.json").write_text(dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
