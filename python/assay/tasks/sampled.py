"""Labels drawn from the model itself: what the Fisher information is an expectation over."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from assay.tasks.base import IGNORE, Outputs, Relabels, Task, unfused


@dataclass(frozen=True)
class Sampled:
    """Another task with every label replaced by a draw from the model's own prediction.

    The second moment of its gradients is the Fisher information, which for cross entropy is the Gauss-Newton matrix;
    with the data's labels it is only the "empirical" Fisher.

    Args:
        task: Classification, TokenClassification or CausalLM; the model runs once more, for its predictions.
        seed: of the draws. Row i of every batch has the same random numbers: give every batch a seed of its own.
        plain: whether the losses of the drawn labels are taken from the model's own logits. The draws are the same.
    """

    task: Task
    seed: int = 0
    plain: bool = False

    def size(self, batch: Any) -> int:
        return self.task.size(batch)

    def to(self, batch: Any, device: torch.device) -> Any:
        return self.task.to(batch, device)

    def mask(self, batch: Any) -> Tensor | None:
        return self.task.mask(batch)

    def unfused(self) -> Sampled:
        return replace(self, plain=True)

    def forward(self, model: nn.Module, batch: Any) -> Outputs:
        predicted = self.task.forward(model, batch)  # with gradients: a probe's taps refuse to run without
        if predicted.logits is None or not isinstance(self.task, Relabels):
            raise ValueError(f"Sampled: {type(self.task).__name__} has no distribution of labels to draw from")
        generator = torch.Generator(predicted.logits.device).manual_seed(self.seed)
        p = predicted.logits.detach().float().softmax(1)
        p = p.where(p.isfinite().all(1, keepdim=True), 1.0)  # multinomial refuses NaN; its loss is NaN under any label
        drawn = torch.multinomial(p, 1, generator=generator)[:, 0]
        if predicted.labels is not None:  # soft labels are none, and every row has one
            drawn = torch.where(predicted.labels == IGNORE, IGNORE, drawn)
        task = unfused(self.task) if self.plain else self.task
        return task.forward(model, self.task.relabelled(batch, drawn))
