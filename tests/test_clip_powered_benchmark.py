"""The experiment on CLIP-powered selection, at its smallest: patches whose colour is their class and in their text."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("PIL.Image")
pytest.importorskip("transformers")
from benchmarks.quality.clip_powered import World, labels, make_world, pairs
from benchmarks.quality.online.pictures import SIDE, Pictures


@pytest.fixture(scope="module")
def patches() -> Pictures:
    """Two renderings each of 160 patches of noise."""
    emoji = torch.arange(320) // 2
    pixels = torch.rand(320, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) - 0.5
    pixels[torch.arange(320), emoji % 3] += 0.4
    texts = [f"patch {i}, {('red', 'green', 'blue')[i % 3]} thing" for i in range(160)]
    return Pictures(pixels, emoji, emoji % 3, texts)


@pytest.fixture(scope="module")
def world(patches: Pictures) -> World:
    return make_world(patches, 12, seed=0)


def test_parts_share_no_emoji_and_a_class_has_its_keywords(world: World) -> None:
    emoji = [set(world.pictures.emoji[rows].tolist()) for rows in (world.known, world.pool, world.test)]
    assert [len(each) for each in emoji] == [72, 56, 32]
    assert len(set.union(*emoji)) == 160
    assert [len(words) for words in world.keywords] == [1, 1, 1]
    assert len({tuple(words[0].tolist()) for words in world.keywords}) == 3


def test_wrong_labels_are_found_and_left_out(world: World) -> None:
    numbers = labels(world, 2, seed=0)
    assert numbers["CLIP"]["zero-shot accuracy"] > 0.9
    assert numbers["CLIP"]["AUROC of SAS"] > 0.95 > numbers["untrained CLIP (control)"]["AUROC of SAS"]
    assert numbers["CLIP, α = 0"]["wrong"] < 0.05
    assert 0.1 < numbers["random (control)"]["wrong"] < 0.3
    assert numbers["random, right labels (control)"]["wrong"] == 0


def test_mismatched_pairs_are_found(world: World) -> None:
    numbers = pairs(world, seed=0)
    assert numbers["CLIP"]["AUROC"] > 0.7  # a third of the wrong texts have the colour, too
    assert 0.35 < numbers["random (control)"]["AUROC"] < 0.65
