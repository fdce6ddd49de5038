"""What a shortlist keeps of an exact method's best, and int8 rows of float32's.

``python -m benchmarks.quality.shortlist``: a small network on the digits, 32 held-out digits as targets of their own,
three seeds. EK-FAC with conjugate gradients is the exact method. Of its top 1 % for a target, the share that is among
the k best by a cheap score, for k of 1, 2, 5, 10 and 20 % of the pool: LoGra and TrackStar as they would be stored, the
gradients' cosine, and as controls the pixels' cosine, the sample's own loss and random rows.

Then LoGra's and TrackStar's rows (``scan_rows``) in float16, bfloat16 and int8 beside float32: which share of the 100
best by the one are among those by the other, and Spearman's correlation of all scores; and what of the exact method's
top 1 % is left in a shortlist of 5 %.

Last, what a shortlist of 1 % saves: processor seconds of ``assay score`` on the digits ten times over, with a network
of two hidden layers of 256, for a first target and, with the store there, for another, beside EK-FAC + CG on every
row: ``--seconds`` adds them to the results.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from torch import Tensor, nn

from assay._json import dumps
from assay.corpus.features import quantize
from assay.engine import run
from assay.methods import EKFACCG, GradientCosine, Influence, LoGra, Scorer, TrackStar
from assay.methods.base import Method
from assay.ops import scan_scores
from assay.probe import Probe
from assay.recipe.recipe import load_recipe
from assay.tasks import Classification
from benchmarks.timing import RESULTS, machine, read

TARGETS, SEEDS, BATCH = 32, 3, 256
SHARES = (0.01, 0.02, 0.05, 0.1, 0.2)
KEPT = 0.05
COPIES, WIDE, ROUNDS = 10, (256, 256), 3

Batches = list[tuple[Tensor, Tensor]]
Scores = npt.NDArray[np.float32]


def digits(seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The pool and the targets, (N, 64) and (N,) each."""
    features, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(features))
    x, y = torch.tensor(features[order] / 16, dtype=torch.float32), torch.tensor(labels[order])
    return (x[TARGETS:], y[TARGETS:]), (x[:TARGETS], y[:TARGETS])


