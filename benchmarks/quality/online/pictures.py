"""The emoji as tensors, and their split: all renderings of one emoji fall into the same part."""

from __future__ import annotations

import json
import tarfile
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.quality.emoji import VENDORS, packages, pixels_of, read_package

SIDE = 32


@dataclass(frozen=True)
class Pictures:
    """Renderings of emoji.

    Attributes:
        pixels: (N, 3, SIDE, SIDE), in [−1, 1].
        emoji: (N,) int64, which one each is a rendering of.
        categories: (N,) int64.
        texts: of each emoji, its name and its keywords.
    """

    pixels: Tensor
    emoji: Tensor
    categories: Tensor
    texts: Sequence[str]

    def of(self, emoji: Tensor) -> Tensor:
        """The rows of some emoji's renderings."""
        return torch.nonzero(torch.isin(self.emoji, emoji)).flatten()


def pictures(folder: str | None, vendors: Sequence[str] = VENDORS, every: int = 1) -> Pictures:
    """Every so-manieth emoji of some vendors, of the packages in the folder, or fetched for the while."""
    with ExitStack() as stack:
        at = Path(folder or stack.enter_context(tempfile.TemporaryDirectory(prefix="emoji-")))
        paths = packages(at, vendors)
        found = [e for path, vendor in zip(paths, vendors, strict=True) for e in read_package(path, vendor)]
        words = keywords(paths[0])
    names = sorted({e.name for e in found})[::every]
    chosen = set(names)
    found = [e for e in found if e.name in chosen]
    categories = sorted({e.category for e in found})
    return Pictures(
        pixels_of(found, SIDE),
        torch.tensor([names.index(e.name) for e in found]),
        torch.tensor([categories.index(e.category) for e in found]),
        [f"{name}, {words[name]}" for name in names],
    )


def keywords(package: Path) -> dict[str, str]:
    """By an emoji's name what it is a kind of, in two or three words."""
    with tarfile.open(package) as archive:
        file = archive.extractfile("package/emoji.json")
        assert file is not None
        entries = json.load(file)
    named = {(e["name"] or e["short_name"].replace("_", " ")).lower(): e for e in entries}
    return {name: entry["subcategory"].replace("-", " ") for name, entry in named.items()}


def parts(pictures: Pictures, shares: Sequence[float]) -> list[Tensor]:
    """The emoji, in an order that torch's generator gives, in parts of so many shares, and one of the rest."""
    order = torch.randperm(len(pictures.texts))
    counts = [int(share * len(order)) for share in shares]
    return list(order.split([*counts, len(order) - sum(counts)]))


def cnn(outputs: int) -> nn.Sequential:
    """Of (B, 3, SIDE, SIDE), with norms that do not mix samples."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.GroupNorm(4, 8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.GroupNorm(4, 16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.GroupNorm(4, 32), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * (SIDE // 8) ** 2, outputs),
    )  # fmt: skip
