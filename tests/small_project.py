"""A small project on disk: shards of labelled vectors, two MLPs and a better one, and a recipe."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from safetensors.torch import save_file
from torch import nn

SIZE, CLASSES = 6, 3


@dataclass(frozen=True)
class Project:
    """Paths of a project and its recipe as plain data."""

    root: Path
    recipe: dict

    @property
    def path(self) -> Path:
        return self.root / "recipe.yaml"

    @property
    def scores(self) -> Path:
        return self.root / "scores"

    def write_recipe(self, **changes) -> Path:
        self.path.write_text(yaml.safe_dump({**self.recipe, **changes}))
        return self.path

    def write_shard(self, name: str, rows: list[dict]) -> Path:
        """JSON lines or Parquet, by the name's suffix."""
        path = self.root / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".jsonl"):
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            pq.write_table(pa.Table.from_pylist(rows), path)
        return path

    def tables(self) -> dict[str, bytes]:
        """The bytes of every score table."""
        return {str(p.relative_to(self.scores)): p.read_bytes() for p in sorted(self.scores.rglob("*.parquet"))}

    def quarantine(self) -> list[tuple]:
        """(shard, row, id, reason) of everything that was not scored."""
        files = sorted((self.scores / "quarantine").rglob("*.jsonl"))
        return [tuple(json.loads(line).values()) for file in files for line in file.read_text().splitlines()]


def make_rows(count: int, seed: int = 0) -> list[dict]:
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(count, SIZE)).astype(np.float32)
    labels = inputs[:, :CLASSES].argmax(1)
    return [
        {"id": f"s{seed}-{i}", "pixels": x.tolist(), "label": int(y)}
        for i, (x, y) in enumerate(zip(inputs, labels, strict=True))
    ]


def save_mlp(path: Path, seed: int, scale: float = 1.0) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(SIZE, 8), nn.ReLU(), nn.Linear(8, CLASSES))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor * scale for name, tensor in model.state_dict().items()}, path)


def make_project(root: Path) -> Project:
    for name, seed in (("a", 0), ("b", 1)):
        save_mlp(root / f"models/{name}.safetensors", seed)
    save_mlp(root / "models/ref.safetensors", 0, scale=1.5)
    recipe = {
        "version": 1,
        "corpus": {"path": "data", "id_column": "id"},
        "task": {
            "kind": "classification",
            "input_column": "pixels",
            "label_column": "label",
            "classes": CLASSES,
        },
        "models": {name: {"kind": "mlp", "path": f"models/{name}.safetensors"} for name in ("a", "b", "ref")},
        "methods": [
            {"method": "ensemble", "models": ["a", "b"]},
            {"method": "grad_mimic", "model": "a", "reference": "ref"},
        ],
        "output": "scores",
        "batch": {"samples": 16},
    }
    made = Project(root, recipe)
    made.write_shard("a.parquet", make_rows(50, 0))
    made.write_shard("deep/b.jsonl", make_rows(30, 1))
    made.write_recipe()
    return made
