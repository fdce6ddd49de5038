"""Language models: which tokens count, and what is not copied."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.tasks import CausalLM
from tests.tasks.models import Bigram, Fixed


def token_losses(model: nn.Module, ids: list[int]) -> Tensor:
    return F.cross_entropy(model(torch.tensor([ids[:-1]]))[0], torch.tensor(ids[1:]), reduction="none")


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_causal_lm_reduces_over_predicted_tokens(reduction: Any) -> None:
    model = Bigram()
    batch = {
        "input_ids": torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]]),
        "attention_mask": torch.tensor([[1] * 4, [1, 1, 0, 0]]),
    }
    outputs = CausalLM(reduction).forward(model, batch)
    reduce = getattr(torch, reduction)
    expected = torch.stack([reduce(token_losses(model, [1, 2, 3, 4])), reduce(token_losses(model, [5, 6]))])
    torch.testing.assert_close(outputs.losses, expected)
    assert outputs.labels.tolist() == [2, 3, 4, -100, 6, -100, -100, -100]
    assert outputs.rows.tolist() == [0] * 4 + [1] * 4


def test_causal_lm_does_not_copy_the_logits() -> None:
    logits = torch.randn(2, 3, 7)
    outputs = CausalLM().forward(Fixed(SimpleNamespace(logits=logits)), {"input_ids": torch.zeros(2, 3).long()})
    assert outputs.logits.data_ptr() == logits.data_ptr()
    assert outputs.logits.shape == (6, 7)


def test_given_labels_choose_what_is_predicted() -> None:
    """A prompt is not trained on; the token after it is, from the prompt's last position."""
    batch = {"input_ids": torch.tensor([[1, 2, 3, 4]]), "labels": torch.tensor([[-100, -100, 3, 5]])}
    outputs = CausalLM().forward(Bigram(), batch)
    assert outputs.labels.tolist() == [-100, 3, 5, -100]
    expected = F.cross_entropy(Bigram()(torch.tensor([[2, 3]]))[0], torch.tensor([3, 5]))
    torch.testing.assert_close(outputs.losses, expected[None])


def test_padding_on_the_left_needs_positions() -> None:
    batch = {"input_ids": torch.tensor([[0, 0, 5, 6, 1]]), "attention_mask": torch.tensor([[0, 0, 1, 1, 1]])}
    with pytest.raises(ValueError, match=r"pad on the right, or put position_ids"):
        CausalLM().forward(Bigram(), batch)
    model = Fixed(torch.randn(1, 5, 7))
    outputs = CausalLM().forward(model, {**batch, "position_ids": torch.tensor([[0, 0, 0, 1, 2]])})
    assert outputs.labels.tolist() == [-100, -100, 6, 1, -100]  # the padding does not predict the first token
    assert model.called["use_cache"] is False
    assert set(model.called) == {"input_ids", "attention_mask", "position_ids", "use_cache"}


def test_texts_with_nothing_to_predict_are_nan_and_harm_nobody() -> None:
    model = Bigram()
    batch = {
        "input_ids": torch.tensor([[1, 2], [3, 0], [0, 0]]),
        "attention_mask": torch.tensor([[1, 1], [1, 0], [0, 0]]),
    }
    outputs = CausalLM().forward(model, batch)
    assert outputs.losses.isnan().tolist() == [False, True, True]
    (gradient,) = torch.autograd.grad(outputs.losses.sum(), model.table.weight)
    assert gradient.isfinite().all()
    assert gradient[[0, 3]].eq(0).all()


def test_causal_lm_errors_say_what_was_found() -> None:
    task, ids = CausalLM(), torch.tensor([[1, 2, 9]])
    with pytest.raises(ValueError, match=r"label 9 lies outside \[0, 7\) or -100"):
        task.forward(Fixed(torch.zeros(1, 3, 7)), {"input_ids": ids})
    with pytest.raises(ValueError, match=r"logits of shape \(1, 2, 7\) for input_ids of shape \(1, 3\)"):
        task.forward(Fixed(torch.zeros(1, 2, 7)), {"input_ids": ids})
    with pytest.raises(ValueError, match=r"attention_mask of shape \(1, 1, 3, 3\)"):
        task.mask({"input_ids": ids, "attention_mask": torch.ones(1, 1, 3, 3)})
    with pytest.raises(ValueError, match=r"labels of shape \(1, 2\)"):
        task.forward(Fixed(torch.zeros(1, 3, 7)), {"input_ids": ids, "labels": ids[:, 1:]})
    with pytest.raises(ValueError, match=r"input_ids of shape \(3,\)"):
        task.size({"input_ids": ids[0]})
    with pytest.raises(TypeError, match="'input_ids', got a tuple of 2"):
        task.size((ids, ids))
    with pytest.raises(ValueError, match="reduction 'max'"):
        CausalLM("max")  # type: ignore[arg-type]
