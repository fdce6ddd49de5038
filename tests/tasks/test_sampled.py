"""Labels drawn from the model's own distribution."""

from __future__ import annotations

import pytest
import torch

from assay.tasks import CausalLM, Classification, Regression, Sampled
from tests.tasks.models import Bigram, Fixed


def test_drawn_labels_go_where_the_task_puts_them() -> None:
    """Position t of a language model has the token at t + 1 for its label, which only the task knows."""
    batch = {
        "input_ids": torch.randint(7, (3, 5)),
        "attention_mask": torch.tensor([[1] * 5, [1] * 3 + [0] * 2, [1] * 5]),
    }
    task, model = CausalLM(), Bigram()
    own = task.forward(model, batch)
    assert own.labels is not None
    again = task.forward(model, task.relabelled(batch, own.labels))
    assert torch.equal(again.labels, own.labels)
    assert torch.equal(again.losses, own.losses)
    drawn = Sampled(task, seed=3).forward(model, batch)
    assert torch.equal(drawn.labels == -100, own.labels == -100)
    assert torch.equal(drawn.losses, Sampled(task, seed=3).unfused().forward(model, batch).losses)
    x, y = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    assert Classification().relabelled((x, y), y.flip(0))[1].tolist() == [1, 1, 2, 0]
    with pytest.raises(ValueError, match="Regression has no distribution of labels"):
        Sampled(Regression()).forward(Fixed(x), (x, x))
