"""What do scores of embeddings find, and what is it worth? ``python -m benchmarks.quality.embeddings [--quick]``.

scikit-learn's digits, whose embedding is their standardised pixels or the states of a small network that was trained
on the 297 digits outside the pool. Three seeds; each draws everything anew.

- similarity: threes in a pool of 1,500 digits, a target of 22 others; beside a logistic regression on as much, the
  pixels' sum, and a random order.
- density: 1,300 digits with 1,300 near copies of zeros. The hashes' error against all pairs; the zeros' share of a half
  that is drawn, how many digits it has, and what a regression on 130 that are drawn is worth; beside the exact kernel,
  the sign that the paper's algorithm prints, and random rows.
- leverage: digits whose pixels are shuffled, beside the distance from the mean, the length and a random order; and what
  a regression on a tenth of clean digits is worth, beside random ones.
- knn_shapley: wrong labels, beside the share of the nearest 10 of another class and a random order; clean targets, and
  such as are as often wrong.
- clip_powered: wrong labels by SAS and SDS, and what a regression on 30 % is worth, beside random ones; of standardised
  pixels and of pixels as they are. The mean of five clean digits of a class stands for its text (``clip_powered.py``
  has a CLIP).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn.functional import pairwise_distance

import assay
from assay import select
from assay.methods import Density, EmbeddingSimilarity, Leverage
from assay.methods import knn_shapley as shapley
from assay.tasks import Classification
from benchmarks import options
from benchmarks.quality.online.classification import mislabelled
from benchmarks.quality.worth import (
    Numbers,
    Rows,
    accuracy,
    auroc,
    cosines,
    digits,
    experiment,
    found,
    of_draws,
    scored,
)

Scores = npt.NDArray[Any]
POOL = 1500


def pixels_alone() -> nn.Module:
    """Its embedding, the input of its last layer, is the digit itself."""
    return nn.Linear(64, 10)


def network(x: Tensor, y: Tensor, seed: int) -> nn.Sequential:
    """Of tanh: states of ReLUs may all be 0, which is no direction."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net


def similarity(seed: int) -> Numbers:
    x, y = digits(seed)
    rng, pool, task = np.random.default_rng(seed), x[:POOL], Classification()
    three, rest = (y == 3)[:POOL], torch.nonzero(y[POOL:] == 3)[:22, 0] + POOL
    targets, random = {"threes": [(x[rest], y[rest])]}, rng.random(POOL)
    some = pool[torch.from_numpy(rng.choice(POOL, 110, replace=False))]
    guess = LogisticRegression(class_weight="balanced").fit(torch.cat([x[rest], some]).numpy(), [1] * 22 + [0] * 110)
    scores: dict[str, Any] = {}
    for name, embedder in (("pixels", pixels_alone()), ("states", network(x[POOL:], y[POOL:], seed))):
        for within in ("mean", "max"):
            method = EmbeddingSimilarity(embedder, task, targets, within=within).fit()  # type: ignore[arg-type]
            scores[f"{name}, {within}"] = scored(method, [(pool, y[:POOL])])
    scores["logistic regression on pixels (control)"] = guess.decision_function(pool.numpy())
    scores |= {"sum of the pixels (control)": pool.sum(1).numpy(), "random (control)": random}
    return {name: found(three, own, 0.1) for name, own in scores.items()}


def density(seed: int) -> Numbers:
    x, y = digits(seed)
    test, generator = (x[1300:], y[1300:]), torch.Generator().manual_seed(seed)
    zeros = torch.nonzero(y[:1300] == 0)[:, 0]
    which = torch.cat([torch.arange(1300), zeros[torch.randint(len(zeros), (1300,), generator=generator)]])
    x, y = x[which], y[which]
    x[1300:] += 0.02 * torch.randn(1300, 64, generator=generator)
    numbers, exact = dict[str, Mapping[str, float]](), np.empty(0)
    for repetitions in (50, 200, 1000):
        method = Density(pixels_alone(), Classification(), repetitions=repetitions, seed=seed).fit([(x, y)])
        hashed = scored(method, [(x, y)])
        exact = exact if len(exact) else kernel(x, float(method.metadata()["cell"]))
        agreement = float(np.corrcoef(hashed, exact)[0, 1])
        numbers[f"R = {repetitions}"] = {"error": float(np.abs(hashed / exact - 1).mean()), "correlation": agreement}
    ways = {
        "1/density": 1 / hashed,
        "1/density, of all pairs (control)": 1 / exact,
        "density, as printed (control)": hashed,
        "random (control)": np.ones(len(x)),
    }

    def drawn(weights: Scores, amount: float) -> Callable[[int], Rows]:
        table = pa.table({"w": weights})
        return lambda own: select.sample(table, "w", amount, own, keep="high").mask

    def half(rows: Rows) -> dict[str, float]:
        return {"zeros": float((y == 0).numpy()[rows].mean()), "digits": len(which[rows].unique())}

    for name, weights in ways.items():
        worth = of_draws(drawn(weights, 130), lambda rows: {"worth of 130": accuracy((x, y), rows, test)}, seed)
        numbers[name] = of_draws(drawn(weights, 0.5), half, seed) | worth
    return numbers


