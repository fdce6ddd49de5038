"""The leaderboard's board of images: what is asked about has its likes among the rows, and convolutions are judged."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

Image = pytest.importorskip("PIL.Image")
from benchmarks.quality import emoji  # noqa: E402 (it needs Pillow)
from benchmarks.quality.leaderboard import classifiers, digits, images  # noqa: E402
from benchmarks.quality.leaderboard.__main__ import measure  # noqa: E402
from benchmarks.quality.leaderboard.entries import register  # noqa: E402
from benchmarks.quality.leaderboard.truth import losses_without  # noqa: E402


def squares(root: Path, train: int, queries: int) -> tuple[Tensor, Tensor]:
    x, y = digits.samples(root, train, queries)
    return x.view(-1, 1, 8, 8), y


def network() -> nn.Sequential:
    hidden = [nn.Conv2d(1, 6, 3, stride=2, padding=1), nn.GELU(), nn.Conv2d(6, 8, 3, padding=1), nn.GELU()]
    return nn.Sequential(*hidden, nn.AvgPool2d(2), nn.Flatten(), nn.Linear(32, 10))


def test_methods_of_a_network_with_convolutions_come_in_the_order_of_what_they_know(tmp_path: Path) -> None:
    setting = replace(digits.QUICK, samples=squares, network=network, members=1, steps=24, drops=16, queries=4)
    board, entries = classifiers.build(setting, tmp_path), register()
    labels = ("MAGIC", "EK-FAC", "KNN-Shapley, K = 5", "random")
    case = measure(board, {label: entries[label] for label in labels}, at_once=0)
    assert not case["absent"]
    lds = {label: row["lds"]["value"] for label, row in case["methods"].items()}
    assert lds["MAGIC"] > 0.9
    assert lds["MAGIC"] > lds["EK-FAC"] > lds["random"] + 0.3
    assert lds["KNN-Shapley, K = 5"] > lds["random"] + 0.1
    (base,) = losses_without(board, [()], 0)
    with torch.no_grad():
        np.testing.assert_allclose(base, classifiers.losses(board.model, board.queries).numpy(), atol=1e-5)


def test_the_other_drawings_of_what_is_asked_about_are_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pictures() -> dict[str, Tensor]:
        """Every pixel of a channel says which emoji it is, of which vendor, of which category."""
        kind, vendor = torch.arange(50), torch.arange(4)
        values = torch.stack(torch.broadcast_tensors(kind[:, None], vendor, kind[:, None] % 9), -1)
        drawn = values[..., None, None].expand(-1, -1, -1, images.SIDE, images.SIDE)
        return {"pictures": drawn.to(torch.uint8), "categories": kind % 9}

    monkeypatch.setattr(images, "_pictures", pictures)
    x, y = images.samples(tmp_path, 90, 10)
    assert x.shape == (100, 3, images.SIDE, images.SIDE)
    kinds, vendors, categories = (255 * x[:, :, 0, 0]).round().long().T.tolist()
    assert categories == y.tolist()
    seen = set(zip(kinds, vendors, strict=True))
    assert len(seen) == 100  # no drawing twice
    assert len(set(kinds[90:])) == 10
    assert set(vendors[90:]) == {0, 1, 2, 3}
    for kind, own in zip(kinds[90:], vendors[90:], strict=True):
        assert {v for k, v in zip(kinds[:90], vendors[:90], strict=True) if k == kind} == {0, 1, 2, 3} - {own}


def test_paper_and_what_is_transparent_are_0() -> None:
    rgba = np.zeros((64, 64, 4), np.uint8)  # black, of which nothing is seen
    rgba[:, 32:] = 255, 255, 255, 255  # white
    rgba[:4, :4] = 0, 255, 255, 255
    rgba[:4, 4:8] = 0, 0, 0, 51
    file = io.BytesIO()
    Image.fromarray(rgba).save(file, "PNG")
    found = images._pixels(file.getvalue())
    assert found[:, 0, 0].tolist() == [255, 0, 0]  # what is not white of cyan
    assert found[:, 0, 1].tolist() == [51, 51, 51]
    found[:, 0, :2] = 0
    assert not found.any()


def test_without_npm_the_package_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(
        FileNotFoundError,
        match=r"emoji-datasource-apple-.*: not there, and npm, which fetches it, is missing: install it",
    ):
        emoji.packages(tmp_path)
