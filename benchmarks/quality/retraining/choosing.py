"""Choosing among sixteen small trained networks for a task on digits, beside training them all and halving.

Sixteen networks: three shapes, trained on five source tasks (or none), and a linear one. Ten tasks are ways to draw
digits (upright, turned, negative, …) with something to tell of them; each in turn is the new one, the other nine are
benchmarks with known curves. A network is tuned five epochs on 120 digits with a fresh output layer. The networks'
sources are trained on digits that no task has. Regret is the test accuracy of the best network minus that of the chosen
one, both after five epochs.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

from assay.retrain import choose_model, leep

EPOCHS, KEEP = 5, 10
SOURCE, TRAIN, VALIDATION, TEST = 700, 120, 300, 600
DRAWN: dict[str, Callable[[Tensor], Tensor]] = {
    "upright": lambda x: x,
    "turned": lambda x: x.rot90(1, (1, 2)),
    "mirrored": lambda x: x.flip(2),
    "negative": lambda x: 1 - x,
    "shifted": lambda x: x.roll(3, 2),
    "halved": lambda x: torch.cat([x[:, 4:], x[:, :4]], 1),
}
TOLD: dict[str, Callable[[Tensor], Tensor]] = {
    "digit": lambda y: y,
    "parity": lambda y: y % 2,
    "size": lambda y: (y >= 5).long(),
}
TASKS = [(drawn, "digit") for drawn in DRAWN] + [
    ("upright", "parity"),
    ("upright", "size"),
    ("turned", "parity"),
    ("negative", "size"),
]
SOURCES: list[tuple[str, str] | None] = [
    None,
    ("upright", "digit"),
    ("turned", "digit"),
    ("negative", "digit"),
    ("upright", "parity"),
]
SHAPES: dict[str, Callable[[], list[nn.Module]]] = {  # and 32 features
    "narrow": lambda: [nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 32), nn.ReLU()],
    "wide": lambda: [nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32), nn.ReLU()],
    "convolutional": lambda: [
        nn.Unflatten(1, (1, 8)),
        nn.Conv2d(1, 8, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(72, 32),
        nn.ReLU(),
    ],
}
Labelled = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Candidate:
    name: str
    body: nn.Module
    head: nn.Module  # of its source's classes


def classes_of(told: str) -> int:
    return 10 if told == "digit" else 2


def epoch(body: nn.Module, head: nn.Module, data: Labelled, generator: torch.Generator, rate: float = 0.05) -> None:
    parameters = [*body.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(parameters, rate)
    for rows in torch.randperm(len(data[0]), generator=generator).split(10):
        optimizer.zero_grad()
        nn.functional.cross_entropy(head(body(data[0][rows])), data[1][rows]).backward()
        optimizer.step()


def accuracy(body: nn.Module, head: nn.Module, data: Labelled) -> float:
    with torch.no_grad():
        return float((head(body(data[0])).argmax(1) == data[1]).float().mean())


def view(x: Tensor, y: Tensor, task: tuple[str, str]) -> Labelled:
    return DRAWN[task[0]](x).contiguous(), TOLD[task[1]](y)


def candidates(x: Tensor, y: Tensor, seed: int) -> list[Candidate]:
    found = []
    for shape, source in [*((s, o) for s in SHAPES for o in SOURCES), ("linear", None)]:
        torch.manual_seed(1000 * seed + len(found))
        body = nn.Sequential(nn.Flatten(), nn.Linear(64, 32)) if shape == "linear" else nn.Sequential(*SHAPES[shape]())
        head = nn.Linear(32, classes_of(source[1]) if source else 10)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(10 if source else 0):
            epoch(body, head, view(x, y, source or TASKS[0]), generator)
        found.append(Candidate(f"{shape}, {' '.join(source) if source else 'not trained'}", body, head))
    return found


def tuned(candidate: Candidate, parts: Sequence[Labelled], classes: int, seed: int) -> tuple[list[float], float]:
    """Validation accuracy after every epoch, and the last test accuracy."""
    torch.manual_seed(seed)
    body, head = copy.deepcopy(candidate.body), nn.Linear(32, classes)
    generator, curve = torch.Generator().manual_seed(seed), []
    for _ in range(EPOCHS):
        epoch(body, head, parts[0], generator)
        curve.append(accuracy(body, head, parts[1]))
    return curve, accuracy(body, head, parts[2])


def halving(curves: np.ndarray[Any, Any]) -> tuple[int, int]:
    """Successive halving of all: the model that is left, and the epochs trained."""
    live, spent = np.arange(len(curves)), 0
    for e in range(EPOCHS):
        spent += len(live)
        live = live[np.argsort(-curves[live, e], kind="stable")][: -(-len(live) // 2)]
    return int(live[0]), spent


def one_seed(seed: int) -> dict[str, Any]:
    """By way of choosing: regrets and epochs, over the tasks."""
    pixels, digits = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(pixels))
    x, y = torch.tensor(pixels[order] / 16, dtype=torch.float32).view(-1, 8, 8), torch.tensor(digits[order])
    models = candidates(x[:SOURCE], y[:SOURCE], seed)
    curves, finals = np.zeros((len(models), len(TASKS), EPOCHS)), np.zeros((len(models), len(TASKS)))
    leeps = np.zeros((len(models), len(TASKS)))
    for t, task in enumerate(TASKS):
        rows = SOURCE + torch.randperm(len(x) - SOURCE, generator=torch.Generator().manual_seed(100 * seed + t))
        cuts = rows[: TRAIN + VALIDATION + TEST].split([TRAIN, VALIDATION, TEST])
        parts = [view(x[own], y[own], task) for own in cuts]
        for m, model in enumerate(models):
            curves[m, t], finals[m, t] = tuned(model, parts, classes_of(task[1]), seed)
            with torch.no_grad():
                leeps[m, t] = leep(model.head(model.body(parts[0][0])).softmax(1), parts[0][1])
    found: dict[str, Any] = {}

    def note(way: str, task: int, model: int, epochs: int) -> None:
        own = found.setdefault(way, {"regret": [], "epochs": []})
        own["regret"].append(float(finals[:, task].max() - finals[model, task]))
        own["epochs"].append(epochs)

    rng = np.random.default_rng(seed)
    for t in range(len(TASKS)):
        others = np.delete(np.arange(len(TASKS)), t)
        ways = {"recall and select": KEEP, "select alone": len(models)}
        for way, keep in ways.items():
            choice = choose_model(
                lambda m, e, t=t: curves[m, t, e],
                curves[:, others, -1],
                curves[:, others],
                leeps[:, t],
                keep=keep,
                epochs=EPOCHS,
            )
            note(way, t, int(choice.model), choice.epochs)
        note("successive halving of all", t, *halving(curves[:, t]))
        note("all trained", t, int(curves[:, t, -1].argmax()), curves[:, t].size)
        note("best on benchmarks (control)", t, int(curves[:, others, -1].mean(1).argmax()), 0)
        note("highest LEEP (control)", t, int(leeps[:, t].argmax()), 0)
        some = rng.choice(len(models), KEEP, replace=False)
        left, spent = halving(curves[some, t])
        note(f"halving of {KEEP} at random (control)", t, int(some[left]), spent)
        note("random", t, int(rng.integers(len(models))), 0)
    return {"ways": found, "models": [model.name for model in models], "finals": finals.round(4).tolist()}


def run(quick: bool) -> dict[str, Any]:
    return {"tasks": TASKS, "seeds": [one_seed(seed) for seed in range(1 if quick else 5)]}


def table(found: dict[str, Any]) -> Table:
    runs = found["seeds"]
    out = Table(title=f"One of {len(runs[0]['models'])} networks for each of {len(TASKS)} tasks, {len(runs)} seeds")
    for column in ("chosen by", "mean regret", "± se", "largest", "epochs trained"):
        out.add_column(column)
    for way in runs[0]["ways"]:
        regrets = [value for run in runs for value in run["ways"][way]["regret"]]
        epochs = [value for run in runs for value in run["ways"][way]["epochs"]]
        error = statistics.stdev(regrets) / len(regrets) ** 0.5
        numbers = (statistics.fmean(regrets), error, max(regrets))
        out.add_row(way, *(f"{number:.4f}" for number in numbers), f"{statistics.fmean(epochs):.1f}")
    return out
