"""A class per token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import assay
from assay.methods import Ensemble
from assay.probe import SqNorm
from assay.tasks import Margin, Sampled, TokenClassification
from tests.tasks.models import Fixed


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.embed(input_ids) * attention_mask[:, :, None]
        out: Tensor = self.head((self.mix(hidden) + hidden.sum(1, keepdim=True)).tanh())
        return out


def _batch(lengths: tuple[int, ...] = (5, 2, 4)) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    width = max(lengths)
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    labels = torch.randint(3, mask.shape, generator=generator).masked_fill(mask == 0, -100)
    labels[0, 1] = labels[2, 0] = -100  # within a sample, too
    return {
        "input_ids": torch.randint(11, mask.shape, generator=generator) * mask,
        "attention_mask": mask,
        "labels": labels,
    }


def _models(count: int) -> list[nn.Module]:
    torch.manual_seed(0)
    return [Tagger() for _ in range(count)]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_losses_are_those_of_torch_at_each_position_itself(reduction: Any) -> None:
    (model,), batch = _models(1), _batch()
    outputs = TokenClassification(reduction).forward(model, batch)
    logits = model(batch["input_ids"], batch["attention_mask"])
    for i, loss in enumerate(outputs.losses):
        torch.testing.assert_close(loss, F.cross_entropy(logits[i], batch["labels"][i], reduction=reduction))
    assert outputs.rows is not None
    assert outputs.rows.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert outputs.labels is not None
    assert outputs.labels.tolist() == batch["labels"].flatten().tolist()


def test_per_sample_gradients_are_autograds() -> None:
    (model,), batch = _models(1), _batch()
    names = [name for name, _ in model.named_parameters()]
    with assay.Probe(model, TokenClassification(), reductions={"square": SqNorm(names)}) as probe:
        signals = probe(batch)
    losses = TokenClassification().forward(model, batch).losses
    for i, loss in enumerate(losses):
        gradients = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        expected = sum(float(g.square().sum()) for g in gradients)
        assert float(signals.reduced["square"][i]) == pytest.approx(expected, rel=1e-5)


def test_an_ensemble_gives_the_mean_over_a_samples_tokens() -> None:
    models, batch = _models(2), _batch()
    table = assay.score([batch], [Ensemble(models, TokenClassification())])
    p = torch.stack([m(batch["input_ids"], batch["attention_mask"]).detach().softmax(2) for m in models]).mean(0)
    entropy = -(p * p.log()).sum(2)
    for i, labels in enumerate(batch["labels"]):
        own = labels != -100
        nll = -p[i, own].gather(1, labels[own][:, None]).log()
        assert table["ensemble_nll"][i].as_py() == pytest.approx(float(nll.mean()), rel=1e-5)
        assert table["ensemble_entropy"][i].as_py() == pytest.approx(float(entropy[i, own].mean()), rel=1e-5)
    assert "ensemble_prediction" not in table.column_names  # a sample has many


def test_a_sample_without_a_label_is_nan_and_harms_nobody() -> None:
    (model,), batch = _models(1), _batch()
    expected = TokenClassification().forward(model, batch).losses
    batch["labels"][1] = -100
    losses = TokenClassification().forward(model, batch).losses
    assert losses[1].isnan()
    torch.testing.assert_close(losses[[0, 2]], expected[[0, 2]])
    losses[[0, 2]].sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


def test_margins_and_drawn_labels_keep_to_the_labelled_positions() -> None:
    (model,), batch = _models(1), _batch()
    p = model(batch["input_ids"], batch["attention_mask"]).softmax(2)
    own = batch["labels"] != -100
    right = p.gather(2, batch["labels"].clamp(min=0)[:, :, None])[:, :, 0]
    margins = torch.where(own, (right / (1 - right)).log(), 0.0).sum(1)
    losses = Margin(TokenClassification()).forward(model, batch).losses
    torch.testing.assert_close(-losses, margins, rtol=1e-4, atol=1e-5)
    drawn = Sampled(TokenClassification(), seed=1).forward(model, batch)
    assert drawn.labels is not None
    assert torch.equal(drawn.labels.view(own.shape) == -100, ~own)


def test_errors_say_what_was_found() -> None:
    task, batch = TokenClassification(), _batch()
    with pytest.raises(ValueError, match="reduction 'median'"):
        TokenClassification("median")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="tensor 'labels', got a dict with keys \\['input_ids'\\]"):
        task.size({"input_ids": batch["input_ids"]})
    with pytest.raises(ValueError, match=r"logits of shape \(3, 3\) for labels of shape \(3, 5\)"):
        task.forward(Fixed(torch.zeros(3, 3)), batch)
    with pytest.raises(ValueError, match="label 2 lies outside"):
        task.forward(Fixed(torch.zeros(3, 5, 2)), batch)
    with pytest.raises(ValueError, match="a position of the padding has a label"):
        task.forward(Fixed(torch.zeros(3, 5, 3)), batch | {"labels": torch.zeros(3, 5).long()})
    with pytest.raises(TypeError, match="float32; expected integer"):
        task.size(batch | {"labels": torch.zeros(3, 5)})
