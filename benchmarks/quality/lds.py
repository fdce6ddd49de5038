"""Do the scores predict what retraining does? ``python -m benchmarks.quality.lds``.

The linear datamodeling score: models are retrained on random halves S_j of the pool; for each held-out target, the
Spearman correlation over j of Σ_{i∈S_j} score_i(target) with the retrained margin, averaged over targets. The interval
is a bootstrap over subsets × targets. Settings are defaults of the library or the peer; k = 64 and TRAK's damping were
chosen on another split of digits (seed 0).

The peers (traker, dattri) are measured where they are installed, on the same checkpoints at the same k; the table
names those that are not.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.stats import rankdata
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

import assay
from assay.methods import (
    EKFAC,
    LESS,
    TRAK,
    AdamState,
    DsDm,
    Influence,
    InfluenceDistillation,
    Kernel,
    LoGra,
    TrackStar,
)
from assay.retrain import SmallModelDatamodel
from assay.tasks import Classification
from benchmarks.timing import RESULTS, write

Array = NDArray[np.float64]
POOL, TARGETS = 300, 50
SPLIT = 1  # its targets had no part in any choice
L2 = 0.01
SIDE = 8  # every sketch is SIDE × SIDE, k = 64: well below the pool, or the second moment overfits
EXACT = assay.Kronecker(256, 256)  # larger than any layer here: nothing is projected
LANDMARKS = 100  # of influence distillation: a third of the pool
RETRAININGS = 256
RESAMPLES = 200


@dataclass(frozen=True)
class Data:
    x: Tensor
    y: Tensor
    target_x: Tensor
    target_y: Tensor
    other_x: Tensor  # neither: trains the reference of the control
    other_y: Tensor


def digits(seed: int) -> Data:
    from sklearn.datasets import load_digits

    features, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(features))
    x, y = torch.tensor(features[order] / 16, dtype=torch.float32), torch.tensor(labels[order])
    cut = [POOL, TARGETS, len(x) - POOL - TARGETS]
    (px, tx, ox), (py, ty, oy) = x.split(cut), y.split(cut)
    return Data(px, py, tx, ty, ox, oy)


# ---- Models, and many of them trained at once


def logistic() -> nn.Module:
    return nn.Linear(64, 10)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


MODELS: dict[str, Callable[[], nn.Module]] = {"logistic regression": logistic, "MLP": mlp, "CNN": cnn}
Weights = dict[str, Tensor]  # every parameter with a leading dimension: the run


def seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def train(
    make: Callable[[], nn.Module], x: Tensor, y: Tensor, rows: Tensor, seed: int, epochs: int = 40, lr: float = 0.1
) -> Weights:
    """SGD with momentum on ``rows`` (runs, samples) of the pool, all runs in one vmap; every run has its own start."""
    runs, samples = rows.shape
    weights, _ = stack_module_state([seeded(make, 1000 * seed + r) for r in range(runs)])
    weights = {name: w.detach() for name, w in weights.items()}
    skeleton = make()

    def loss(weights: Weights, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(functional_call(skeleton, weights, (x,)), y)

    gradient = vmap(grad(loss))
    generator = torch.Generator().manual_seed(seed)
    momentum = {name: torch.zeros_like(w) for name, w in weights.items()}
    steps = epochs * (samples // 50)
    for step in range(steps):
        if step % (samples // 50) == 0:
            order = rows.gather(1, torch.rand(runs, samples, generator=generator).argsort(1))
        batch = order[:, 50 * (step % (samples // 50)) :][:, :50]
        rate = lr * (1 - step / steps)
        for name, g in gradient(weights, x[batch], y[batch]).items():
            momentum[name].mul_(0.9).add_(g).add_(weights[name], alpha=1e-3)
            weights[name] = weights[name] - rate * momentum[name]
    return weights


def augmented(x: Tensor) -> Tensor:
    return torch.cat([x.double(), torch.ones(len(x), 1, dtype=torch.float64)], 1)


def hessian(w: Tensor, x: Tensor) -> Tensor:
    """Of mean loss + L2/2 ‖W‖², W (10, 65)."""
    p = (x @ w.T).softmax(1)
    inner = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    whole = torch.einsum("ncd,ni,nj->cidj", inner, x, x) / len(x)
    return whole.reshape(w.numel(), -1) + L2 * torch.eye(w.numel(), dtype=torch.float64)


def newton(x: Tensor, y: Tensor) -> Tensor:
    """The minimum of mean loss + L2/2 ‖W‖² in float64, the bias as a last column."""
    x, w = augmented(x), torch.zeros(10, 65, dtype=torch.float64)
    for _ in range(30):
        g = ((x @ w.T).softmax(1) - nn.functional.one_hot(y, 10)).T @ x / len(x) + L2 * w
        if float(g.abs().max()) < 1e-10:
            return w
        w = w - torch.linalg.solve(hessian(w, x), g.flatten()).reshape(w.shape)
    raise RuntimeError("the logistic regression did not converge in 30 Newton steps")


def fit(name: str, x: Tensor, y: Tensor, rows: Tensor, seed: int) -> Weights:
    if name != "logistic regression":
        return train(MODELS[name], x, y, rows, seed)
    w = torch.stack([newton(x[r], y[r]) for r in rows])
    return {"weight": w[:, :, :-1].float(), "bias": w[:, :, -1].float()}


def pick(name: str, weights: Weights, run: int) -> nn.Module:
    model = MODELS[name]()
    model.load_state_dict({n: w[run] for n, w in weights.items()})
    return model.eval()


def margins(name: str, weights: Weights, x: Tensor, y: Tensor) -> Array:
    """log(p / (1 − p)) of the labels -> (runs, samples)."""
    skeleton = MODELS[name]()
    logits = vmap(lambda w: functional_call(skeleton, w, (x,)))(weights).double()
    own = nn.functional.one_hot(y, 10).bool().expand_as(logits)
    rest = logits.masked_fill(own, -torch.inf).logsumexp(2)
    result: Array = (logits[own].view(rest.shape) - rest).numpy()
    return result


# ---- Scores: (pool, targets)


def scores(method: Any, data: Data, names: Sequence[str]) -> Array:
    pool = [(data.x, data.y)]
    table = assay.score(pool, [method.fit(pool)])
    return np.stack([table[f"{method.name}_{t}"].to_numpy() for t in names], 1).astype(float)


def exact_influence(data: Data) -> Array:
    """−∇ℓ_iᵀ H⁻¹ ∇f_t at the minimum, H the whole Hessian with its L2 term."""
    w = newton(data.x, data.y)
    x, tx = augmented(data.x), augmented(data.target_x)
    residual = (x @ w.T).softmax(1) - nn.functional.one_hot(data.y, 10)
    one = nn.functional.one_hot(data.target_y, 10)
    rest = (tx @ w.T).masked_fill(one.bool(), -torch.inf).softmax(1)
    pool = (residual[:, :, None] * x[:, None]).flatten(1)
    targets = ((one - rest)[:, :, None] * tx[:, None]).flatten(1)
    result: Array = (-pool @ torch.linalg.solve(hessian(w, x), targets.T)).numpy()
    return result


def warm_up(make: Callable[[], nn.Module], data: Data) -> tuple[list[nn.Module], list[AdamState]]:
    """LESS's checkpoints: four epochs of Adam over the pool, weights and moments after each."""
    model, models, states = seeded(make, 5), [], []
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(5)
    for _ in range(4):
        for rows in torch.randperm(POOL, generator=generator).split(10):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(data.x[rows]), data.y[rows]).backward()
            optimizer.step()
        copy = make()
        copy.load_state_dict(model.state_dict())
        state = AdamState.of(optimizer, model)
        moments = [{n: m.clone() for n, m in moment.items()} for moment in (state.first, state.second)]
        models.append(copy)
        states.append(AdamState(*moments, betas=state.betas, eps=state.eps))
    return models, states


