"""Averages of models of parts against models of their union: byte models of Python's standard library.

A network that predicts the next byte from the twelve before is first trained on the beginnings of all packages; then,
from that one start, once through each of eight packages' next 30,000 bytes, and once through the union of every pair
and of 20 triples of them. Held-out text is of two kinds: prose (the manual's topics) and code (other packages). Does
the loss of the parts' average rank the mixes as the loss of the union's model does? The control needs no merging: the
mean of the parts' own losses.
"""

from __future__ import annotations

import copy
import itertools
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from scipy.stats import spearmanr
from torch import Tensor, nn

from assay.retrain import ablate

PARTS = ("asyncio", "email", "encodings", "idlelib", "multiprocessing", "pydoc_data", "unittest", "xml")
HELD_OUT = {"prose": ("pydoc_data",), "code": ("logging", "json", "http", "importlib")}
SEED, SIZE, JUDGED = 20_000, 30_000, 30_000  # bytes: of the start, of a part, of a kind that is held out
CONTEXT, WIDTH, BATCH, RATE = 12, 96, 128, 0.002
TRIPLES = 20


def text(package: str) -> bytes:
    folder = Path(sysconfig.get_paths()["stdlib"]) / package
    return b"\n".join(path.read_bytes() for path in sorted(folder.rglob("*.py")))


def windows(data: bytes) -> Tensor:
    """(n, CONTEXT + 1): each byte behind those before it."""
    return torch.tensor(list(data), dtype=torch.int64).unfold(0, CONTEXT + 1, 1)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(256, 16), nn.Flatten(), nn.Linear(CONTEXT * 16, WIDTH), nn.GELU(), nn.Linear(WIDTH, 256)
    )


def trained(start: nn.Module, data: Tensor, seed: int, passes: int = 1) -> nn.Module:
    model = copy.deepcopy(start)
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(passes):
        for rows in torch.randperm(len(data), generator=generator).split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(data[rows, :-1]), data[rows, -1]).backward()
            optimizer.step()
    return model


def loss(model: nn.Module, data: Tensor) -> float:
    """Nats per byte."""
    with torch.no_grad():
        parts = [nn.functional.cross_entropy(model(x[:, :-1]), x[:, -1], reduction="sum") for x in data.split(4096)]
    return float(sum(parts)) / len(data)


def held_out(kind: str) -> Tensor:
    """Of the manual's topics, what no part has; of packages that are no part, the beginnings."""
    texts = [text(package) for package in HELD_OUT[kind]]
    return windows(texts[0][-JUDGED:] if kind == "prose" else b"".join(t[: JUDGED // len(texts)] for t in texts))


def correlations(merged: Sequence[float], own: Sequence[float], truth: Sequence[float]) -> dict[str, float]:
    best = int(np.argmin(merged))
    return {
        "merged": float(spearmanr(merged, truth).statistic),
        "mean of the parts' losses (control)": float(spearmanr(own, truth).statistic),
        "regret of the merged models' choice": float(truth[best] - min(truth)),
        "regret of the control's": float(truth[int(np.argmin(own))] - min(truth)),
        "regret of a random mix": float(np.mean(truth) - min(truth)),
    }


def run(quick: bool) -> dict[str, Any]:
    names = PARTS[:4] if quick else PARTS
    size = 4_000 if quick else SIZE
    texts = {name: text(name) for name in names}
    assert all(len(t) > SEED + SIZE for t in texts.values())
    start = trained(network(), torch.cat([windows(t[: SEED // (10 if quick else 1)]) for t in texts.values()]), seed=0)
    data = [windows(t[SEED : SEED + size]) for t in texts.values()]
    parts = [trained(start, own, seed=1 + k) for k, own in enumerate(data)]
    pairs = list(itertools.combinations(range(len(names)), 2))
    triples = list(itertools.combinations(range(len(names)), 3))
    np.random.default_rng(0).shuffle(triples)
    mixes = [*pairs, *triples[:TRIPLES]]
    unions = [trained(start, torch.cat([data[k] for k in mix]), seed=100 + m) for m, mix in enumerate(mixes)]
    found: dict[str, Any] = {"parts": names, "mixes": mixes, "kinds": {}}
    for kind in HELD_OUT:
        judged = held_out(kind)
        merged = ablate(start, parts, lambda model, judged=judged: loss(model, judged), mixes)
        alone = [loss(part, judged) for part in parts]
        truth = [loss(model, judged) for model in unions]
        own = [float(np.mean([alone[k] for k in mix])) for mix in mixes]
        cut = {"pairs": slice(len(pairs)), "triples": slice(len(pairs), None)}
        found["kinds"][kind] = {
            "start": loss(start, judged),
            "alone": alone,
            "merged": merged.losses.tolist(),
            "union": truth,
            "without": merged.scores.tolist(),
            "everything merged": merged.everything,
            **{name: correlations(merged.losses[s].tolist(), own[s], truth[s]) for name, s in cut.items()},
        }
    return found


def table(found: dict[str, Any]) -> Table:
    out = Table(title="Spearman's correlation with the loss of models trained on the union, over mixes")
    for column in ("held out", "mixes", "merged", "parts' mean", "regret: merged", "control", "random"):
        out.add_column(column)
    for kind, own in found["kinds"].items():
        for mixes in ("pairs", "triples"):
            out.add_row(kind, mixes, *(f"{value:.3f}" for value in own[mixes].values()))
    return out
