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


def test_a_draw_is_its_samples_own() -> None:
    """Neither the batch that a sample comes in nor its padding changes what is drawn for it."""
    task, model = CausalLM(), Bigram()
    ids = torch.randint(7, (6, 9))
    lengths = [9, 4, 7, 2, 9, 5]
    batches = []
    for first, rows, width in ((0, 6, 9), (0, 2, 9), (2, 2, 7), (4, 2, 9), (3, 1, 2)):
        lengths_here = lengths[first : first + rows]
        mask = torch.tensor([[1] * n + [0] * (width - n) for n in lengths_here])
        batch = {"input_ids": ids[first : first + rows, :width], "attention_mask": mask}
        labels = Sampled(task, seed=5, first=first).forward(model, batch).labels.view(rows, -1)
        batches.append([row[row != -100].tolist() for row in labels])
    whole = batches[0]
    assert [len(row) for row in whole] == [n - 1 for n in lengths]
    assert batches[1] + batches[2] + batches[3] == whole
    assert batches[4] == whole[3:4]
    other = Sampled(task, seed=6).forward(model, {"input_ids": ids}).labels
    assert other.tolist() != Sampled(task, seed=5).forward(model, {"input_ids": ids}).labels.tolist()


def test_draws_follow_the_prediction() -> None:
    """Of 40,000 draws each label's share is within five standard deviations of its probability; none without one."""
    p = torch.tensor([0.0, 0.5, 0.0, 0.2, 0.3, 0.0])
    count = 40_000
    x = p.log().expand(count, -1)
    drawn = Sampled(Classification(), seed=1).forward(Fixed(x), (x, torch.zeros(count, dtype=torch.long))).labels
    share = drawn.bincount(minlength=6) / count
    assert ((share - p).abs() <= 5 * (p * (1 - p) / count).sqrt()).all()
    # Without correlation from one sample to the next.
    pairs = (drawn[1:] == 1) & (drawn[:-1] == 1)
    assert abs(pairs.float().mean() - 0.25) < 5 * (0.25 * 0.75 / count) ** 0.5