def ours(name: str, data: Data, whole: nn.Module, halves: list[nn.Module]) -> dict[str, Array]:
    make, task, k = MODELS[name], Classification(), assay.Kronecker(SIDE, SIDE)
    names = [f"t{t}" for t in range(TARGETS)]
    targets = {t: [(data.target_x[i : i + 1], data.target_y[i : i + 1])] for i, t in enumerate(names)}

    def of(method: Any) -> Array:
        return scores(method, data, names)

    found = {"exact influence": exact_influence(data)} if name == "logistic regression" else {}
    found["gradient dot"] = of(Influence([whole], task, targets, kernel=Kernel(), sketch=EXACT))
    found["gradient cosine"] = of(Influence([whole], task, targets, kernel=Kernel(normalize=True), sketch=EXACT))
    for count in (1, 5, 10):
        found[f"TRAK, K = {count}"] = of(TRAK(halves[:count], task, targets, sketch=k))
        # as the peers project: dense, over the whole gradient
        dense = TRAK(halves[:count], task, targets, sketch=assay.Rademacher(k.dim))
        found[f"TRAK (Rademacher), K = {count}"] = of(dense)
    models, states = warm_up(make, data)
    found["LESS"] = of(LESS(models, task, targets, optimizers=states))
    found["LoGra"] = of(LoGra([whole], task, targets))
    grass = assay.Mask(32, 32, then=assay.Sparse(256))
    found["GraSS (LoGra with a mask)"] = of(LoGra([whole], task, targets, sketch=grass))
    found["TrackStar"] = of(TrackStar([whole], task, targets))
    found["EK-FAC"] = of(EKFAC(whole, task, targets))
    found["EK-FAC, K = 10"] = np.mean([of(EKFAC(m, task, targets)) for m in halves], 0)
    found["influence distillation"] = of(InfluenceDistillation(whole, task, targets, landmarks=LANDMARKS, sketch=EXACT))
    found[f"datamodel of {RETRAININGS} retrainings"] = datamodel(name, data)
    rng = np.random.default_rng(0)
    found["random"] = rng.standard_normal((POOL, TARGETS))
    everything = torch.arange(len(data.other_x))[None]
    reference = pick(name, fit(name, data.other_x, data.other_y, everything, 7), 0)
    with torch.no_grad():
        losses = nn.functional.cross_entropy(reference(data.x), data.y, reduction="none").double().numpy()
    found["reference loss (control)"] = np.repeat(-losses[:, None], TARGETS, 1)
    return found


