"""Does self-influence find wrong labels? Digits, 10 % flipped: ``python -m benchmarks.quality.self_influence``.

A network is trained on the flipped labels; EK-FAC's self-influence ∇ℓ_iᵀ H⁻¹ ∇ℓ_i, with labels drawn from the model
(true Fisher) and with the data's own (empirical), ranks the samples beside loss, gradient norm, the loss of a reference
trained on clean samples, and chance. The claim: at least 80 % of the flips in the top 10 %, 97 % in the top 20 %.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import assay
from assay.methods import EKFAC
from assay.probe import Probe, SqNorm, tapped_parameters
from assay.tasks import Classification
from benchmarks.quality.lds import cnn, seeded
from benchmarks.timing import RESULTS, write

NOISE, CLEAN = 0.1, 297  # the clean samples train the control's reference and nothing else
CLAIM = {"top 10 %": 0.8, "top 20 %": 0.97}


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


MODELS: dict[str, Callable[[], nn.Module]] = {"MLP": mlp, "CNN": cnn}


def flipped_digits(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Samples, labels as given, true labels; a wrong label is one of the nine others, equally likely."""
    from sklearn.datasets import load_digits

    features, true = load_digits(return_X_y=True)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(features))
    given, pool = true[order].copy(), len(features) - CLEAN
    flipped = rng.choice(pool, round(NOISE * pool), replace=False)
    given[flipped] = (given[flipped] + rng.integers(1, 10, len(flipped))) % 10
    return torch.tensor(features[order] / 16, dtype=torch.float32), torch.tensor(given), torch.tensor(true[order])


def train(model: nn.Module, x: Tensor, y: Tensor, seed: int, epochs: int = 20) -> nn.Module:
    """SGD with momentum, weight decay 5e-4, the learning rate falling linearly from 0.1."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, epochs)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
        schedule.step()
    return model.eval()


def found(score: NDArray[Any], wrong: NDArray[np.bool_], share: float) -> float:
    """Of the wrong labels, the share among the highest ``share`` of the scores."""
    top = np.argsort(-score, kind="stable")[: round(share * len(score))]
    return float(wrong[top].sum() / wrong.sum())


def one(kind: str, seed: int) -> dict[str, dict[str, float]]:
    x, given, true = flipped_digits(seed)
    pool, wrong = (x[:-CLEAN], given[:-CLEAN]), (given != true)[:-CLEAN].numpy()
    torch.manual_seed(seed)
    model = train(seeded(MODELS[kind], seed), *pool, seed)
    reference = train(seeded(MODELS[kind], seed + 100), x[-CLEAN:], given[-CLEAN:], seed, epochs=60)
    ranks: dict[str, NDArray[Any]] = {}
    for name, true_fisher in (("EK-FAC, true Fisher", True), ("EK-FAC, empirical Fisher", False)):
        method = EKFAC(model, Classification(), self_influence=True, true_fisher=true_fisher).fit([pool])
        ranks[name] = assay.score([pool], [method])["ekfac_self"].to_numpy()
    signals = Probe(model, Classification(), reductions={"n": SqNorm(tapped_parameters(model))})(pool)
    ranks["gradient norm"] = signals.reduced["n"].numpy()
    ranks["loss"] = signals.losses.numpy()
    with torch.no_grad():
        ranks["reference loss (control)"] = nn.functional.cross_entropy(
            reference(pool[0]), pool[1], reduction="none"
        ).numpy()
    ranks["random"] = np.random.default_rng(seed).random(len(wrong))
    return {
        name: {"top 10 %": found(score, wrong, 0.1), "top 20 %": found(score, wrong, 0.2)}
        for name, score in ranks.items()
    }


def case(kind: str, seeds: int) -> dict[str, Any]:
    runs = [one(kind, seed) for seed in range(seeds)]
    mean = {
        name: {top: round(statistics.fmean(run[name][top] for run in runs), 4) for top in CLAIM} for name in runs[0]
    }
    return {"model": kind, "noise": NOISE, "seeds": seeds, "mean": mean, "runs": runs}


def show(cases: list[dict[str, Any]]) -> None:
    table = Table(title=f"Share of the wrong labels found, digits, {NOISE:.0%} flipped, {cases[0]['seeds']} seeds")
    table.add_column("score")
    for one_case in cases:
        for top in CLAIM:
            table.add_column(f"{one_case['model']}\n{top}", justify="right")
    for name in cases[0]["mean"]:
        table.add_row(name, *(f"{c['mean'][name][top]:.3f}" for c in cases for top in CLAIM))
    table.add_row("claim (EK-FAC, CIFAR-10)", *(f"≥ {CLAIM[top]:.2f}" for _ in cases for top in CLAIM))
    Console(width=110).print(table)


def figure(cases: list[dict[str, Any]], stem: str) -> None:
    import matplotlib.pyplot as plt

    panels, axes = plt.subplots(1, len(cases), figsize=(5.5 * len(cases), 4), sharey=True, squeeze=False)
    for axis, one_case in zip(axes[0], cases, strict=True):
        names = list(one_case["mean"])
        for offset, (top, claim) in enumerate(CLAIM.items()):
            at = [y + 0.38 * offset for y in range(len(names))]
            axis.barh(at, [one_case["mean"][n][top] for n in names], 0.36, label=top, color=f"C{offset}")
            axis.axvline(claim, color=f"C{offset}", linestyle="--", linewidth=1)
        axis.set_yticks([y + 0.19 for y in range(len(names))], names)
        axis.set(title=one_case["model"], xlabel="share of the wrong labels found (dashed: the claim)", xlim=(0, 1))
    axes[0][0].invert_yaxis()
    axes[0][-1].legend(loc="lower right")
    panels.tight_layout()
    panels.savefig(RESULTS / f"{stem}.png", dpi=110)


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--seeds", type=int, default=5)
    cases = [case(kind, arguments.parse_args().seeds) for kind in MODELS]
    show(cases)
    path = write("self-influence", cases)
    figure(cases, path.stem)
    print("written to", path.name)


if __name__ == "__main__":
    main()
