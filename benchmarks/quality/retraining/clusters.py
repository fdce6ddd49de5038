"""Reverse gradient matching on digits: do runs on synthetic samples rank clusters as retraining without them does?

Three clusters in each class of 600 digits; an MLP trained by gradient descent; the truth is thirty more trainings, each
without a cluster, judged by the losses of 300 held-out digits. Controls: the clusters' means in place of the matched
samples, which need no run; the size of the cluster; the clusters' real gradients summed along the run (TracIn, over
every state); random numbers. Starting points of the short runs: the run's start, as many steps as the run; and its end,
a brief tuning.
"""

from __future__ import annotations

import copy
import statistics
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call, grad

from assay.retrain import cluster_effects, clusters_by_class, distil

POOL, TARGETS, PER_CLASS, STEPS, RATE, STATES = 600, 300, 3, 150, 0.5, 6
Array = NDArray[np.float64]
State = dict[str, Tensor]


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))


def descended(start: nn.Module, x: Tensor, y: Tensor) -> list[State]:
    """The states of a run, its start first."""
    model, states = copy.deepcopy(start), []
    for _ in range(STEPS + 1):
        states.append({name: p.detach().clone() for name, p in model.named_parameters()})
        slopes = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), list(model.parameters()))
        for p, slope in zip(model.parameters(), slopes, strict=True):
            p.data -= RATE * slope
    return states


def losses(model: nn.Module, state: State, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(functional_call(model, state, (x,)), y, reduction="none")


def traced(model: nn.Module, states: list[State], x: Tensor, y: Tensor, clusters: Any, target: Any) -> Array:
    """(K, 1): Σ_t (n_k/N) ⟨∇L_k, ∇L_target⟩, on the mean of the targets."""
    slope = grad(lambda state, x, y: losses(model, state, x, y).mean())
    total = np.zeros(int(clusters.max()) + 1)
    for state in states:
        wanted = slope(state, *target)
        for k in range(len(total)):
            rows = torch.tensor(np.flatnonzero(clusters == k))
            own = slope(state, x[rows], y[rows])
            total[k] += len(rows) / len(x) * sum(float((own[n] * wanted[n]).sum()) for n in own)
    return total[:, None]


def agreement(effects: Array, truth: Array) -> dict[str, float]:
    """Spearman over clusters: of the mean loss of all targets, and of each target's own, averaged."""
    whole = float(spearmanr(effects.mean(1), truth.mean(1)).statistic)
    columns = np.broadcast_to(effects, truth.shape)
    each = [spearmanr(a, b).statistic for a, b in zip(columns.T, truth.T, strict=True)]
    return {"all targets": whole, "each target": float(np.nanmean(each))}


def one(seed: int) -> dict[str, Any]:
    pixels, digits = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(pixels))
    x, y = torch.tensor(pixels[order] / 16, dtype=torch.float32), torch.tensor(digits[order])
    pool, target = (x[:POOL], y[:POOL]), (x[POOL : POOL + TARGETS], y[POOL : POOL + TARGETS])
    model = network(seed)
    clusters = clusters_by_class(pool[0], pool[1], PER_CLASS, seed)
    states = descended(model, *pool)
    some = states[:: STEPS // (STATES - 1)]
    matched = distil(model, some, *pool, clusters)
    means = torch.stack([pool[0][clusters == k].mean(0) for k in range(len(matched.labels))])
    plain = replace(matched, inputs=means)

    def ends(kept: NDArray[np.bool_]) -> Tensor:
        rows = torch.tensor(np.flatnonzero(kept))
        return losses(model, descended(model, pool[0][rows], pool[1][rows])[-1], *target)

    whole = losses(model, states[-1], *target)
    truth = torch.stack([ends(clusters != k) - whole for k in range(len(matched.labels))]).double().detach().numpy()

    def effects(samples: Any, start: State, steps: int) -> Array:
        return cluster_effects(model, start, samples, target, steps=steps, learning_rate=RATE)

    found = {
        "matched, from the start": effects(matched, states[0], STEPS),
        "matched, tuned from the end": effects(matched, states[-1], STEPS // 10),
        "clusters' means, from the start (control)": effects(plain, states[0], STEPS),
        "clusters' means, tuned from the end (control)": effects(plain, states[-1], STEPS // 10),
        "real gradients along the run (control)": traced(model, some, *pool, clusters, target),
        "size of the cluster (control)": matched.sizes.double().numpy()[:, None],
        "random": np.random.default_rng(seed).normal(size=(len(truth), 1)),
    }
    return {
        "mismatch": [matched.before, matched.after],
        "spearman": {name: agreement(own, truth) for name, own in found.items()},
    }


def run(quick: bool) -> dict[str, Any]:
    return {"seeds": [one(seed) for seed in range(1 if quick else 5)]}


def table(found: dict[str, Any]) -> Table:
    runs = found["seeds"]
    out = Table(
        title=f"Spearman with retraining without each of {10 * PER_CLASS} clusters, {len(runs)} seeds (least, most)"
    )
    for column in ("effects by", "on all targets", "on each target"):
        out.add_column(column)
    for name in runs[0]["spearman"]:
        cells = []
        for key in ("all targets", "each target"):
            values = [run["spearman"][name][key] for run in runs]
            cells.append(f"{statistics.fmean(values):.3f} ({min(values):.3f}, {max(values):.3f})")
        out.add_row(name, *cells)
    return out
