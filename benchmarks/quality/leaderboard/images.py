"""The images board: a small convolutional network on the emoji of four vendors, told apart by category.

The rows are some emoji as each vendor draws them; of those that are asked about, one vendor's drawing is the query and
the others' are rows.
"""

from __future__ import annotations

import tempfile
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.quality.leaderboard.bank import Bank
from benchmarks.quality.leaderboard.classifiers import Classifier

SIDE, CLASSES = 16, 9


def samples(root: Path, train: int, queries: int) -> tuple[Tensor, Tensor]:
    """(N + Q, 3, 16, 16) in [0, 1], 0 where the paper is white, as beyond its edge."""
    from benchmarks.quality.emoji import VERSION

    kept = Bank(root, {"board": "emoji", "version": VERSION, "side": str(SIDE)}).tensors("pictures", _pictures)
    pictures, categories = kept["pictures"], kept["categories"]
    vendors = pictures.shape[1]
    drawn = torch.from_numpy(np.random.default_rng(0).permutation(len(pictures))[: -(-(train + queries) // vendors)])
    emoji, vendor = drawn.repeat_interleave(vendors), torch.arange(vendors).repeat(len(drawn))
    asked = torch.arange(queries) * vendors + torch.arange(queries) % vendors
    others = torch.ones(len(emoji), dtype=torch.bool).index_fill(0, asked, False).nonzero()[:train, 0]
    order = torch.cat([others, asked])
    return pictures[emoji, vendor][order].float() / 255, categories[emoji][order]


def _pictures() -> dict[str, Tensor]:
    """(E, V, 3, 16, 16) uint8, all emoji that every vendor draws, and (E,) their categories."""
    from benchmarks.quality.emoji import VENDORS, packages, read_package

    with tempfile.TemporaryDirectory(prefix="emoji-") as folder:
        paths = packages(Path(folder))
        drawn = [{e.name: e for e in read_package(path, own)} for path, own in zip(paths, VENDORS, strict=True)]
    names = sorted(set.intersection(*map(set, drawn)))
    of_name = [drawn[0][name].category for name in names]
    categories = sorted(set(of_name))
    return {
        "pictures": torch.stack([torch.stack([_pixels(own[name].png) for own in drawn]) for name in names]),
        "categories": torch.tensor([categories.index(category) for category in of_name]),
    }


def _pixels(png: bytes) -> Tensor:
    """(3, 16, 16) uint8: what is not white, mean over squares."""
    from PIL import Image

    with Image.open(BytesIO(png)) as image:
        rgba = torch.from_numpy(np.array(image.convert("RGBA"))).permute(2, 0, 1).double()
    ink = (255 - rgba[:3]) * rgba[3:] / 255
    return nn.functional.adaptive_avg_pool2d(ink, SIDE).round().to(torch.uint8)


def network() -> nn.Sequential:
    """2,837 parameters; pooling by means, for a maximum has no second derivative that tells."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.GELU()),
        *(nn.Conv2d(8, 12, 3, padding=1), nn.GELU(), nn.AvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(192, CLASSES)),
    )


IMAGES = Classifier(
    "images",
    "CNN of two convolutions on emoji, GELU, AdamW .01",
    samples,
    network,
    "adamw",
    0.01,
    train=800,
    queries=30,
    steps=80,
    larger=(),
)