def datamodel(name: str, data: Data) -> Array:
    """Fitted to retrainings on other halves than those that it is judged by."""
    rows = halves_of(POOL, RETRAININGS, 6)
    members = np.zeros((RETRAININGS, POOL), bool)
    np.put_along_axis(members, rows.numpy(), True, axis=1)
    outputs = margins(name, fit(name, data.x, data.y, rows, 500), data.target_x, data.target_y)
    return SmallModelDatamodel.fit(members, outputs).scores


def dsdm(data: Data, halves: list[nn.Module]) -> Array:
    """One column per class of targets."""
    of_class = {f"c{c}": [(data.target_x[data.target_y == c], data.target_y[data.target_y == c])] for c in range(10)}
    return scores(
        DsDm(halves, Classification(), of_class, sketch=assay.Kronecker(SIDE, SIDE), name="d"), data, list(of_class)
    )


# ---- Peers


def traker(data: Data, halves: list[nn.Module]) -> Array:
    from trak import TRAKer

    with tempfile.TemporaryDirectory() as folder:

        def peer() -> Any:
            return TRAKer(
                model=copy.deepcopy(halves[0]),  # it loads every checkpoint into it
                task="image_classification",
                train_set_size=POOL,
                save_dir=folder,
                device="cpu",
                proj_dim=SIDE * SIDE,
                use_half_precision=False,
            )

        train = peer()
        for i, model in enumerate(halves):
            train.load_checkpoint(model.state_dict(), model_id=i)
            train.featurize(batch=[data.x, data.y], num_samples=POOL)
        train.finalize_features()
        judge = peer()  # 0.3.2 drops the CPU projection after finalize_features and only makes it anew for another id
        for i, model in enumerate(halves):
            judge.start_scoring_checkpoint("lds", model.state_dict(), model_id=i, num_targets=TARGETS)
            judge.score(batch=[data.target_x, data.target_y], num_samples=TARGETS)
        return np.array(judge.finalize_scores("lds"), dtype=float)


