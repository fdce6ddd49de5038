"""Datamodel matching on digits: KLOM to models that were trained without, beside doing nothing and gradient ascent.

300 digits train MLPs; a set of 15 is to be forgotten: random ones, or of one class. Datamodels of all logits are fitted
to trainings on random halves. Each of the original models (a seed each) is tuned to its own predicted outputs. The
controls are tuned with a rate and a number of steps of a grid, that with the least KLOM to the very oracles of the
table: in their favour.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor
from torch.func import functional_call, grad, vmap

from assay.retrain import SmallModelDatamodel, forget, klom
from assay.retrain.datamodel import random_subsets
from benchmarks.quality.lds import POOL, Weights, digits, margins, mlp, pick, train

NAME, FORGET, CLASS = "MLP", 15, 8
TARGETS = 100  # held out
RATES, STEPS = (0.01, 0.03, 0.1), (1, 2, 5, 10, 20)
SHARE = 0.5  # of the pool in a datamodel's subset; at 0.9 a thousand trainings left the coefficients all but noise


def logits(weights: Weights, x: Tensor) -> Tensor:
    """(runs, samples, 10)."""
    skeleton = mlp()
    return vmap(lambda w: functional_call(skeleton, w, (x,)))(weights)


def tuned(weights: Weights, x: Tensor, y: Tensor, rate: float, steps: int, sign: float) -> Weights:
    """All runs by plain gradient steps on these samples: down, or up with sign −1."""
    skeleton = mlp()

    def loss(weights: Weights) -> Tensor:
        return sign * torch.nn.functional.cross_entropy(functional_call(skeleton, weights, (x,)), y)

    for _ in range(steps):
        slopes = vmap(grad(loss))(weights)
        weights = {name: w - rate * slopes[name] for name, w in weights.items()}
    return weights


def forget_sets(y: Tensor) -> dict[str, np.ndarray[Any, Any]]:
    own = np.flatnonzero(y.numpy() == CLASS)[:FORGET]
    return {"random": np.random.default_rng(0).permutation(len(y))[:FORGET], f"{FORGET} of the {CLASS}s": own}


def best_of_grid(judge: Callable[[Weights], float], tune: Callable[[float, int], Weights]) -> dict[str, Any]:
    tried = [(judge(tune(rate, steps)), rate, steps) for rate, steps in itertools.product(RATES, STEPS)]
    _, rate, steps = min(tried)
    return {"rate": rate, "steps": steps}


def one_set(
    world: dict[str, Any], removed: np.ndarray[Any, Any], runs: int, steps: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """KLOM by method and by part of the data, and the settings of the controls."""
    x, y, at, labels = (world[name] for name in ("x", "y", "at", "labels"))
    kept = np.setdiff1d(np.arange(POOL), removed)
    without = torch.tensor(kept).expand(2 * runs, -1)
    oracles = margins(NAME, train(mlp, x, y, without, seed=50), at, labels)
    parts = {"forgotten": removed, "kept": kept, "held out": np.arange(POOL, len(at))}

    def measured(weights: Weights) -> dict[str, float]:
        found = klom(margins(NAME, weights, at, labels), oracles[:runs])
        return {"mean": float(found.mean()), **{name: float(found[rows].mean()) for name, rows in parts.items()}}

    originals: Weights = world["originals"]
    ups = lambda rate, steps: tuned(originals, x[removed], y[removed], rate, steps, -1.0)  # noqa: E731
    downs = lambda rate, steps: tuned(originals, x[kept], y[kept], rate, steps, 1.0)  # noqa: E731
    settings = {
        "gradient ascent on what is to go": best_of_grid(lambda w: measured(w)["mean"], ups),
        "descent on what stays": best_of_grid(lambda w: measured(w)["mean"], downs),
    }
    # Matched on the pool alone: what is held out has no part in the tuning.
    models = [
        forget(pick(NAME, originals, k), x, world["effects"][:, :POOL], removed, steps=steps, seed=k)
        for k in range(runs)
    ]
    states = [dict(found.model.named_parameters()) for found in models]
    matched = {name: torch.stack([state[name].detach() for state in states]) for name in originals}
    found = {
        "nothing is done": measured(originals),
        "gradient ascent on what is to go": measured(ups(**settings["gradient ascent on what is to go"])),
        "descent on what stays": measured(downs(**settings["descent on what stays"])),
        "datamodel matching": measured(matched),
    }
    floor = klom(oracles[runs:], oracles[:runs])
    found["other models trained without"] = {
        "mean": float(floor.mean()),
        **{name: float(floor[rows].mean()) for name, rows in parts.items()},
    }
    settings["matching"] = {
        "before": float(np.mean([m.before for m in models])),
        "after": float(np.mean([m.after for m in models])),
    }
    return found, settings


def run(quick: bool) -> dict[str, Any]:
    runs, subsets, steps = (8, 40, 20) if quick else (100, 2000, 300)
    torch.manual_seed(0)
    data = digits(1)
    at, labels = torch.cat([data.x, data.other_x[:TARGETS]]), torch.cat([data.y, data.other_y[:TARGETS]])
    members = random_subsets(POOL, subsets, SHARE)
    rows = torch.tensor(np.stack([np.flatnonzero(row) for row in members]))
    outputs = torch.cat([logits(train(mlp, data.x, data.y, r, seed=10 + i), at) for i, r in enumerate(rows.split(500))])
    datamodel = SmallModelDatamodel.fit(members, outputs.flatten(1))
    world = {
        "x": data.x,
        "y": data.y,
        "at": at,
        "labels": labels,
        "effects": datamodel.scores.reshape(POOL, len(at), 10),
        "originals": train(mlp, data.x, data.y, torch.arange(POOL).expand(runs, -1), seed=40),
    }
    found = {name: one_set(world, removed, runs, steps) for name, removed in forget_sets(data.y).items()}
    return {
        "models": runs,
        "datamodel": {"trainings": subsets, "share": SHARE, "lds": float(np.nanmean(datamodel.lds))},
        "klom": {name: klom_by_method for name, (klom_by_method, _) in found.items()},
        "settings": {name: settings for name, (_, settings) in found.items()},
    }


def table(found: dict[str, Any]) -> Table:
    out = Table(title=f"KLOM to {found['models']} models trained without (lower is nearer)")
    for column in ("forgotten are", "method", "all", "forgotten", "kept", "held out"):
        out.add_column(column)
    for forgotten, methods in found["klom"].items():
        for method, values in methods.items():
            out.add_row(forgotten, method, *(f"{v:.2f}" for v in values.values()))
    return out
