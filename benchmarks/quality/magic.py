"""Do derivatives through training predict what removals do? ``python -m benchmarks.quality.magic [--quick]``.

A small network on digits. The truth is retraining with samples' weights set to 0 in the same batches from the same
start, by a loop that shares no code with MAGIC and trains them all as one tensor. LDS: for each query, Spearman's
correlation over seeded drops of 5 and 10 % of Σ_{i dropped} score_i with the rise of its loss, averaged over queries;
the interval is a bootstrap over drops × queries, the same resamples for every method. QLD: the rise of a query's loss
after the 1 % that a method ranks highest for it were dropped.

Controls: random numbers, each sample's own loss, gradient dot and cosine; of the end alone EK-FAC, its Shampoo basis
and the whole Gauss–Newton matrix by both of its solvers; of six checkpoints TracIn and SOURCE; MAGIC of another start
and order, which is what knowing the data but not the run is worth; a rate so large that metasmoothness says that no
derivative can tell.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import assay
from assay._json import dumps
from assay.methods import ASTRA, EKFAC, EKFACCG, SOURCE, AdamState, Influence, Kernel, TracIn
from assay.retrain import SGD, Adam, Magic, Training, magic
from assay.retrain.magic_training import running
from assay.tasks import Classification
from benchmarks.quality.lds import EXACT, interval, lds
from benchmarks.quality.leaderboard.truth import step
from benchmarks.timing import RESULTS, machine

Array = NDArray[np.float64]
BATCH, CHECKPOINTS = 50, 6


@dataclass(frozen=True)
class Setting:
    name: str
    activation: Callable[[], nn.Module]
    optimizer: str
    rate: float
    train: int = 1000
    queries: int = 50
    steps: int = 120
    drops: int = 40


SETTINGS = [
    Setting("GELU, AdamW .01", nn.GELU, "adamw", 0.01),
    Setting("tanh, SGD .1", nn.Tanh, "sgd", 0.1),
    Setting("tanh, AdamW .1 (rough)", nn.Tanh, "adamw", 0.1),
]
QUICK = replace(SETTINGS[0], train=150, queries=4, steps=30, drops=16)


@dataclass(frozen=True)
class World:
    x: Tensor
    y: Tensor
    queries: tuple[Tensor, Tensor]


def digits(setting: Setting) -> World:
    from sklearn.datasets import load_digits

    features, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(features))[: setting.train + setting.queries]
    x, y = torch.tensor(features[order] / 16, dtype=torch.float32), torch.tensor(labels[order])
    cut = setting.train
    return World(x[:cut], y[:cut], (x[cut:], y[cut:]))


def training(setting: Setting, world: World, seed: int) -> Training:
    """The run: its start and its order are the seed's."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, 32), setting.activation(), nn.Linear(32, 10))
    rng, batches = np.random.default_rng(seed), []
    while len(batches) < setting.steps:
        batches += list(rng.permutation(setting.train)[: setting.train // BATCH * BATCH].reshape(-1, BATCH))
    warm = setting.steps // 4
    rates = [
        setting.rate * (min((t + 1) / warm, 1.0) if t < warm else (setting.steps - t) / (setting.steps - warm))
        for t in range(setting.steps)
    ]
    if setting.optimizer == "sgd":
        optimizer: SGD | Adam = SGD(rates, momentum=0.9, weight_decay=1e-3)
    else:
        optimizer = Adam(rates, (0.9, 0.99), eps_root=1e-12, weight_decay=0.01, decoupled_weight_decay=True)
    return Training(model, losses, (world.x, world.y), batches[: setting.steps], optimizer)


def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return nn.functional.cross_entropy(model(x), y, reduction="none")


# ---- The truth


def retrained(run: Training, weights: Tensor, batches: Any = None) -> dict[str, Tensor]:
    """(R, N) weights -> the parameters of R trainings, stacked: all in one tensor, by a loop of its own."""
    x, y = run.data
    theta = {n: p.detach().expand(len(weights), *p.shape).clone() for n, p in run.model.named_parameters()}

    def loss(theta: dict[str, Tensor], w: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return (w * losses(lambda x: functional_call(run.model, theta, (x,)), (x, y))).sum() / len(y)  # type: ignore[arg-type]

    gradient = vmap(grad(loss), (0, 0, None, None))
    m, v = ({n: torch.zeros_like(p) for n, p in theta.items()} for _ in range(2))
    for t, rows in enumerate(run.rows if batches is None else batches):
        g = gradient(theta, weights[:, rows], x[rows], y[rows])
        theta, m, v = step(run.optimizer, theta, m, v, g, t, run.rates[t])
    return theta


def query_losses(run: Training, theta: Mapping[str, Tensor], queries: tuple[Tensor, Tensor]) -> Array:
    """(R, queries)."""
    x, y = queries
    logits = vmap(lambda theta: functional_call(run.model, theta, (x,)))(dict(theta))
    each = nn.functional.cross_entropy(logits.flatten(0, 1), y.repeat(len(logits)), reduction="none")
    found: Array = each.view(len(logits), -1).double().numpy()
    return found


def without(size: int, drops: Tensor) -> Tensor:
    """(R, n) rows to drop -> (R, size) weights."""
    return torch.ones(len(drops), size).scatter_(1, drops, 0.0)


def drawn(size: int, share: float, count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(size, generator=generator)[: round(share * size)] for _ in range(count)])


# ---- Scores: (N, queries)


def all_scores(setting: Setting, world: World, run: Training) -> tuple[dict[str, Array], Magic, dict[str, float]]:
    """By method; MAGIC's result; seconds."""
    names = [f"t{i}" for i in range(setting.queries)]
    x, y = world.queries
    targets = {name: [(x[i : i + 1], y[i : i + 1])] for i, name in enumerate(names)}
    seconds: dict[str, float] = {}

    def timed(label: str, make: Callable[[], Any]) -> Any:
        begun = time.perf_counter()
        found = make()
        seconds[label] = round(time.perf_counter() - begun, 2)
        return found

    own: Magic = timed("MAGIC", lambda: magic(run, targets))
    other = training(setting, world, 1)
    other_found: Magic = timed("MAGIC, other start and order", lambda: magic(other, targets, directions=0))
    models, states, rates = checkpoints(setting, run)
    model, task, adam = models[-1], Classification(), states or None

    batches = list(zip(world.x.split(100), world.y.split(100), strict=True))

    def of(label: str, method: Any) -> Array:
        pool = batches if isinstance(method, ASTRA) else [(world.x, world.y)]
        table = timed(label, lambda: assay.score(pool, [method.fit(pool)]))
        return np.stack([table[f"{method.name}_{name}"].to_numpy() for name in names], 1).astype(float)

    def dot(normalize: bool) -> Influence:
        return Influence([model], task, targets, kernel=Kernel(normalize=normalize), sketch=EXACT)

    methods = {
        "SOURCE": SOURCE(models, task, targets, rates, optimizers=adam),
        "SOURCE, EK-FAC's curvature": SOURCE(models, task, targets, rates, optimizers=adam, curvature="ekfac"),
        "EK-FAC + CG": EKFACCG(model, task, targets),
        "EK-FAC + CG, λ = 1/Ση": EKFACCG(model, task, targets, rate_sum=sum(rates)),
        "ASTRA, 200 steps of 100": ASTRA(model, task, targets),
        "EK-FAC": EKFAC(model, task, targets),
        "EK-FAC in Shampoo's basis": EKFAC(model, task, targets, basis="shampoo"),
        "TracIn": TracIn(models, task, targets, rates),
        "gradient dot": dot(False),
        "gradient cosine": dot(True),
    }
    found = {"MAGIC": own.scores.numpy(), "MAGIC, other start and order": other_found.scores.numpy()}
    found |= {label: of(label, method) for label, method in methods.items()}
    found["random"] = np.random.default_rng(0).standard_normal((setting.train, setting.queries))
    with torch.no_grad():
        loss = losses(model, (world.x, world.y)).double().numpy()
    found["sample's own loss"] = np.repeat(loss[:, None], setting.queries, 1)
    return found, own, seconds


def checkpoints(setting: Setting, run: Training) -> tuple[list[nn.Module], list[AdamState], list[float]]:
    """Six of a run, the last its end; Adam's states there; the rates of each one's steps over 1 − momentum."""
    ends = [run.steps * (k + 1) // CHECKPOINTS for k in range(CHECKPOINTS)]
    models, states, weights = [], [], run.weights(None)
    with running():
        state = run.initial()
        for step in range(run.steps):
            state = run.advance(state, step, weights)
            if step + 1 in ends:
                named = [{name: part.clone() for name, part in run.named(own).items()} for own in state]
                models.append(nn.Sequential(nn.Linear(64, 32), setting.activation(), nn.Linear(32, 10)))
                models[-1].load_state_dict(named[0])
                if isinstance(run.optimizer, Adam):
                    states.append(AdamState(*named[1:], run.optimizer.betas, run.optimizer.eps, step + 1))
    kept = run.optimizer.momentum if isinstance(run.optimizer, SGD) else 0.0
    begins = [0, *ends[:-1]]
    rates = [float(sum(run.rates[begin:end])) / (1 - kept) for begin, end in zip(begins, ends, strict=True)]
    return models, states, rates


def one(setting: Setting) -> dict[str, Any]:
    world = digits(setting)
    run = training(setting, world, 0)
    found, own, seconds = all_scores(setting, world, run)
    found = {label: np.nan_to_num(score) for label, score in found.items()}  # a sample in no batch changes nothing
    base = query_losses(run, retrained(run, torch.ones(1, setting.train)), world.queries)
    table: dict[str, dict[str, Any]] = {label: {} for label in found}
    for share in (0.05, 0.1):
        drops = drawn(setting.train, share, setting.drops, 1)
        rise = query_losses(run, retrained(run, without(setting.train, drops)), world.queries) - base
        draws: dict[str, Array] = {}
        for label, score in found.items():
            value, draws[label] = lds(score, drops, rise)
            table[label][f"lds_{share:g}"] = {"value": round(value, 4), "interval": interval(draws[label])}
        for label, own_draws in draws.items():
            for other, key in (("MAGIC", "magic_minus_this"), ("EK-FAC", "ek_fac_minus_this")):
                table[label][f"lds_{share:g}"][key] = interval(draws[other] - own_draws)
        guess = np.stack([found["MAGIC"][rows].sum(0) for rows in drops.numpy()])
        table["MAGIC"][f"lds_{share:g}"]["slope_of_truth"] = round(float((guess * rise).sum() / (guess**2).sum()), 3)
    for label, score in found.items():
        top = torch.from_numpy(np.argsort(-score, 0, kind="stable")[: max(1, setting.train // 100)].T.copy())
        after = query_losses(run, retrained(run, without(setting.train, top)), world.queries)
        rises = after.diagonal() - base[0]
        means = np.random.default_rng(0).choice(rises, (1000, len(rises))).mean(1)
        table[label]["qld"] = {"value": round(float(rises.mean()), 4), "interval": interval(means)}
    return {
        **{k: getattr(setting, k) for k in ("name", "rate", "train", "queries", "steps", "drops")},
        "metasmoothness": [round(v, 4) for v in own.metasmoothness.tolist()],
        "query_loss": round(float(base.mean()), 4),
        "loop_against_magics": float(np.abs(own.losses.numpy() - base[0]).max()),
        "plan": str(replace(own.plan, seconds=None)),
        "predicted_seconds": round(own.plan.seconds or 0, 2),
        "seconds": seconds,
        "methods": table,
    }


def show(console: Console, case: Mapping[str, Any]) -> None:
    title = f"{case['name']}: metasmoothness {case['metasmoothness']}, query loss {case['query_loss']}"
    table = Table(title=title)
    for column in ("method", "LDS, 5 % dropped", "LDS, 10 % dropped", "QLD, top 1 %"):
        table.add_column(column)
    for label, row in case["methods"].items():
        cells = [row[key] for key in ("lds_0.05", "lds_0.1", "qld")]
        table.add_row(label, *(f"{c['value']:.3f} [{c['interval'][0]:.2f}, {c['interval'][1]:.2f}]" for c in cells))
    console.print(table)


def main() -> None:
    quick = "--quick" in sys.argv[1:]
    begun, cases = time.perf_counter(), []
    for setting in [QUICK] if quick else SETTINGS:
        cases.append(one(setting))
        show(Console(width=120), cases[-1])
    if not quick:
        result = {"machine": machine(), "seconds": round(time.perf_counter() - begun, 1), "cases": cases}
        (RESULTS / "quality-magic.json").write_text(dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
