"""What a classifier makes of a sample: the same offline and in a trainer, and as its formulas say."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import assay
from assay.methods import Dynamics, GraNd
from assay.methods.dynamics import class_scores
from assay.tasks import CausalLM, Classification, Regression
from assay.train import Reweighter
from assay.train.huggingface import ReweightMixin

TASK = Classification()
CLASS_COLUMNS = ["loss", "probability", "margin", "correct", "el2n"]


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(8, 4), torch.randint(3, (8,))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def test_formulas(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    table = assay.score([batch], [Dynamics(model, TASK)])
    assert table.column_names == ["row", "id", *CLASS_COLUMNS]
    z = model(x).detach().double()
    p, one = z.softmax(1), F.one_hot(y, 3).double()
    own, rival = (z * one).sum(1), z.masked_fill(one.bool(), -torch.inf).amax(1)
    expected = {
        "loss": -(p * one).sum(1).log(),
        "probability": (p * one).sum(1),
        "margin": own - rival,
        "correct": (z.argmax(1) == y).double(),
        "el2n": (p - one).norm(dim=1),
    }
    assert 0 < expected["correct"].sum() < 8
    for name, values in expected.items():
        np.testing.assert_allclose(table[name].to_numpy(), values.numpy(), rtol=1e-5, atol=1e-6, err_msg=name)
    assert table.schema.field("margin").metadata[b"keep"] == b"high"


def test_a_margin_of_logits_does_not_saturate() -> None:
    scores = class_scores(torch.tensor([[100.0, 0, 0], [1000.0, 0, 0]]), torch.tensor([0, 0]))
    assert scores["margin"].tolist() == [100, 1000]
    assert scores["probability"].tolist() == [1, 1]


def test_edges_are_what_they_are_defined_to_be() -> None:
    infinite = -torch.inf
    logits = torch.tensor(
        [[2.0, 2, 0], [2.0, 2, 0], [1.0, infinite, infinite], [infinite, 1.0, 0], [torch.nan, 0, 0], [1.0, 0, 0]]
    )
    scores = class_scores(logits, torch.tensor([0, 1, 0, 0, 1, -100]))
    assert scores["correct"][:4].tolist() == [1, 0, 1, 0]  # of equal ones the first
    assert scores["margin"][:2].tolist() == [0, 0]
    assert scores["margin"][2].isnan()  # nobody else to be compared with
    assert scores["margin"][3] == infinite
    assert scores["probability"][2:4].tolist() == [1, 0]
    for name, values in scores.items():
        assert values[4:].isnan().all(), name
    assert class_scores(torch.ones(1, 1), torch.zeros(1, dtype=torch.int64))["margin"].isnan()
    with pytest.raises(IndexError, match="got 3 in row 0"):
        class_scores(torch.zeros(1, 3), torch.tensor([3]))


@pytest.mark.parametrize("task", [CausalLM(), Regression(), Classification(soft=True)])
def test_samples_without_a_class_have_a_loss_alone(model: nn.Module, task: assay.tasks.Task) -> None:
    method = Dynamics(model, task, name="late")
    assert [column.name for column in method.columns] == ["late_loss"]
    assert not method.needs()["model"].logits


def test_in_a_trainer_as_offline(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    reweighter = Reweighter(model, Dynamics(model, TASK), mode="observe")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    expected = []
    for _ in range(2):
        expected.append(assay.score([batch], [Dynamics(model, TASK)]))
        optimizer.zero_grad()
        logits = model(x)
        losses = F.cross_entropy(logits, y, reduction="none")
        plain = torch.autograd.grad(losses.mean(), list(model.parameters()), retain_graph=True)
        reweighter.backward(losses, range(8), logits=logits, labels=y)
        for found, gradient in zip(model.parameters(), plain, strict=True):
            torch.testing.assert_close(found.grad, gradient)
        optimizer.step()
    table = reweighter.table()
    assert table.column_names == ["id", "step", *CLASS_COLUMNS, "weight"]
    assert table["step"].to_pylist() == [1] * 8 + [2] * 8
    for name in CLASS_COLUMNS:
        values = np.concatenate([own[name].to_numpy() for own in expected])
        np.testing.assert_allclose(table[name].to_numpy(), values, rtol=1e-5, atol=1e-6, err_msg=name)
        assert table.schema.field(name).metadata[b"keep"] in (b"high", b"none")


def test_what_a_loop_forgot_is_named(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    reweighter = Reweighter(model, Dynamics(model, TASK), mode="observe")
    with pytest.raises(ValueError, match=r"no logits and labels.*logits=logits, labels=labels"):
        reweighter.backward(F.cross_entropy(model(x), y, reduction="none"))
    logits = model(x)
    losses = F.cross_entropy(logits, y, reduction="none")
    with pytest.raises(ValueError, match=r"logits: expected one per sample, \(8, C\), found shape \(4, 3\)"):
        reweighter.backward(losses, logits=logits[:4], labels=y[:4])


def test_beside_another_method_it_needs_a_name(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(ValueError, match="loss"):
        assay.score([batch], [GraNd(model, TASK), Dynamics(model, TASK)])
    table = assay.score([batch], [GraNd(model, TASK), Dynamics(model, TASK, name="now")])
    assert table["loss"] == table["now_loss"]


class Labelled(nn.Module):
    """A classifier as transformers' Trainer wants it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.net(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class MyTrainer(ReweightMixin, Trainer):
    pass


def test_in_the_trainer_of_transformers(model: nn.Module, batch: tuple[Tensor, Tensor], tmp_path) -> None:
    x, y = batch
    data = datasets.Dataset.from_dict({"id": [f"s{i}" for i in range(8)], "x": x.tolist(), "labels": y.tolist()})
    expected = assay.score([batch], [Dynamics(model, TASK)], ids=data["id"])
    whole = Labelled(model)
    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=8, max_steps=2, report_to="none", use_cpu=True, save_strategy="no",
        remove_unused_columns=False,
    )  # fmt: skip
    reweighter = Reweighter(whole, Dynamics(whole, TASK), mode="observe")
    MyTrainer(whole, arguments, train_dataset=data, reweighter=reweighter).train()
    table = reweighter.table()
    assert table.num_rows == 16
    first = table.slice(0, 8).sort_by("id")
    assert first["id"].to_pylist() == expected["id"].to_pylist()
    for name in CLASS_COLUMNS:
        np.testing.assert_allclose(first[name].to_numpy(), expected[name].to_numpy(), rtol=1e-5, atol=1e-6)
