"""Classification and regression."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import assay
from assay.methods import Ensemble
from assay.probe import SqNorm
from assay.tasks import Classification, Margin, Regression, Sampled
from assay.tasks.base import take_samples
from tests.tasks.models import Fixed


@pytest.mark.parametrize("wrap", [lambda z: z, lambda z: SimpleNamespace(logits=z)])
def test_classification(wrap: Any) -> None:
    logits, y = torch.randn(4, 3), torch.tensor([0, 2, 1, 1], dtype=torch.int32)
    task = Classification()
    outputs = task.forward(Fixed(wrap(logits)), (torch.zeros(4, 1), y))
    torch.testing.assert_close(outputs.losses, F.cross_entropy(logits, y.long(), reduction="none"))
    assert outputs.logits is logits
    assert outputs.rows is None
    assert task.size((torch.zeros(4, 1), y)) == 4


def test_classification_of_keyword_inputs_has_a_mask() -> None:
    x = {"input_ids": torch.zeros(2, 3).long(), "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}
    model = Fixed(torch.zeros(2, 2))
    Classification().forward(model, (x, torch.tensor([0, 1])))
    assert set(model.called) == {"input_ids", "attention_mask"}
    mask = Classification().mask((x, torch.tensor([0, 1])))
    assert mask is not None
    assert mask.tolist() == [[True, True, False], [True, True, True]]


@pytest.mark.parametrize("label", [3, -1, -100])
def test_labels_outside_the_classes_are_an_error(label: int) -> None:
    with pytest.raises(ValueError, match=rf"label {label} lies outside \[0, 3\)"):
        Classification().forward(Fixed(torch.zeros(2, 3)), (torch.zeros(2, 1), torch.tensor([0, label])))


def test_classification_errors_say_what_was_found() -> None:
    task, x = Classification(), torch.zeros(2, 1)
    with pytest.raises(ValueError, match=r"\(2, 5, 3\) and labels of shape \(2,\)"):
        task.forward(Fixed(torch.zeros(2, 5, 3)), (x, torch.zeros(2).long()))
    with pytest.raises(TypeError, match=r"float32; expected integer"):
        task.forward(Fixed(torch.zeros(2, 3)), (x, torch.zeros(2)))
    with pytest.raises(TypeError, match=r"pair \(x, y\), got a dict with keys \['x'\]"):
        task.size({"x": x})
    with pytest.raises(TypeError, match="returned a SimpleNamespace"):
        task.forward(Fixed(SimpleNamespace()), (x, torch.zeros(2).long()))


@pytest.mark.parametrize("shape", [(4,), (4, 2), (4, 2, 3)])
def test_regression_is_the_mean_of_squares(shape: tuple[int, ...]) -> None:
    prediction, y = torch.randn(shape), torch.randn(shape)
    outputs = Regression().forward(Fixed(prediction), (torch.zeros(4, 1), y))
    expected = torch.stack([F.mse_loss(p, t) for p, t in zip(prediction, y, strict=True)])
    torch.testing.assert_close(outputs.losses, expected)
    assert outputs.logits is None


def test_regression_never_broadcasts() -> None:
    with pytest.raises(ValueError, match=r"\(4, 1\) and target of shape \(4,\)"):
        Regression().forward(Fixed(torch.zeros(4, 1)), (torch.zeros(4, 1), torch.zeros(4)))


def _distributions(rows: int, classes: int) -> torch.Tensor:
    return torch.randn(rows, classes, generator=torch.Generator().manual_seed(5)).softmax(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_soft_labels_have_the_cross_entropy_of_torch(dtype: torch.dtype) -> None:
    logits, y = torch.randn(4, 3), _distributions(4, 3).to(dtype)
    y[1] = torch.tensor([0.0, 1.0, 0.0])
    outputs = Classification(soft=True).forward(Fixed(logits), (torch.zeros(4, 1), y))
    expected = F.cross_entropy(logits, y.float(), reduction="none")
    torch.testing.assert_close(outputs.losses, expected)
    assert outputs.labels is None
    assert outputs.losses[1] == pytest.approx(float(F.cross_entropy(logits[1:2], torch.tensor([1]))), rel=1e-6)


def test_a_class_of_probability_zero_adds_nothing_even_where_it_is_impossible() -> None:
    logits = torch.tensor([[0.0, 1.0, -torch.inf]], requires_grad=True)
    losses = Classification().forward(Fixed(logits), (torch.zeros(1, 1), torch.tensor([[0.25, 0.75, 0.0]]))).losses
    losses.sum().backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, logits.detach().softmax(1) - torch.tensor([[0.25, 0.75, 0.0]]))


@pytest.mark.parametrize(
    ("row", "found"),
    [([0.5, 0.6, -0.1], "value is -0.1, its sum 1;"), ([0.5, 0.5, 0.01], "sum 1.01;"), ([0.5, 0.5, math.nan], "nan")],
)
def test_soft_labels_that_are_no_distribution_are_an_error(row: list[float], found: str) -> None:
    y = torch.tensor([[1.0, 0.0, 0.0], row])
    with pytest.raises(ValueError, match=f"soft label of row 1: .*{found}"):
        Classification().forward(Fixed(torch.zeros(2, 3)), (torch.zeros(2, 1), y))


def test_soft_labels_need_a_column_per_class() -> None:
    with pytest.raises(ValueError, match=r"logits of shape \(2, 3\) and labels of shape \(2, 2\)"):
        Classification().forward(Fixed(torch.zeros(2, 3)), (torch.zeros(2, 1), torch.full((2, 2), 0.5)))


def test_gradients_of_soft_labels_are_autograds() -> None:
    torch.manual_seed(0)
    model, x, y = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), torch.randn(6, 5), _distributions(6, 3)
    parameters = dict(model.named_parameters())
    with assay.Probe(model, Classification(soft=True), reductions={"square": SqNorm(list(parameters))}) as probe:
        signals = probe((x, y))
    losses = F.cross_entropy(model(x), y, reduction="none")
    torch.testing.assert_close(signals.losses, losses.detach())
    for i, loss in enumerate(losses):
        gradients = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True)
        expected = sum(float(g.square().sum()) for g in gradients)
        assert float(signals.reduced["square"][i]) == pytest.approx(expected, rel=1e-5)


def test_labels_are_drawn_for_soft_ones_too() -> None:
    torch.manual_seed(0)
    model, x, y = nn.Linear(5, 3), torch.randn(6, 5), _distributions(6, 3)
    drawn = Sampled(Classification(soft=True), seed=3).forward(model, (x, y))
    hard = Sampled(Classification(), seed=3).forward(model, (x, torch.zeros(6, dtype=torch.int64)))
    assert drawn.labels is not None
    assert torch.equal(drawn.losses, hard.losses)


@pytest.mark.parametrize("make", [lambda task: Ensemble([nn.Linear(2, 2)], task), Margin])
def test_what_needs_one_class_refuses_soft_labels_at_once(make: Any) -> None:
    with pytest.raises(ValueError, match=r"one class per sample, and the task's labels are probabilities \(soft\)"):
        make(Classification(soft=True))


def test_an_ensemble_never_takes_the_likeliest_class_of_a_soft_label() -> None:
    method = Ensemble([nn.Linear(2, 2)], Classification())  # that has not been told
    with pytest.raises(ValueError, match="gives no logits and labels under Classification"):
        assay.score([(torch.zeros(3, 2), _distributions(3, 2))], [method])


def test_regression_gives_its_prediction_and_target() -> None:
    prediction, y = torch.randn(4, 2), torch.randn(4, 2, dtype=torch.float64)
    outputs = Regression().forward(Fixed(prediction), (torch.zeros(4, 1), y))
    assert outputs.prediction is not None
    assert torch.equal(outputs.prediction, prediction)
    assert outputs.target is not None
    assert outputs.target.dtype == torch.float32


def test_regression_of_keyword_inputs_has_a_mask() -> None:
    x = {"input_ids": torch.zeros(2, 3).long(), "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}
    mask = Regression().mask((x, torch.zeros(2)))
    assert mask is not None
    assert mask.tolist() == [[True, True, False], [True, True, True]]


def test_a_named_tuple_keeps_its_names() -> None:
    class Pair(NamedTuple):
        a: Tensor
        b: Tensor

    batch = (Pair(torch.ones(3, 2), torch.zeros(3, 2)), torch.tensor([0, 1, 0]))
    for x, y in (Classification().to(batch, torch.device("cpu")), take_samples(batch, 3, [0, 1])):
        assert x.a.shape == x.b.shape == (len(y), 2)
