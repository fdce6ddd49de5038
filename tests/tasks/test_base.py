"""What every task promises."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

from assay.tasks import CausalLM, Classification, Contrastive, Regression, Sampled, Task


class Fixed(nn.Module):
    """Returns what it is told to, and remembers how it was called."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output, self.called = output, {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.called = kwargs
        return self.output


def test_every_task_satisfies_the_protocol() -> None:
    for task in (Classification(), CausalLM(), Regression(), Contrastive()):
        assert isinstance(task, Task)


def test_nothing_here_imports_transformers() -> None:
    code = "import sys, assay.tasks, assay.probe; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_batches_are_moved_and_detached() -> None:
    x = torch.zeros(2, 1, requires_grad=True)
    moved = Classification().to(({"x": x, "name": "kept"}, torch.tensor([0, 1])), torch.device("meta"))
    assert moved[0]["x"].device.type == "meta"
    assert not moved[0]["x"].requires_grad
    assert moved[0]["name"] == "kept"


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
