"""The experiment on CLIP-powered selection, at its smallest: patches whose colour is their class and in their text."""

from __future__ import annotations

import pytest

pytest.importorskip("PIL.Image")
pytest.importorskip("transformers")
from benchmarks.quality.clip_powered import World, labels, make_world, pairs
from benchmarks.quality.online.pictures import Pictures
from tests.small_pictures import make_patches


@pytest.fixture(scope="module")
def patches() -> Pictures:
    return make_patches(160, "patch {i}, {colour} thing")


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
