"""Digits with 30 % wrong labels: score, select, train a larger model, compare.

One seed is one world: which labels are wrong, which samples are held out, every network's start. Mimic scores come from
a recipe run over Parquet shards (what ``assay score`` does) and its selections from curated corpora on disk (what
``assay select`` does); the ensemble is cross-fitted in Python.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from assay import select
from assay._json import dumps
from assay._lazy import require
from assay.corpus.tables import make_table
from assay.methods import Column, ensemble_scores
from assay.methods.ensemble import PREDICTION, STATISTICS
from assay.methods.label_quality import COLUMNS as LABEL_QUALITY
from assay.retrain import out_of_fold

NOISE = 0.3
TEST, TRUSTED = (
    397,
    200,
)  # samples for the final test, and with labels known to be right; the rest is the corpus
SHARDS = 4

RECIPE = """\
version: 1
corpus: {path: corpus/*.parquet, id_column: id}
task: {kind: classification, input_column: pixels, label_column: label, classes: 10}
models:
  model: {kind: mlp, path: models/model.safetensors}          # two epochs on the noisy corpus
  reference: {kind: mlp, path: models/reference.safetensors}  # the same start, trained on the trusted samples
methods:
  - {method: grad_mimic, model: model, reference: reference}
output: scores
seed: 0
"""


@dataclass(frozen=True)
class World:
    """One seed's data: what the method sees, and what only the judge knows."""

    x: Tensor  # (N, 64) the corpus
    given: NDArray[np.int64]  # its labels, 30 % of them wrong
    true: NDArray[np.int64]
    trusted: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    @property
    def wrong(self) -> NDArray[np.bool_]:
        return np.not_equal(self.given, self.true)


def make_world(seed: int) -> World:
    features, target = require("sklearn.datasets", "cli").load_digits(return_X_y=True)
    x = torch.tensor((features - features.mean(0)) / (features.std(0) + 1e-6), dtype=torch.float32)
    rng = np.random.default_rng(seed)
    test, trusted, pool = np.split(rng.permutation(len(x)), [TEST, TEST + TRUSTED])
    given = target[pool].copy()
    flipped = rng.choice(len(pool), int(NOISE * len(pool)), replace=False)
    given[flipped] = (given[flipped] + rng.integers(1, 10, len(flipped))) % 10

    def labelled(rows: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        return x[rows], torch.tensor(target[rows])

    return World(x[pool], given, target[pool], labelled(trusted), labelled(test))


def network(*widths: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def train(model: nn.Module, x: Tensor, y: Tensor, *, epochs: int, lr: float, seed: int) -> nn.Module:
    """A trained copy of the model."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(32):  # type: ignore[no-untyped-call]
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return model


def accuracy_of_larger_model(world: World, rows: NDArray[np.int64], labels: NDArray[np.int64], seed: int) -> float:
    """Test accuracy of a 64–256–256–10 network trained on some rows of the corpus."""
    # As many steps for a small subset as for everything: what is compared is the data, not the training time.
    epochs = max(1, round(20 * len(world.x) / max(1, len(rows))))
    start = network(64, 256, 256, 10, seed=1000 + seed)
    model = train(start, world.x[rows], torch.tensor(labels), epochs=epochs, lr=0.02, seed=seed)
    with torch.no_grad():
        return float((model(world.test[0]).argmax(1) == world.test[1]).float().mean())


def write_project(world: World, folder: Path, seed: int) -> None:
    """The corpus as shards, the two models, the recipe; the true labels go into a file of their own."""
    save_file = require("safetensors.torch", "cli").save_file
    for name in ("corpus", "models"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    n = len(world.x)
    ids = [f"digit-{i:04}" for i in range(n)]
    table = pa.table({"id": ids, "pixels": pa.array(list(world.x.numpy())), "label": world.given})
    for i, rows in enumerate(np.array_split(np.arange(n), SHARDS)):
        pq.write_table(table.slice(rows[0], len(rows)), folder / "corpus" / f"part-{i}.parquet")
    pq.write_table(pa.table({"id": ids, "true_label": world.true}), folder / "truth.parquet")
    start = network(64, 64, 10, seed=seed)
    model = train(start, world.x, torch.tensor(world.given), epochs=2, lr=0.01, seed=seed)
    reference = train(start, *world.trusted, epochs=40, lr=0.05, seed=seed)
    save_file(model.state_dict(), folder / "models" / "model.safetensors")
    save_file(reference.state_dict(), folder / "models" / "reference.safetensors")
    (folder / "recipe.yaml").write_text(RECIPE)


def ensemble_table(world: World, seed: int) -> pa.Table:
    """Out-of-fold scores of three kinds of small model."""
    linear, trees, neighbours = (require(f"sklearn.{m}", "cli") for m in ("linear_model", "ensemble", "neighbors"))
    members = [
        linear.LogisticRegression(max_iter=300, C=0.05),
        trees.RandomForestClassifier(100, random_state=seed),
        neighbours.KNeighborsClassifier(15),
    ]
    labels = torch.tensor(world.given)
    held_out = out_of_fold(members, world.x.numpy(), world.given, seed=seed)
    scores = {f"ensemble_{name}": v.numpy() for name, v in ensemble_scores(list(held_out.logits), labels).items()}
    described = (*STATISTICS, PREDICTION, *LABEL_QUALITY)
    columns = [Column(f"ensemble_{c.name}", c.keep, c.description) for c in described]
    ids = [f"digit-{i:04}" for i in range(len(world.x))]
    return make_table(np.arange(len(world.x)), ids, scores, columns, {"note": "out of fold, 5 folds"})


def curate(folder: Path, by: str, rule: Callable[[pa.Table], select.Selection], name: str) -> NDArray[np.int64]:
    """Write a curated corpus and read back which samples are in it."""
    from assay.curate import curate as write_curated

    out = folder / "curated" / name
    write_curated(str(folder / "scores"), by, rule, str(out))
    ids = read_shards(out, ["id"])["id"].to_pylist()
    return np.array([int(i.removeprefix("digit-")) for i in ids], dtype=np.int64)


def read_shards(folder: Path, columns: list[str]) -> pa.Table:
    """The shards of a folder as one table; manifests and quarantine lie beside them."""
    shards: pa.Table = ds.dataset([str(p) for p in sorted(folder.glob("part-*.parquet"))]).to_table(columns=columns)
    return shards


def one_seed(folder: Path, seed: int) -> dict[str, dict[str, float]]:
    """Everything for one seed: subset -> AUROC, share kept, test accuracy."""
    from assay.engine import run
    from assay.recipe import load_recipe

    auroc = require("sklearn.metrics", "cli").roc_auc_score
    world = make_world(seed)
    write_project(world, folder, seed)
    run(load_recipe(str(folder / "recipe.yaml")), rescore=True)
    scores = read_shards(folder / "scores", ["id", "mimic", "reference_loss"]).sort_by("id")
    ensemble = ensemble_table(world, seed)
    pq.write_table(ensemble, folder / "ensemble.parquet")

    n, share = len(world.x), 1 - NOISE
    margin = "ensemble_normalized_margin"
    worth = {
        margin: ensemble[margin].to_numpy(),
        "mimic": scores["mimic"].to_numpy(),
        "reference_loss": -scores["reference_loss"].to_numpy(),
    }
    found = {name: float(auroc(world.wrong, -value)) for name, value in worth.items()}
    subsets: dict[str, tuple[NDArray[np.int64], str | None]] = {
        "everything": (np.arange(n), None),
        "random 70 %": (select.random(ensemble, share, seed).indices, None),
        "reference loss, best 70 %": (
            curate(folder, "reference_loss", _top("reference_loss", share), "reference_loss"),
            "reference_loss",
        ),
        "ensemble margin, best 70 %": (select.top(ensemble, margin, share).indices, margin),
        "ensemble margin, mixture": (select.gmm(ensemble, margin).indices, margin),
        "mimic, best 70 %": (curate(folder, "mimic", _top("mimic", share), "mimic"), "mimic"),
        "mimic, mixture": (
            curate(folder, "mimic", lambda t: select.gmm(t, "mimic"), "mimic-mixture"),
            "mimic",
        ),
        "oracle: every right label": (np.flatnonzero(~world.wrong), None),
    }
    return {
        name: {
            "auroc": found[score] if score else float("nan"),
            "kept": len(rows) / n,
            "wrong": float(world.wrong[rows].mean()),
            "accuracy": accuracy_of_larger_model(world, rows, world.given[rows], seed),
        }
        for name, (rows, score) in subsets.items()
    }


def _top(by: str, share: float) -> Callable[[pa.Table], select.Selection]:
    return lambda table: select.top(table, by, share)


def main(out: Path, seeds: int = 3) -> dict[str, Any]:
    """Run the demonstration, print its table, write ``results.json``; returns what that holds."""
    out.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the networks are so small that a second thread costs more than it brings
    try:
        runs = [one_seed(out / f"seed-{seed}", seed) for seed in range(seeds)]
    finally:
        torch.set_num_threads(threads)
    summary: dict[str, Any] = {}
    for name in runs[0]:
        values = {key: [run[name][key] for run in runs] for key in runs[0][name]}
        summary[name] = {key: float(np.mean(v)) for key, v in values.items()}
        summary[name]["accuracy_spread"] = float(np.std(values["accuracy"], ddof=1)) if seeds > 1 else 0.0
    results = {"noise": NOISE, "seeds": seeds, "subsets": summary}
    (out / "results.json").write_text(dumps(results, indent=1) + "\n")
    _show(summary, out, seeds)
    return results


def _show(summary: dict[str, Any], out: Path, seeds: int) -> None:
    table = require("rich.table", "cli").Table(
        title=f"digits, {NOISE:.0%} of the labels wrong: a 64–256–256–10 network trained on each subset, {seeds} seeds"
    )
    for heading in ("subset", "AUROC of wrong labels", "kept", "of these wrong", "test accuracy"):
        table.add_column(heading, justify="left" if heading == "subset" else "right")
    for name, row in summary.items():
        found = "–" if np.isnan(row["auroc"]) else f"{row['auroc']:.3f}"
        table.add_row(
            name,
            found,
            f"{row['kept']:.0%}",
            f"{row['wrong']:.1%}",
            f"{row['accuracy']:.1%} ± {row['accuracy_spread']:.1%}",
        )
    require("rich.console", "cli").Console().print(table)
    first = out / "seed-0"
    print(f"recipe   {first / 'recipe.yaml'}      (assay score {first / 'recipe.yaml'})")
    print(f"scores   {first / 'scores'}           (assay ls {first / 'scores'})")
    print(f"curated  {first / 'curated' / 'mimic'}    (assay select {first / 'scores'} --by mimic --top 0.7 --out …)")
    print(f"results  {out / 'results.json'}")
