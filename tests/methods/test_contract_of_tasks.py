"""The methods' contract under the tasks that are not its two own worlds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from assay.methods import GradMimic
from assay.tasks import Classification, Regression, TokenClassification
from tests.methods import contract
from tests.methods.contract import BROKEN, SAMPLES, World


class Tagger(nn.Module):
    """Every token sees the whole of its text, and nothing of the padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 6), nn.Linear(6, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.embed(input_ids) * attention_mask[:, :, None]
        out: Tensor = self.head((hidden + hidden.sum(1, keepdim=True)).tanh())
        return out


def soft_labels() -> World:
    world, generator = contract.classification(), torch.Generator().manual_seed(9)
    p = torch.randn(SAMPLES, 3, generator=generator).softmax(1)
    samples = [(x, own) for (x, _), own in zip(world.samples, p, strict=True)]
    return replace(world, task=Classification(soft=True), samples=samples, broken=(contract.NOTHING, p[BROKEN]))


def regression() -> World:
    world, generator = contract.classification(), torch.Generator().manual_seed(9)
    y = torch.randn(SAMPLES, 3, generator=generator)
    samples = [(x, own) for (x, _), own in zip(world.samples, y, strict=True)]
    return replace(world, task=Regression(), samples=samples, broken=(contract.NOTHING, y[BROKEN]))


def tags() -> World:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(2, 9, (SAMPLES,), generator=generator).tolist()
    samples = [tuple(torch.randint(n, (length,), generator=generator) for n in (11, 3)) for length in lengths]

    def collate(samples: Sequence[Any]) -> dict[str, Tensor]:
        ids = nn.utils.rnn.pad_sequence([own for own, _ in samples], batch_first=True)
        labels = nn.utils.rnn.pad_sequence([own for _, own in samples], batch_first=True, padding_value=-100)
        mask = torch.arange(ids.shape[1]) < torch.tensor([len(own) for own, _ in samples])[:, None]
        return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}

    broken = (torch.tensor([4]), torch.tensor([-100]))
    return World(TokenClassification(), contract._models(Tagger), samples, collate, broken, predicts=False)


# By world the methods that need a class per row, or a distribution to draw labels from, and say so.
WORLDS: dict[Callable[[], World], tuple[str, ...]] = {
    soft_labels: ("Ensemble", "TRAK", "DsDm"),
    regression: ("TRAK", "DsDm", "EKFAC"),
    tags: (),
}


def _quick(method: type[Any], make: Callable[[], World]) -> Any:
    quick = method is GradMimic or (method.__name__ == "Ensemble" and make is tags)
    return pytest.param(method, make, marks=() if quick else pytest.mark.slow)


CASES = [
    _quick(method, make)
    for make, refusing in WORLDS.items()
    for method in contract.exported()
    if method.__name__ not in refusing and contract.lives_in(method, "classification")
]


@pytest.mark.parametrize(("method", "make"), CASES)
def test_methods_keep_their_contract(method: type[Any], make: Callable[[], World]) -> None:
    for check in contract.CHECKS:
        check(method, make())


@pytest.mark.parametrize("name", ["Ensemble", "TRAK", "DsDm"])
def test_methods_that_need_a_class_refuse_probabilities_before_anything_runs(name: str) -> None:
    (method,) = (own for own in contract.exported() if own.__name__ == name)
    with pytest.raises(ValueError, match=r"one class per sample, and the task's labels are probabilities \(soft\)"):
        soft_labels().make(method)


def test_methods_that_need_a_class_refuse_regression() -> None:
    methods = {method.__name__: method for method in contract.exported()}
    for name in ("TRAK", "DsDm"):
        with pytest.raises(ValueError, match="Margin: Regression has no probability of one label per row"):
            regression().make(methods[name])
    world = regression()
    with pytest.raises(ValueError, match="Regression has no distribution of labels to draw from"):
        world.make(methods["EKFAC"]).fit(world.pool)
