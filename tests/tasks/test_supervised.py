"""Classification and regression."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from assay.tasks import Classification, Regression
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
