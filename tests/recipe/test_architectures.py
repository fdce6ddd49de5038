"""Models of many architectures, saved by transformers and loaded by a recipe: losses and gradients as transformers'."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import assay
from assay import Probe
from assay.methods import GradMimic
from assay.ops import Sparse, project
from assay.probe import Sketched
from assay.recipe.models import TransformersSpec
from assay.tasks import CausalLM, Classification, Contrastive, Task, TokenClassification
from assay.tasks.base import unfused
from assay.train import Reweighter
from tests.small_architectures import TOKENS, save

CAUSAL, SEQUENCE = "AutoModelForCausalLM", "AutoModelForSequenceClassification"
IMAGE, CLIP = "AutoModelForImageClassification", "AutoModel"
LABELS = torch.tensor([2, 0, 1])


def texts() -> dict[str, Tensor]:
    """Three texts of 9, 5 and 7 tokens, each ending in <eos>."""
    ids, mask = torch.zeros(3, 9, dtype=torch.int64), torch.zeros(3, 9, dtype=torch.int64)
    for i, length in enumerate((9, 5, 7)):
        ids[i, :length], mask[i, :length] = torch.randint(3, TOKENS - 1, (length,)), 1
        ids[i, length - 1] = 2
    return {"input_ids": ids, "attention_mask": mask}


def pairs_of_texts() -> dict[str, Tensor]:
    """The same with a second part from the third token on."""
    batch = texts()
    second = batch["attention_mask"].clone()
    second[:, :2] = 0
    return batch | {"token_type_ids": second}


def images() -> Tensor:
    return torch.randn(3, 3, 16, 16)


def own_texts(batch: dict[str, Tensor], i: int) -> dict[str, Tensor]:
    """One text without its padding."""
    return {name: values[i : i + 1, : int(batch["attention_mask"][i].sum())] for name, values in batch.items()}


def causal_losses(model: Any, batch: Any) -> list[Tensor]:
    alone = [own_texts(batch, i) for i in range(3)]
    return [model(**one, labels=one["input_ids"]).loss for one in alone]


def text_losses(model: Any, batch: Any) -> list[Tensor]:
    return [model(**own_texts(batch[0], i), labels=batch[1][i : i + 1]).loss for i in range(3)]


def tokens() -> dict[str, Tensor]:
    """Texts with a class for each token but their last."""
    batch = texts()
    labels = torch.randint(0, 3, (3, 9)).masked_fill(batch["attention_mask"] == 0, -100)
    return batch | {"labels": labels.masked_fill(batch["input_ids"] == 2, -100)}


def token_losses(model: Any, batch: Any) -> list[Tensor]:
    return [model(**own_texts(batch, i)).loss for i in range(3)]


def image_losses(model: Any, batch: Any) -> list[Tensor]:
    images, labels = batch[0]["pixel_values"], batch[1]
    return [model(pixel_values=images[i : i + 1], labels=labels[i : i + 1]).loss for i in range(3)]


def pair_losses(model: Any, batch: Any) -> list[Tensor]:
    """Of a group of pairs, each with the others' embeddings held fixed; their mean is transformers' own loss."""
    output = model(pixel_values=batch[0], **batch[1])
    image, text, scale = output.image_embeds, output.text_embeds, model.logit_scale.exp()
    own = []
    for i in range(3):
        others = torch.arange(3) != i
        texts = torch.where(others[:, None], text.detach(), text)
        pictures = torch.where(others[:, None], image.detach(), image)
        rows, columns = scale * image[i] @ texts.T, scale * text[i] @ pictures.T
        label = torch.tensor(i)
        own.append((nn.functional.cross_entropy(rows, label) + nn.functional.cross_entropy(columns, label)) / 2)
    theirs = model(pixel_values=batch[0], **batch[1], return_loss=True).loss
    torch.testing.assert_close(torch.stack(own).mean(), theirs, rtol=1e-5, atol=1e-5)
    return own


@dataclass(frozen=True)
class Kind:
    auto_class: str
    task: Task
    batch: Callable[[], Any]
    losses: Callable[[Any, Any], list[Tensor]]


KINDS = {
    "causal": Kind(CAUSAL, CausalLM(), texts, causal_losses),
    "text": Kind(SEQUENCE, Classification(), lambda: (texts(), LABELS), text_losses),
    "two texts": Kind(SEQUENCE, Classification(), lambda: (pairs_of_texts(), LABELS), text_losses),
    "tokens": Kind("AutoModelForTokenClassification", TokenClassification(), tokens, token_losses),
    "image": Kind(IMAGE, Classification(), lambda: ({"pixel_values": images()}, LABELS), image_losses),
    "pairs": Kind(CLIP, Contrastive(), lambda: (images(), texts()), pair_losses),
}
CASES = [
    *((name, "causal") for name in ("gpt2", "llama", "qwen2", "gemma2")),
    *((name, "text") for name in ("bert", "distilbert", "gpt2", "llama", "gemma2", "t5")),
    ("bert", "two texts"),
    *((name, "tokens") for name in ("bert", "distilbert", "t5")),
    *((name, "image") for name in ("vit", "resnet")),
    ("clip", "pairs"),
]


@dataclass(frozen=True)
class Case:
    kind: Kind
    batch: Any
    model: nn.Module
    reference: nn.Module
    theirs: list[Tensor]


@pytest.fixture(scope="module", params=CASES, ids=["-".join(case) for case in CASES])
def case(request, tmp_path_factory) -> Case:
    name, kind = request.param[0], KINDS[request.param[1]]
    root = tmp_path_factory.mktemp(name)
    options = {"num_labels": 3} if "Classification" in kind.auto_class else {}
    saved = [save(root / str(seed), name, kind.auto_class, seed, **options) for seed in (0, 1)]
    loaded = [
        TransformersSpec(kind="transformers", path=str(root / str(seed))).build_for(kind.auto_class) for seed in (0, 1)
    ]
    torch.manual_seed(0)
    batch = kind.batch()
    return Case(kind, batch, *loaded, kind.losses(saved[0], batch))


def gradients(case: Case) -> list[dict[str, Tensor]]:
    """Each sample's gradient by autograd, of transformers' own loss."""
    named = dict(case.model.named_parameters())
    losses = case.kind.losses(case.model, case.batch)
    found = [torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True) for loss in losses]
    return [
        {name: g if g is not None else torch.zeros_like(p) for (name, p), g in zip(named.items(), grads, strict=True)}
        for grads in found
    ]


def test_losses_are_transformers_own(case):
    with Probe(case.model, case.kind.task, factors=()) as probe:
        own = probe(case.batch).losses
    torch.testing.assert_close(own, torch.stack(case.theirs).detach(), rtol=1e-5, atol=1e-5)


def test_mimic_and_sketches_are_those_of_autograd(case):
    by_sample = gradients(case)
    steps = {
        name: p.detach() - case.model.get_parameter(name).detach() for name, p in case.reference.named_parameters()
    }
    norm = torch.stack([step.square().sum() for step in steps.values()]).sum().sqrt()
    dots = torch.stack([sum((g[name] * step).sum() for name, step in steps.items()) for g in by_sample])
    table = assay.score([case.batch], [GradMimic(case.model, case.reference, case.kind.task)])
    mimic = torch.tensor(table["mimic"].to_pylist())
    torch.testing.assert_close(mimic, -dots / norm, rtol=1e-4, atol=1e-5 * float(dots.abs().max() / norm))

    shapes = {name: tuple(p.shape) for name, p in case.model.named_parameters()}
    sketch = Sparse(256)
    features = torch.stack(
        [sum(project(g[name].reshape(1, -1), sketch.named(name))[0] for name in shapes) for g in by_sample]
    )
    with Probe(
        case.model, case.kind.task, factors=(), reductions={"sketch": Sketched(shapes, sketch, together=True)}
    ) as probe:
        own = probe(case.batch).reduced["sketch"]
    scale = float((features @ features.T).abs().max())
    torch.testing.assert_close(own @ own.T, features @ features.T, rtol=1e-4, atol=1e-5 * scale)


# What a trainer's step cannot weigh, which its error says: a bias table whose length is a multiple of the batch's (a
# probe would run again to tell), and what the loss takes behind the model's back.
UNWEIGHED = {"T5ForSequenceClassification": "*bias", "T5ForTokenClassification": "*bias", "CLIPModel": "logit_scale"}


def test_weights_in_a_training_step_are_those_of_autograd(case):
    model, task = copy.deepcopy(case.model), unfused(case.kind.task)
    left_out = UNWEIGHED.get(type(model).__name__)
    by_sample, layers = gradients(case), None if left_out is None else ["*", f"!{left_out}"]
    method = GradMimic(model, case.reference, task, layers)
    scale = float(torch.tensor(assay.score([case.batch], [method])["mimic"].to_pylist()).std())
    reweighter = Reweighter(model, method, temperature=scale, layers=layers)
    reweighter.backward(task.forward(model, case.batch).losses)
    assert float(reweighter.weights.std()) > 0.3
    largest = max(float(g.abs().max()) for grads in by_sample for g in grads.values())
    for name, parameter in model.named_parameters():
        weights = reweighter.weights if name in reweighter.tapped else torch.ones(3)
        expected = sum(w * g[name] for w, g in zip(weights, by_sample, strict=True)) / 3
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        own = max(float(g[name].abs().max()) for g in by_sample)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * max(own, 1e-3 * largest), msg=name)
