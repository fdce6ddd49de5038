"""What do SAS and SDS of a CLIP find among images, and what is it worth?

::

    python -m benchmarks.quality.clip_powered [--quick] [--packages FOLDER]

The emoji of four vendors with their names and keywords (``benchmarks.quality.emoji``); all renderings of one emoji fall
into the same part. The small CLIP of ``benchmarks.quality.online`` is trained on 45 % of the emoji, all of its pairs
right: it stands for the pretrained one, and no adapter is trained. Three seeds draw everything anew.

- labels: another 35 % are a pool whose labels, emoji's categories, are wrong in 20 %. A class's text is its keywords,
  the mean of theirs. AUROC of the wrong labels by SAS and SDS; and the accuracy on the rest of a small CNN that is
  trained on 30 % of the pool, by the exact optimum of the mask. Beside: features of an untrained CLIP, pixels with
  means of right images for texts, the CLIP's images with such means, its loss on the label, random rows, the pool's
  right labels, all of it.
- pairs: the pool's images with texts, 20 % of them another emoji's. AUROC of these by SAS with the image's own text.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import dataclass
from functools import cache

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor

from assay import select
from assay.methods import sample_diversity, semantic_alignment
from benchmarks.quality.emoji import VENDORS, make_tokenizer
from benchmarks.quality.online.classification import accuracy, mislabelled
from benchmarks.quality.online.clip import BATCH, TwoTowers, alike, train
from benchmarks.quality.online.emoji_classes import in_epochs
from benchmarks.quality.online.pictures import Pictures, cnn, pictures
from benchmarks.quality.online.pictures import parts as divided
from benchmarks.quality.worth import Numbers, Rows, auroc, experiment, of_draws

SEEDS = 3
FOR_CLIP, POOL = 0.45, 0.35  # shares of the emoji; the rest is tested on
WRONG, AMOUNT = 0.2, 0.3
ALPHAS = (0.0, 0.3, 1.0)
CLIP_STEPS, NETWORK_STEPS = 200, 150


@dataclass(frozen=True)
class World:
    """One seed's CLIP and data.

    Attributes:
        known, pool, test: rows of the pictures.
        tokens: (emoji, T), of each one's text.
        keywords: by category, (K, T), of the keywords of its known emoji.
    """

    pictures: Pictures
    known: Tensor
    pool: Tensor
    test: Tensor
    tokens: Tensor
    keywords: list[Tensor]
    untrained: TwoTowers
    clip: TwoTowers


def make_world(given: Pictures, steps: int, seed: int) -> World:
    torch.manual_seed(seed)
    emoji = divided(given, [FOR_CLIP, POOL])
    known, pool, test = (given.of(part) for part in emoji)
    tokenizer = make_tokenizer([given.texts[i] for i in emoji[0].tolist()])

    def tokens(texts: list[str]) -> Tensor:
        found: Tensor = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")["input_ids"]
        return found

    own = tokens(list(given.texts))
    said: dict[int, set[str]] = {}
    for row in known.tolist():
        words = given.texts[int(given.emoji[row])].rpartition(", ")[2]
        said.setdefault(int(given.categories[row]), set()).add(words)
    keywords = [tokens(sorted(said[c])) for c in range(int(given.categories.max()) + 1)]
    untrained = TwoTowers(len(tokenizer))
    clip = copy.deepcopy(untrained)
    batches = [torch.randperm(len(known))[:BATCH] for _ in range(steps)]
    train(clip, (given.pixels[known], own[given.emoji[known]]), batches, alike)
    return World(given, known, pool, test, own, keywords, untrained, clip)


def spaces(world: World) -> dict[str, tuple[Tensor, Tensor]]:
    """By name, features of the pool's images, and of each class: of its text, or what stands for it."""
    pixels, labels = world.pictures.pixels, world.pictures.categories[world.known]

    def means(features: Tensor) -> Tensor:
        """Of the known images of each class."""
        return torch.stack([features[labels == c].mean(0) for c in range(len(world.keywords))])

    def texts(model: TwoTowers) -> Tensor:
        return torch.stack([model.of_texts(words).mean(0) for words in world.keywords])

    with torch.no_grad():
        images = world.clip.of_images(pixels[world.pool])
        return {
            "CLIP": (images, texts(world.clip)),
            "CLIP, means for texts (control)": (images, means(world.clip.of_images(pixels[world.known]))),
            "untrained CLIP (control)": (world.untrained.of_images(pixels[world.pool]), texts(world.untrained)),
            "pixels, means for texts (control)": (pixels[world.pool].flatten(1), means(pixels[world.known].flatten(1))),
        }


