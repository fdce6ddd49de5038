"""The experiments on online weights, at their smallest."""

from __future__ import annotations

import copy

import pytest
import torch

from benchmarks.quality.online import digits
from benchmarks.quality.online.classification import one_seed, steps_to, summary

pytest.importorskip("PIL.Image")  # for the emoji
pytest.importorskip("transformers")
from transformers.models.clip.modeling_clip import image_text_contrastive_loss

from assay.tasks import Contrastive
from benchmarks.quality.online import clip, emoji_classes
from benchmarks.quality.online.pictures import Pictures
from tests.small_pictures import make_patches


@pytest.fixture(scope="module")
def patches() -> Pictures:
    return make_patches(120, "patch {colour} {i}")


def test_one_seed() -> None:
    runs = [one_seed(digits.make_world(digits.linear_probe, 50, noise=0.5, seed=0), 0.5)]
    assert {len(curve) for curve in runs[0]["curves"].values()} == {5}
    rows = {row["selection"]: row for row in summary(runs)}
    accuracy = {name: row["accuracy"][0] for name, row in rows.items()}
    assert accuracy["oracle"] > accuracy["SGD"]
    assert accuracy["mimic, online, all layers"] > accuracy["SGD"]
    assert accuracy["in-run influence, online"] > accuracy["SGD"]
    assert runs[0]["f1"]["share known"] > 0.85  # half of the labels are wrong
    assert 0 < rows["mimic, online, all layers"]["weight_on_wrong"][0] < 0.3
    assert rows["mimic, best half of a batch"]["effective_share"] == pytest.approx([0.5])


def test_steps_to() -> None:
    assert steps_to([0.1, 0.5, 0.4, 0.6], 0.45, every=10) == 20
    assert steps_to([0.1, 0.2], 0.45, every=10) is None


def test_no_emoji_is_both_trained_on_and_tested_on(patches: Pictures) -> None:
    world = emoji_classes.make_world(patches, steps=1, noise=0.5, seed=0)
    kinds = [{p.numpy().tobytes() for p in x} for x in (world.x, world.trusted[0], world.test[0])]
    places = {p.numpy().tobytes(): int(e) for p, e in zip(patches.pixels, patches.emoji, strict=True)}
    emoji = [{places[p] for p in each} for each in kinds]
    assert [len(each) for each in emoji] == [60, 12, 18]
    assert len(set.union(*emoji)) == 90
    assert [len(each) for each in kinds] == [120, 24, 36]
    assert torch.equal(world.given != world.right, world.is_wrong)
    assert int(world.is_wrong.sum()) == 60
    assert [rows.sort().values.tolist() for rows in emoji_classes.in_epochs(50, 2)] == [list(range(50))] * 2
    assert len(torch.cat(emoji_classes.in_epochs(128, 3)[:2]).unique()) == 128


def test_pairs_are_mismatched_as_they_say(patches: Pictures) -> None:
    pairs = clip.make_pairs(patches, steps=1, seed=0)
    emoji = {p.numpy().tobytes(): int(e) for p, e in zip(patches.pixels, patches.emoji, strict=True)}
    colours = torch.tensor([emoji[p.numpy().tobytes()] % 3 for p in pairs.images])
    said = [{tuple(t.tolist()) for t in pairs.texts[~pairs.is_wrong & (colours == c)]} for c in range(3)]
    assert len(pairs.images) == 180
    assert int(pairs.is_wrong.sum()) == 72
    assert [len(texts) for texts in said] == [1, 1, 1]
    assert len(set.union(*said)) == 3
    assert len({tuple(t.tolist()) for t in pairs.texts[pairs.is_wrong & (colours == 0)]}) == 3


def test_scoring_a_clip_leaves_its_training_as_it_is(patches: Pictures) -> None:
    pairs = clip.make_pairs(patches, steps=10, seed=0)
    data = (pairs.images, pairs.texts)
    plain = clip.train(copy.deepcopy(pairs.start), data, pairs.batches, clip.alike, pairs.held_out)
    reference = copy.deepcopy(pairs.start)
    clip.train(reference, pairs.trusted, pairs.trusted_batches, clip.alike)
    curve, observed, share = clip.weighed(pairs, reference, clip.LAYERS, mode="observe")
    assert (curve, share) == (plain, 1.0)
    found = clip.identified(pairs, observed)
    assert found["auroc"]["the reference's loss (control)"] > 0.55  # a third of the wrong texts have the colour, too
    assert clip.weighed(pairs, reference, clip.IMAGE_HEAD, mode="filter", keep=0.5)[2] == pytest.approx(0.5)


def test_the_loss_of_clip_is_that_of_transformers(patches: Pictures) -> None:
    pairs = clip.make_pairs(patches, steps=1, seed=0)
    rows = pairs.batches[0]
    images, texts = pairs.images[rows], pairs.texts[rows]
    own, theirs = clip.clip_losses(pairs.start, images, texts), Contrastive().forward(pairs.start, (images, texts))
    torch.testing.assert_close(own, theirs.losses)
    image, text = pairs.start(images, texts)
    loss = image_text_contrastive_loss(pairs.start.logit_scale.exp() * text @ image.T)
    ours, expected = (torch.autograd.grad(x, list(pairs.start.parameters())) for x in (own.mean(), loss))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)
