"""The benchmark of wrong labels among images, on patches of three colours: planted, trained, scored by a recipe."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest

Image = pytest.importorskip("PIL.Image")
from benchmarks.quality.emoji import Emoji, experiment, judged, planted  # noqa: E402 (it needs Pillow)


def patches(count: int) -> list[Emoji]:
    """Noise that has more of the colour that is its category."""
    rng = np.random.default_rng(0)
    made = []
    for i in range(count):
        pixels = rng.integers(0, 128, (16, 16, 3))
        pixels[:, :, i % 3] += 100
        file = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
        colour = ("red", "green", "blue")[i % 3]
        made.append(Emoji("none", file.getvalue(), f"patch {i}", colour, f"patch {i}", colour))
    return made


def test_wrong_labels_are_planted_and_found(tmp_path: Path) -> None:
    emoji = planted(patches(260), 0.2, seed=1)
    assert sum(e.wrong[0] for e in emoji) == sum(e.wrong[1] for e in emoji) == 52
    assert emoji == planted(patches(260), 0.2, seed=1)
    sizes = {"side": 16, "width": 16, "epochs": (2, 8), "parts": 2, "seeds": 1}
    scores, wrong = experiment(emoji, tmp_path, "classification", sizes)
    found = judged(scores, wrong)
    assert wrong.tolist() == [e.wrong[0] for e in emoji]
    assert min(found[name]["auroc"] for name in ("ensemble_nll", "ensemble_margin", "reference_loss")) > 0.85
    assert 0.35 < found["random (control)"]["auroc"] < 0.65
    assert found["ensemble_nll"]["precision"] > 0.6