def kernel(x: Tensor, width: float) -> Scores:
    """Each row's mean kernel with all, itself too, by the closed form that ``KernelSums`` gives, of all pairs."""
    own = nn.functional.normalize(x.double())
    u = width / torch.cdist(own, own, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(0)
    both = torch.special.erf(u / math.sqrt(2)) - math.sqrt(2 / math.pi) / u * -torch.expm1(-u.square() / 2)
    mean: Scores = both.square().mean(1).numpy()
    return mean


def leverage(seed: int) -> Numbers:
    x, y = digits(seed)
    rng, pool, test, task = np.random.default_rng(seed), x[:1300], (x[1300:], y[1300:]), Classification()
    odd, mixed = rng.random(1300) < 0.05, pool.clone()
    for row in np.flatnonzero(odd):
        mixed[row] = pool[row][torch.from_numpy(rng.permutation(64))]
    method = Leverage(pixels_alone(), task).fit([(mixed, y[:1300])])
    orders: dict[str, Any] = {
        "leverage": scored(method, [(mixed, y[:1300])]),
        "distance from the mean (control)": pairwise_distance(mixed, mixed.mean(0, keepdim=True)),
        "length (control)": mixed.norm(dim=1),
        "random (control)": rng.random(1300),
    }
    numbers: dict[str, Mapping[str, float]] = {name: {"AUROC": auroc(odd, own)} for name, own in orders.items()}
    table = assay.score([(pool, y[:1300])], [Leverage(pixels_alone(), task).fit([(pool, y[:1300])])])

    def worth(rows: Rows) -> dict[str, float]:
        return {"worth of a tenth": accuracy((pool, y[:1300]), rows, test)}

    numbers |= {
        "drawn by leverage": of_draws(
            lambda own: select.sample(table, "leverage", 0.1, own, keep="high").mask, worth, seed
        ),
        "drawn at random (control)": of_draws(lambda own: select.random(table, 0.1, own).mask, worth, seed),
        "the highest": worth(select.top(table, "leverage", 0.1, "high").mask),
        "the lowest": worth(select.top(table, "leverage", 0.1, "low").mask),
    }
    return numbers


def knn_shapley(seed: int) -> Numbers:
    x, y = digits(seed)
    torch.manual_seed(seed)
    pool, targets, numbers = x[:1200], x[1200:1500], dict[str, Mapping[str, float]]()
    for noise in (0.1, 0.2, 0.4):
        given, wrong = mislabelled(y[:1200], 10, noise)
        unsure, _ = mislabelled(y[1200:1500], 10, noise)
        nearest = cosines(pool, pool).fill_diagonal_(-1).topk(10).indices
        others = (given[nearest] != given[:, None]).float().mean(1)
        clean = shapley([(pool, given)], targets, y[1200:1500], 5)
        numbers[f"{noise:.0%} wrong"] = {
            "KNN-Shapley": auroc(wrong, -clean),
            "of targets as often wrong": auroc(wrong, -shapley([(pool, given)], targets, unsure, 5)),
            "neighbours (control)": auroc(wrong, others),
            "random (control)": auroc(wrong, torch.rand(1200)),
            "negative of the wrong": float((clean[wrong] < 0).float().mean()),
            "negative of the right": float((clean[~wrong] < 0).float().mean()),
        }
    return numbers


def clip_powered(seed: int) -> Numbers:
    numbers: dict[str, Mapping[str, float]] = {}
    for kind, standardised in (("standardised", True), ("as they are", False)):
        x, y = digits(seed, standardised=standardised)
        torch.manual_seed(seed)
        pool, held, test = x[:1300], (x[1300:1400], y[1300:1400]), (x[1400:], y[1400:])
        given, wrong = mislabelled(y[:1300], 10, 0.2)
        texts = torch.stack([held[0][held[1] == c][:5].mean(0) for c in range(10)])
        own = torch.stack([pool[given == c].mean(0) for c in range(10)])
        sas, sds = assay.methods.semantic_alignment(pool, given, texts), assay.methods.sample_diversity(pool, given)
        table = pa.table({"sas": sas.numpy(), "sds": sds.numpy()})
        orders = {
            "SAS": -sas,
            "SAS, means of the given labels": -assay.methods.semantic_alignment(pool, given, own),
            "SDS, low end": -sds,
            "random (control)": torch.rand(1300),
        }

        def judged(rows: Rows, data: Any = (pool, given, wrong, test)) -> dict[str, float]:
            return {"worth of 30 %": accuracy(data[:2], rows, data[3]), "wrong": float(data[2][rows].float().mean())}

        def random(own: int, table: pa.Table = table) -> Rows:
            return select.random(table, 0.3, own).mask

        judged_by = {name: {"AUROC": auroc(wrong, each)} for name, each in orders.items()}
        judged_by["random (control)"] |= of_draws(random, judged, seed)
        for a in (0, 0.3, 1):
            judged_by[f"α = {a:g}"] = judged(select.clip_powered(table, "sas", "sds", 0.3, alpha=a).mask)
        exact, descent = (
            select.clip_powered(table, "sas", "sds", 0.3, alpha=0.3, beta=3.0, sgd=sgd, seed=seed).mask
            for sgd in (False, True)
        )
        judged_by["descent"] = {"in common": float((exact & descent).sum() / exact.sum())}
        numbers |= {f"{name}, {kind}": each for name, each in judged_by.items()}
    return numbers


def main() -> None:
    parts = {"similarity": similarity, "density": density, "leverage": leverage}
    parts |= {"knn_shapley": knn_shapley, "clip_powered": clip_powered}
    experiment("embeddings", {name: (part, 3) for name, part in parts.items()}, options.quick(__doc__))


if __name__ == "__main__":
    main()