def worth(world: World, labels: Tensor, rows: Rows, steps: int, seed: int) -> float:
    """The accuracy of a network trained on some of the pool; each from the same start."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        kept, network = torch.from_numpy(np.flatnonzero(rows)), cnn(len(world.keywords))
        optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.05)
        for batch in in_epochs(len(kept), steps):
            own = kept[batch]
            optimizer.zero_grad()
            F.cross_entropy(network(world.pictures.pixels[world.pool[own]]), labels[own]).backward()
            optimizer.step()
    return accuracy(network, (world.pictures.pixels[world.test], world.pictures.categories[world.test]))


def labels(world: World, steps: int, seed: int) -> Numbers:
    torch.manual_seed(seed)
    right = world.pictures.categories[world.pool]
    labels, wrong = mislabelled(right, len(world.keywords), WRONG)

    def judged(rows: Rows, own: Tensor = labels) -> dict[str, float]:
        wrongs = float((own != right).float().numpy()[rows].mean())
        return {"accuracy": worth(world, own, rows, steps, seed), "wrong": wrongs}

    numbers: dict[str, dict[str, float]] = {}
    for name, (images, texts) in spaces(world).items():
        sas, sds = semantic_alignment(images, labels, texts), sample_diversity(images, labels)
        numbers[name] = {"AUROC of SAS": auroc(wrong, -sas), "AUROC of low SDS": auroc(wrong, -sds)}
        table = pa.table({"sas": sas.numpy(), "sds": sds.numpy()})
        for alpha in ALPHAS if name == "CLIP" else (ALPHAS[1],):
            mask = select.clip_powered(table, "sas", "sds", AMOUNT, alpha=alpha).mask
            numbers[f"{name}, α = {alpha:g}"] = judged(mask)
    images, texts = spaces(world)["CLIP"]
    logits = world.clip.logit_scale.detach().exp() * images @ F.normalize(texts).T
    numbers["CLIP's loss (control)"] = {"AUROC of SAS": auroc(wrong, F.cross_entropy(logits, labels, reduction="none"))}
    numbers["CLIP"]["zero-shot accuracy"] = float((logits.argmax(1) == right).float().mean())
    everything = np.ones(len(labels), bool)
    numbers["random (control)"] = of_draws(lambda own: select.random(table, AMOUNT, own).mask, judged, seed)
    numbers["all (control)"] = judged(everything)
    numbers["random, right labels (control)"] = judged(select.random(table, AMOUNT, seed).mask, right)
    return numbers


def pairs(world: World, seed: int) -> Numbers:
    torch.manual_seed(seed)
    given = world.pictures
    own = given.emoji[world.pool]
    others = own.unique()  # type: ignore[no-untyped-call]
    place, wrong = torch.searchsorted(others, own), torch.rand(len(own)) < WRONG
    said = torch.where(wrong, others[(place + torch.randint(1, len(others), (len(own),))) % len(others)], own)
    numbers: dict[str, dict[str, float]] = {"random (control)": {"AUROC": auroc(wrong, torch.rand(len(own)))}}
    for name, model in (("CLIP", world.clip), ("untrained CLIP (control)", world.untrained)):
        with torch.no_grad():
            images, texts = model.of_images(given.pixels[world.pool]), model.of_texts(world.tokens[said])
        numbers[name] = {"AUROC": auroc(wrong, -semantic_alignment(images, torch.arange(len(own)), texts))}
    return numbers


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.clip_powered")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--packages", metavar="FOLDER")
    options = parser.parse_args()
    given = pictures(options.packages, VENDORS[2:3], every=5) if options.quick else pictures(options.packages)

    @cache
    def world(seed: int) -> World:
        return make_world(given, CLIP_STEPS, seed)

    parts = {
        "labels": (lambda seed: labels(world(seed), NETWORK_STEPS, seed), SEEDS),
        "pairs": (lambda seed: pairs(world(seed), seed), SEEDS),
    }
    experiment("clip-powered", parts, options.quick)


if __name__ == "__main__":
    main()
