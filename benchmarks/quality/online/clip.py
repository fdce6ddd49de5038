"""A small CLIP on the emoji of four vendors and their names and keywords, 40 % of the pairs mismatched.

Two towers: the emoji's small network, and averaged embeddings of words with a layer more; AdamW, a temperature that is
learned. CLIP's loss couples the samples of a batch, so every step that weighs is made of two passes. The first is
scored: its losses are those of `assay.tasks.Contrastive`, where a sample's loss holds the others' embeddings fixed, and
of its gradients only the weights that come of them are kept. The second takes the gradient of CLIP's own loss with
these weights, (1/B) Σ_b w_b (its row's cross-entropy + its column's) / 2, nothing held fixed; a pair of weight 0 still
stands among what the others are told from. The reference is the same start trained on trusted pairs; emoji, with all
their renderings, are either trusted, trained on or held out. Measured: how often the text of a held-out image is found
among those of ``CANDIDATES`` held-out emoji, and how well the mean mimic of the plain run finds the mismatched pairs,
beside the reference's mean loss in the same batches (the control).
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from sklearn.metrics import f1_score, roc_auc_score
from torch import Tensor, nn

from assay._json import dumps
from assay.methods import GradMimic
from assay.tasks import Contrastive
from assay.train import Reweighter
from benchmarks.quality.emoji import make_tokenizer
from benchmarks.quality.online.classification import IDENTIFIERS, mean_scores, show, summary
from benchmarks.quality.online.pictures import Pictures, cnn, parts
from benchmarks.timing import RESULTS, machine

TRUSTED, TRAIN = 0.1, 0.75  # shares of the emoji; of the rest come the candidates
WRONG, CANDIDATES = 0.4, 100
BATCH, EVERY = 128, 10
WIDTH = 64
TASK = Contrastive()
IMAGE_HEAD = "image.10"
LAYERS = ("*", "!logit_scale")  # the temperature is all samples', and no layer's
PLAIN = "AdamW"  # on CLIP's own loss, all weights 1
END = 0  # the token at a text's end, and behind it


class TwoTowers(nn.Module):
    """(B, 3, SIDE, SIDE) and (B, T) ids of words -> (B, WIDTH) and (B, WIDTH), of length 1."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.image = cnn(WIDTH)
        self.words = nn.Embedding(words, WIDTH)
        self.text = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(10.0)))

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        return self.of_images(images), self.of_texts(texts)

    def of_images(self, images: Tensor) -> Tensor:
        return F.normalize(self.image(images))

    def of_texts(self, texts: Tensor) -> Tensor:
        inside = (texts != END).float()[..., None]
        words = (self.words(texts) * inside).sum(1) / inside.sum(1)
        return F.normalize(self.text(words))


@dataclass(frozen=True)
class Pairs:
    """One seed's data and start."""

    images: Tensor
    texts: Tensor  # as given, some of them another emoji's
    is_wrong: Tensor
    trusted: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor, Tensor]  # images, the candidates' texts, and which of them is each image's
    start: TwoTowers
    batches: list[Tensor]
    trusted_batches: list[Tensor]


def make_pairs(pictures: Pictures, steps: int, seed: int) -> Pairs:
    torch.manual_seed(seed)
    trusted, train, rest = parts(pictures, [TRUSTED, TRAIN])
    candidates = rest[:CANDIDATES].sort().values
    own = pictures.of(train)
    is_wrong = torch.zeros(len(own), dtype=torch.bool)
    is_wrong[torch.randperm(len(own))[: int(WRONG * len(own))]] = True
    train = train.sort().values
    place = torch.searchsorted(train, pictures.emoji[own])
    given = torch.where(is_wrong, (place + torch.randint(1, len(train), (len(own),))) % len(train), place)
    tokenizer = make_tokenizer([pictures.texts[i] for i in [*trusted.tolist(), *train.tolist()]])
    assert tokenizer.pad_token_id == END
    tokens = tokenizer(list(pictures.texts), padding=True, truncation=True, return_tensors="pt")["input_ids"]
    sure, held_out = pictures.of(trusted), pictures.of(candidates)
    return Pairs(
        images=pictures.pixels[own],
        texts=tokens[train[given]],
        is_wrong=is_wrong,
        trusted=(pictures.pixels[sure], tokens[pictures.emoji[sure]]),
        held_out=(
            pictures.pixels[held_out],
            tokens[candidates],
            torch.searchsorted(candidates, pictures.emoji[held_out]),
        ),
        start=TwoTowers(len(tokenizer)),
        batches=[torch.randperm(len(own))[:BATCH] for _ in range(steps)],
        trusted_batches=[torch.randperm(len(sure))[:BATCH] for _ in range(steps)],
    )


def retrieved(model: TwoTowers, held_out: tuple[Tensor, Tensor, Tensor]) -> float:
    """The share of the images whose own text is the nearest of all candidates."""
    with torch.no_grad():
        images, texts = model.of_images(held_out[0]), model.of_texts(held_out[1])
        return float(((images @ texts.T).argmax(1) == held_out[2]).float().mean())


def clip_losses(model: TwoTowers, images: Tensor, texts: Tensor) -> Tensor:
    """(B,), whose mean is CLIP's loss, and its gradient CLIP's own."""
    image, text = model.forward(images, texts)  # past a Reweighter's hooks: this pass is not scored
    logits = model.logit_scale.exp() * image @ text.T
    labels = torch.arange(len(logits))
    return (F.cross_entropy(logits, labels, reduction="none") + F.cross_entropy(logits.T, labels, reduction="none")) / 2


