"""A corpus with wrong labels, a small model that knows better, and a large one to train."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from tests.small_project import CLASSES, SIZE, make_project, make_rows, save_mlp


def make_noisy_labels(root: Path, rows: int = 60) -> None:
    """Half of the labels are wrong, of each of two files of so many rows; the small model has seen right ones alone."""
    project = make_project(root)
    rng = np.random.default_rng(0)
    for name, seed in (("a.parquet", 0), ("deep/b.jsonl", 1)):
        own = make_rows(rows, seed)
        for row in own[::2]:
            row["label"] = int((row["label"] + rng.integers(1, CLASSES)) % CLASSES)
        project.write_shard(name, own)
    held_out = root / "held-out/test.jsonl"
    held_out.parent.mkdir()
    held_out.write_text("".join(json.dumps(row) + "\n" for row in make_rows(50, 3)))
    good = make_rows(300, 4)
    torch.manual_seed(0)
    small = nn.Sequential(nn.Linear(SIZE, 8), nn.ReLU(), nn.Linear(8, CLASSES))
    x, y = torch.tensor([row["pixels"] for row in good]), torch.tensor([row["label"] for row in good])
    optimizer = torch.optim.Adam(small.parameters(), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(small(x), y).backward()
        optimizer.step()
    save_file(small.state_dict(), root / "models/small.safetensors")
    save_mlp(root / "models/large.safetensors", 7)
    models = {name: {"kind": "mlp", "path": f"models/{name}.safetensors"} for name in ("small", "large")}
    methods = [{"method": "ensemble", "models": ["small"]}]
    project.write_recipe(models=models, methods=methods)