def dattri(data: Data, halves: list[nn.Module]) -> Array:
    from dattri.algorithm.trak import TRAKAttributor
    from dattri.task import AttributionTask
    from torch.utils.data import DataLoader, TensorDataset

    model = copy.deepcopy(halves[0])  # every checkpoint is loaded into it

    def log_p(weights: Any, pair: tuple[Tensor, Tensor]) -> Tensor:
        x, y = pair
        return -nn.functional.cross_entropy(functional_call(model, weights, (x[None],)), y[None])

    def margin(weights: Any, pair: tuple[Tensor, Tensor]) -> Tensor:
        own = log_p(weights, pair)
        return own - torch.log(-torch.expm1(own))

    task = AttributionTask(loss_func=margin, model=model, checkpoints=[copy.deepcopy(m.state_dict()) for m in halves])
    peer = TRAKAttributor(
        task=task,
        correct_probability_func=lambda weights, pair: log_p(weights, pair).exp(),
        projector_kwargs={"proj_dim": SIDE * SIDE, "device": "cpu"},
    )
    peer.cache(DataLoader(TensorDataset(data.x, data.y), batch_size=50))
    with torch.no_grad():
        found = peer.attribute(DataLoader(TensorDataset(data.target_x, data.target_y), batch_size=50))
    return found.detach().double().numpy()


def peers(data: Data, halves: list[nn.Module]) -> tuple[dict[str, Array], dict[str, str]]:
    """Scores, and why a peer has none."""
    found, missing = {}, {}
    for name, run in {"traker TRAK": traker, "dattri TRAK": dattri}.items():
        for count in (1, 5, 10):
            label = f"{name}, K = {count}"
            try:
                with open(os.devnull, "w") as sink, contextlib.redirect_stderr(sink):
                    found[label] = run(data, halves[:count])
            except Exception as error:  # whatever a peer raises is its row of the table
                missing[label] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:150]
    return found, missing


# ---- The measure


def predicted(score: Array, subsets: Tensor) -> Array:
    """Σ_{i∈S_j} score_i -> (subsets, targets)."""
    return np.stack([score[rows].sum(0) for rows in subsets.numpy()])


def spearman(a: Array, b: Array) -> Array:
    """Column by column."""
    a, b = rankdata(a, axis=0), rankdata(b, axis=0)
    a, b = a - a.mean(0), b - b.mean(0)
    norms = np.sqrt((a * a).sum(0) * (b * b).sum(0))
    return np.divide((a * b).sum(0), norms, out=np.zeros_like(norms), where=norms > 0)


def lds(score: Array, subsets: Tensor, truth: Array, resamples: int = RESAMPLES) -> tuple[float, Array]:
    """The score, and its bootstrap; the resamples are the same for every method, so that differences are paired."""
    guess, rng = predicted(score, subsets), np.random.default_rng(0)
    each = spearman(guess, truth)
    draws = []
    for _ in range(resamples):
        rows, columns = rng.integers(len(guess), size=len(guess)), rng.integers(len(each), size=len(each))
        draws.append(spearman(guess[rows], truth[rows])[columns].mean())
    return float(each.mean()), np.array(draws)