Weigh = Callable[[Tensor, Tensor, Tensor], Tensor]


def train(
    model: TwoTowers, data: tuple[Tensor, Tensor], batches: Sequence[Tensor], weigh: Weigh, held_out: Any = None
) -> list[float]:
    """Train on the weighted loss -> the retrieval's accuracies, one every ``EVERY`` steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    found = []
    for step, rows in enumerate(batches, 1):
        images, texts = data[0][rows], data[1][rows]
        weights = weigh(images, texts, rows)
        optimizer.zero_grad()
        (weights * clip_losses(model, images, texts)).mean().backward()
        optimizer.step()
        if held_out is not None and step % EVERY == 0:
            found.append(retrieved(model, held_out))
    return found


def alike(images: Tensor, texts: Tensor, rows: Tensor) -> Tensor:
    return torch.ones(len(rows))


def weighed(
    pairs: Pairs, reference: TwoTowers, layers: str | Sequence[str], **settings: Any
) -> tuple[list[float], Reweighter, float]:
    """Train with weights by mimic -> the accuracies, what scored, and the mean effective share of a batch."""
    model, shares = copy.deepcopy(pairs.start), []
    # The scored pass' gradients are thrown away, so it is enough to reweight those of one layer.
    reweighter = Reweighter(model, GradMimic(model, reference, TASK, layers), layers=IMAGE_HEAD, **settings)

    def weigh(images: Tensor, texts: Tensor, rows: Tensor) -> Tensor:
        with torch.no_grad():
            theirs = TASK.forward(reference, (images, texts)).losses
        reweighter.backward(TASK.forward(model, (images, texts)).losses, rows, reference_losses=theirs)
        assert reweighter.weights is not None
        shares.append(float(1 / reweighter.weights.square().mean()))
        return reweighter.weights

    curve = train(model, (pairs.images, pairs.texts), pairs.batches, weigh, pairs.held_out)
    return curve, reweighter, statistics.fmean(shares)


def one_seed(pairs: Pairs) -> dict[str, Any]:
    reference = copy.deepcopy(pairs.start)
    train(reference, pairs.trusted, pairs.trusted_batches, alike)
    curves, shares = {}, {}
    curves[PLAIN], observed, _ = weighed(pairs, reference, LAYERS, mode="observe")
    for name, layers in (("all layers", LAYERS), ("image head", IMAGE_HEAD)):
        for what, settings in (("weights", {}), ("best half of a batch", {"mode": "filter", "keep": 0.5})):
            arm = f"mimic, {name}, {what}"
            curves[arm], _, shares[arm] = weighed(pairs, reference, layers, **settings)
    right = torch.nonzero(~pairs.is_wrong).flatten()
    batches = [right[torch.randperm(len(right))[:BATCH]] for _ in pairs.batches]
    data = (pairs.images, pairs.texts)
    curves["right pairs alone"] = train(copy.deepcopy(pairs.start), data, batches, alike, pairs.held_out)
    found = {"curves": curves, "effective_share": shares, "every": EVERY}
    return found | identified(pairs, observed) | {"reference": retrieved(reference, pairs.held_out)}


def identified(pairs: Pairs, observed: Reweighter) -> dict[str, Any]:
    """How well the pairs that were seen are told by their mean score: AUROC, and F1 by identifier."""
    journal = observed.table()
    table = mean_scores(journal)
    wrong = pairs.is_wrong[torch.tensor(table["row"].to_numpy())].numpy()
    means = journal.group_by("id").aggregate([("reference_loss", "mean")])
    control = dict(zip(means["id"].to_pylist(), means["reference_loss_mean"].to_pylist(), strict=True))
    losses = [control[i] for i in table["id"].to_pylist()]
    masks = {name: identify(table, WRONG).mask for name, identify in IDENTIFIERS.items()}
    return {
        "auroc": {
            "mimic": float(roc_auc_score(wrong, -table["mimic"].to_numpy())),
            "the reference's loss (control)": float(roc_auc_score(wrong, losses)),
        },
        "f1": {name: float(f1_score(wrong, ~mask)) for name, mask in masks.items()},
    }


def main(pictures: Pictures, quick: bool) -> None:
    seeds, steps = (1, 10) if quick else (5, 150)
    began = time.process_time()
    runs = [one_seed(make_pairs(pictures, steps, seed)) for seed in range(seeds)]
    console = Console()
    show(console, f"small CLIP, {WRONG:.0%} of the pairs mismatched", runs, PLAIN)
    by_seed = {key: {name: [run[key][name] for run in runs] for name in runs[0][key]} for key in ("auroc", "f1")}
    by_seed["effective_share"] = {
        name: [run["effective_share"][name] for run in runs] for name in runs[0]["effective_share"]
    }
    for key in ("auroc", "effective_share"):
        means = ", ".join(f"{name} {statistics.fmean(values):.3f}" for name, values in by_seed[key].items())
        console.print(f"{key}: {means}")
    if not quick:
        found = {**machine(), "steps": steps, "cpu_seconds": time.process_time() - began, "rows": summary(runs, PLAIN)}
        found |= by_seed | {"reference": [run["reference"] for run in runs]}
        (RESULTS / "quality-online-clip.json").write_text(dumps(found, indent=1) + "\n")