def trained(pool: tuple[Tensor, Tensor], seed: int, hidden: Sequence[int] = (32,), steps: int = 300) -> nn.Sequential:
    """64–32–10, or of other hidden layers, by Adam on batches of 50."""
    torch.manual_seed(seed)
    sizes, layers = [64, *hidden, 10], list[nn.Module]()
    for wide, narrow in pairwise(sizes):
        layers += [nn.Linear(wide, narrow), nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(steps):
        rows = torch.randint(len(pool[0]), (50,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(pool[0][rows]), pool[1][rows]).backward()
        optimizer.step()
    return model.eval()


def batched(pool: tuple[Tensor, Tensor]) -> Batches:
    return list(zip(pool[0].split(BATCH), pool[1].split(BATCH), strict=True))


def by_target(method: Method, pool: Batches) -> Scores:
    """(targets, N)."""
    scorer = Scorer([method])
    parts = [scorer(batch) for batch in pool]
    names = [f"{method.name}_{i}" for i in range(TARGETS)]
    return np.stack([torch.cat([part[name] for part in parts]).numpy() for name in names])


def features_of(method: Influence, pool: Batches) -> Tensor:
    """``scan_rows`` of the whole pool, float32."""
    probes = {role: Probe(n.model, n.task, reductions=n.reductions, logits=False) for role, n in method.needs().items()}
    parts = [method.scan_rows(*method.raw_features({role: probe(b) for role, probe in probes.items()})) for b in pool]
    return torch.cat(parts)


def recall(wanted: Scores, found: Scores, best: int, k: int) -> float:
    """Of the ``best`` by ``wanted``, the share among the ``k`` best by ``found``; the mean over targets."""
    shares = []
    for own, other in zip(wanted, found, strict=True):
        top = np.argsort(-own, kind="stable")[:best]
        shares.append(np.isin(top, np.argsort(-other, kind="stable")[:k]).mean())
    return float(np.mean(shares))


def stored(rows: Tensor, queries: Tensor) -> dict[str, Scores]:
    """(targets, N) by rows of each type."""
    small, scales = quantize(rows)
    found = {str(t).removeprefix("torch."): scan_scores(rows.to(t), queries, reduce="none") for t in FLOATS}
    found["int8"] = scan_scores(small, queries, reduce="none", scales=scales)
    return {name: scores.numpy() for name, scores in found.items()}


FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def one(seed: int) -> dict[str, Any]:
    """A seed's recalls."""
    pool, held_out = digits(seed)
    model, task, batches = trained(pool, seed), Classification(), batched(pool)
    targets = {str(i): [(held_out[0][i : i + 1], held_out[1][i : i + 1])] for i in range(TARGETS)}
    exact = by_target(EKFACCG(model, task, targets).fit(batches), batches)
    stores = {
        "logra": LoGra([model], task, targets).fit(batches),
        "trackstar": TrackStar([model], task, targets, target_share=0).fit(batches),
    }
    rows = {name: stored(features_of(method, batches), method.scan_queries()) for name, method in stores.items()}
    loss = nn.functional.cross_entropy(model(pool[0]), pool[1], reduction="none").detach().numpy()
    normal = nn.functional.normalize
    cheap = {name: found["float32"] for name, found in rows.items()} | {
        "gradient cosine": by_target(GradientCosine(model, task, targets).fit(batches), batches),
        "pixels' cosine": (normal(held_out[0]) @ normal(pool[0]).T).numpy(),
        "own loss": np.tile(loss, (TARGETS, 1)),
        "random": np.random.default_rng(seed).random((TARGETS, len(loss))).astype(np.float32),
    }
    size = len(loss)
    best, kept = round(0.01 * size), round(KEPT * size)
    return {
        "seed": seed,
        "accuracy": float((model(held_out[0]).argmax(1) == held_out[1]).float().mean()),
        "recall": {n: {str(s): recall(exact, own, best, round(s * size)) for s in SHARES} for n, own in cheap.items()},
        "stored": {
            name: {
                kind: {
                    "recall_at_100": recall(found["float32"], own, 100, 100),
                    "spearman": float(
                        np.mean([spearmanr(a, b)[0] for a, b in zip(found["float32"], own, strict=True)])
                    ),
                    "exact_top_in_shortlist": recall(exact, own, best, kept),
                }
                for kind, own in found.items()
            }
            for name, found in rows.items()
        },
    }


def seconds(root: Path) -> dict[str, Any]:
    """Of a processor, for ``assay score`` with a shortlist and without: medians of rounds, each of which runs all."""
    pool, held_out = digits(0)
    save_file(trained(pool, 0, WIDE, steps=50).state_dict(), root / "model.safetensors")
    (root / "data").mkdir()
    x, y = pool[0].repeat(COPIES, 1), pool[1].repeat(COPIES)
    _write(root / "data/a.parquet", x, y)
    for name, i in (("first", 0), ("other", 1)):
        _write(root / f"{name}.parquet", held_out[0][i : i + 1], held_out[1][i : i + 1])
    listed = {"method": "ekfac_cg", "model": "m", "shortlist": {"by": "logra", "top": 0.01}}
    cheap = {"method": "logra", "models": ["m"], "keep_features": "int8"}
    recipes = {
        "shortlist": _recipe(root, "shortlist", [cheap, listed]),
        "exact": _recipe(root, "exact", [{"method": "ekfac_cg", "model": "m"}]),
    }
    times: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        for kind in recipes:
            shutil.rmtree(root / kind, ignore_errors=True)
        for target in ("first", "other"):
            for kind, path in recipes.items():
                began = time.process_time()
                run(load_recipe(str(path), [f"targets.t.path={root}/{target}.parquet"]), rescore=True)
                times.setdefault(f"{kind}, {target} target", []).append(time.process_time() - began)
    medians = {name: round(statistics.median(found), 2) for name, found in times.items()}
    return {"rows": len(x), "hidden": WIDE, "rounds": ROUNDS, **medians}


def _write(path: Path, x: Tensor, y: Tensor) -> None:
    pq.write_table(pa.table({"input": x.tolist(), "label": y.numpy()}), path)


def _recipe(root: Path, kind: str, methods: list[dict[str, Any]]) -> Path:
    recipe = {
        "version": 1,
        "corpus": {"path": "data"},
        "task": {"kind": "classification", "classes": 10},
        "models": {"m": {"kind": "mlp", "path": "model.safetensors"}},
        "targets": {"t": {"path": "first.parquet"}},
        "fit": {"samples": 1024},
        "methods": methods,
        "run": {"devices": "cpu"},
        "output": kind,
    }
    path = root / f"{kind}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def mean(cases: list[Any]) -> Any:
    """Of cases of the same keys, number by number."""
    if isinstance(cases[0], Mapping):
        return {key: mean([case[key] for case in cases]) for key in cases[0]}
    return round(float(np.mean(cases)), 4)


def show(console: Console, result: Mapping[str, Any]) -> None:
    table = Table(title="of EK-FAC + CG's top 1 %, the share in a shortlist by")
    for heading in ("", *(f"{share:.0%}" for share in SHARES)):
        table.add_column(heading, justify="right" if heading else "left")
    for name, recalls in result["mean"]["recall"].items():
        table.add_row(name, *(f"{value:.3f}" for value in recalls.values()))
    console.print(table)
    table = Table(title="rows as they are stored, beside float32")
    for heading in ("", "recall at 100", "Spearman", f"of the exact top 1 %, in {KEPT:.0%}"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, kinds in result["mean"]["stored"].items():
        for kind, values in kinds.items():
            table.add_row(f"{name}, {kind}", *(f"{value:.4f}" for value in values.values()))
    console.print(table)
    console.print(result.get("seconds", "seconds: --seconds measures them"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--seconds", action="store_true", help="measure these anew, and keep what else is in the results"
    )
    path = RESULTS / "quality-shortlist.json"
    if parser.parse_args().seconds:
        result = read(path)
        with tempfile.TemporaryDirectory() as folder:
            result["seconds"] = seconds(Path(folder))
    else:
        cases = [one(seed) for seed in range(SEEDS)]
        keys = ("accuracy", "recall", "stored")
        result = {"machine": machine(), "cases": cases, "mean": mean([{k: c[k] for k in keys} for c in cases])}
    path.write_text(dumps(result, indent=1) + "\n")
    show(Console(width=100), result)


if __name__ == "__main__":
    main()