def halves_of(size: int, count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(size, generator=generator)[: size // 2] for _ in range(count)])


def truth_of(name: str, data: Data, subsets: Tensor, seeds: int) -> Array:
    """Margins of models retrained on each subset, the mean over seeds. A converged convex model has no seed."""
    seeds = 1 if name == "logistic regression" else seeds
    runs = [
        margins(name, fit(name, data.x, data.y, subsets, 100 + s), data.target_x, data.target_y) for s in range(seeds)
    ]
    return np.mean(runs, 0)


def one(name: str, subsets: int = 64, seeds: int = 5, with_peers: bool = True) -> dict[str, Any]:
    data, start = digits(SPLIT), time.perf_counter()
    rows = halves_of(POOL, subsets, 1)
    truth = truth_of(name, data, rows, seeds)
    trained = time.perf_counter() - start
    whole = pick(name, fit(name, data.x, data.y, torch.arange(POOL)[None], 3), 0)
    checkpoints = fit(name, data.x, data.y, halves_of(POOL, 10, 2), 4)  # other halves than the subsets
    halves = [pick(name, checkpoints, i) for i in range(10)]
    found = ours(name, data, whole, halves)
    others, missing = peers(data, halves) if with_peers else ({}, {})
    measured = {label: lds(score, rows, truth) for label, score in (found | others).items()}
    by_class = np.stack([truth[:, (data.target_y == c).numpy()].mean(1) for c in range(10)], 1)
    measured["DsDm, K = 10 (tasks: the classes)"] = lds(dsdm(data, halves), rows, by_class)
    table = {label: {"lds": value, "interval": interval(draws)} for label, (value, draws) in measured.items()}
    for label in others:
        count = label.partition("TRAK")[2]
        table[label]["assay_minus_peer"] = {
            mine: interval(measured[mine][1] - measured[label][1])
            for mine in (f"TRAK{count}", f"TRAK (Rademacher){count}")
        }
    return {
        "model": name,
        "subsets": subsets,
        "seeds": seeds,
        "k": SIDE * SIDE,
        "accuracy_share_of_targets": float((margins(name, checkpoints, data.target_x, data.target_y) > 0).mean()),
        "retraining_seconds": round(trained, 1),
        "lds": table,
        "not_measured": missing,
    }


def interval(draws: Array) -> list[float]:
    return [round(float(q), 4) for q in np.quantile(draws, (0.025, 0.975))]


# ---- Report


def figure(cases: list[dict[str, Any]], stem: str) -> None:
    import matplotlib.pyplot as plt

    panels, axes = plt.subplots(1, len(cases), figsize=(5 * len(cases), 6), sharex=True, squeeze=False)
    for axis, case in zip(axes[0], cases, strict=True):
        ranked = sorted(case["lds"].items(), key=lambda item: item[1]["lds"])
        for y, (label, row) in enumerate(ranked):
            colour = "tab:gray" if label.startswith(("traker", "dattri", "random", "reference")) else "tab:blue"
            axis.plot(row["interval"], [y, y], color=colour)
            axis.plot(row["lds"], y, "o", color=colour)
        axis.set_yticks(range(len(ranked)), [label for label, _ in ranked], fontsize=7)
        axis.axvline(0, color="black", linewidth=0.5)
        axis.set(title=case["model"], xlabel="LDS, 95 % interval")
    panels.tight_layout()
    panels.savefig(RESULTS / f"{stem}.png", dpi=110)


def show(cases: list[dict[str, Any]]) -> None:
    table = Table(
        title=f"LDS on digits, {POOL} in the pool, {TARGETS} targets, 95 % intervals; TRAK's k is {SIDE * SIDE}"
    )
    table.add_column("method")
    for case in cases:
        table.add_column(case["model"], justify="right")
    for label in dict.fromkeys(label for case in cases for label in (*case["lds"], *case["not_measured"])):
        cells = []
        for case in cases:
            row = case["lds"].get(label)
            cells.append(
                f"{row['lds']:.3f} [{row['interval'][0]:.2f}, {row['interval'][1]:.2f}]"
                if row
                else case["not_measured"].get(label, "")
            )
        table.add_row(label, *cells)
    Console(width=130).print(table)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    arguments.add_argument("--subsets", type=int, default=64)
    arguments.add_argument("--seeds", type=int, default=5)
    arguments.add_argument("--model", choices=list(MODELS), action="append")
    given = arguments.parse_args()
    cases = [one(name, given.subsets, given.seeds) for name in given.model or MODELS]
    show(cases)
    path = write("lds", cases)
    figure(cases, path.stem)
    print("written to", path.name)


if __name__ == "__main__":
    main()
