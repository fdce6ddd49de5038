"""Labels drawn from the model itself: what the Fisher information is an expectation over."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from assay.ops.philox import make_key, philox4x32
from assay.tasks.base import IGNORE, OfTask, Outputs, Relabels, unfused


@dataclass(frozen=True)
class Sampled(OfTask):
    """Another task with every label replaced by a draw from the model's own prediction.

    The second moment of its gradients is the Fisher information, which for cross entropy is the Gauss-Newton matrix;
    with the data's labels it is only the "empirical" Fisher.

    Args:
        task: Classification, TokenClassification or CausalLM; the model runs once more, for its predictions.
        seed: of the draws.
        first: the batch's first sample's place among all. A draw's random number follows from the seed, its sample's
            place and how many predictions its sample has before it: neither batching nor padding changes it.
        plain: whether the losses of the drawn labels are taken from the model's own logits. The draws are the same.
    """

    seed: int = 0
    first: int = 0
    plain: bool = False

    def unfused(self) -> Sampled:
        return replace(self, plain=True)

    def forward(self, model: nn.Module, batch: Any) -> Outputs:
        predicted = self.task.forward(model, batch)  # with gradients: a probe's taps refuse to run without
        if predicted.logits is None or not isinstance(self.task, Relabels):
            raise ValueError(f"Sampled: {type(self.task).__name__} has no distribution of labels to draw from")
        logits = predicted.logits.detach().float()
        labelled = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
        if predicted.labels is not None and predicted.labels.dim() == 1:  # soft labels: every row has one
            labelled = predicted.labels != IGNORE
        owners = torch.arange(len(logits), device=logits.device) if predicted.rows is None else predicted.rows
        draws = _draw(logits[labelled].softmax(1), self._uniform(owners[labelled]))
        drawn = torch.full_like(owners, IGNORE).masked_scatter(labelled, draws)
        task = unfused(self.task) if self.plain else self.task
        return task.forward(model, self.task.relabelled(batch, drawn))

    def _uniform(self, owners: Tensor) -> Tensor:
        """(N,) the sample of every row -> (N,) numbers inside (0, 1)."""
        order = owners.argsort(stable=True)
        counts = owners.bincount()
        place = torch.empty_like(owners)
        place[order] = torch.arange(len(owners), device=owners.device) - (counts.cumsum(0) - counts)[owners[order]]
        sample = owners + self.first
        counter = (place, sample & 0xFFFFFFFF, sample >> 32, torch.zeros_like(place))
        words = philox4x32(counter, make_key(self.seed, "sampled labels"))[:, 0]
        return ((words >> 9).float() + 0.5) / 2**23


def _draw(p: Tensor, uniform: Tensor) -> Tensor:
    """(N, C) probabilities, (N,) -> (N,) labels, by the inverse of the cumulative distribution. Any where p is NaN."""
    cumulative = p.cumsum(1)
    wanted = uniform[:, None] * cumulative[:, -1:]
    # The first that exceeds has a probability above 0; rounding alone can leave none.
    drawn = torch.searchsorted(cumulative, wanted, right=True)[:, 0]
    return drawn.where(drawn < p.shape[1], p.argmax(1))
