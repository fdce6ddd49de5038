"""The correct-class margin as output function, in place of the loss: what TRAK and DsDm attribute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from assay.tasks.base import IGNORE, OfTask, Outputs, unfused, wide
from assay.tasks.supervised import Regression

# Of a language model's tokens, 1 − p below this is taken for this: it comes from log p, which is exact only to float32.
# Such a token has no gradient.
_LEAST = 1e-6


@dataclass(frozen=True)
class Margin(OfTask):
    """A task whose "losses" are the *negative* margins −f of another task's rows, f = Σ_t log(p_t / (1 − p_t)).

    With p the probability of the label (2303.14186, equation 9, and 2401.12926 for the tokens of a language model,
    summed). Its gradient is that of the row's loss divided by 1 − p. Losses, because lower is better in all of assay.

    Args:
        task: Classification, TokenClassification or CausalLM; each row's loss must be −log p.

    Raises:
        ValueError: the task's labels are probabilities or numbers, so that there is no margin.
    """

    def __post_init__(self) -> None:
        if getattr(self.task, "soft", False):
            raise ValueError("Margin: needs one class per sample, and the task's labels are probabilities (soft)")
        if isinstance(self.task, Regression):
            raise ValueError(self._no_label)

    @property
    def _no_label(self) -> str:
        return (
            f"Margin: {type(self.task).__name__} has no probability of one label per row; use Classification with "
            "classes, TokenClassification or CausalLM"
        )

    def unfused(self) -> Margin:
        return Margin(unfused(self.task))

    def forward(self, model: nn.Module, batch: Any) -> Outputs:
        return self.read(self.task.forward(model, batch))

    def read(self, outputs: Outputs) -> Outputs:
        """The margins of a forward pass of ``task``: it needs no other."""
        nll, labels = outputs.row_losses, outputs.labels
        if nll is None or labels is None:
            raise ValueError(self._no_label)
        if nll.ndim == 1 and outputs.logits is not None:
            return outputs.with_losses(_from_logits(outputs.logits, labels))
        # log p − log(1 − p), from nll = −log p: the logits have not been made
        other = -torch.expm1(-nll.clamp(min=_LEAST))
        nothing = labels.view(nll.shape) == IGNORE
        negative = torch.where(nothing, 0.0, nll + other.log())
        if negative.ndim > 1:
            negative, nothing = negative.sum(1), nothing.all(1)
        return outputs.with_losses(negative.masked_fill(nothing, torch.nan))  # as the task's own loss


def _from_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """log Σ_{c≠y} e^{z_c} − z_y: exact at any confidence."""
    logits, own = wide(logits), labels[:, None]
    rest = logits.scatter(1, own, -torch.inf).logsumexp(1)
    return rest - logits.gather(1, own)[:, 0]
