"""Training dynamics: what a classifier in training makes of a sample, step by step.

The columns are what trajectories are made of (``assay.train.trajectories``): forgetting (1812.05159), the area under
the margin (2001.10528), data maps (2009.10795), EL2N early in training (2107.07075), clusters of losses (2403.07384).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from assay import ops
from assay.methods.base import Column, Method, Need
from assay.probe import Signals
from assay.tasks import Classification, Task
from assay.tasks.base import wide

LOSS = Column("loss", "none", "the model's loss")
CLASSES = (
    Column("probability", "high", "p_y: the model's probability of the label"),
    Column("margin", "high", "z_y − max_{c≠y} z_c of the logits; below 0 another class wins"),
    Column("correct", "high", "1 where the label is the likeliest class, the first of equal ones; else 0"),
    Column("el2n", "high", "‖p − onehot(y)‖₂; early in training and of right labels, the high end is worth more"),
)


class Dynamics(Method):
    """Loss, probability, margin, correctness and EL2N of each sample, of one model as it is now. No gradients.

    Columns: ``loss``; for classification with one class per sample also ``probability`` = p_y, ``margin`` =
    z_y − max_{c≠y} z_c of the logits (not of probabilities, which saturate; NaN without another class),
    ``correct`` = 1 or 0, and ``el2n`` = ‖p − onehot(y)‖₂. For other tasks a sample has a loss and no class.

    In a trainer, with ``mode="observe"``, they are recorded while the model learns; a classifier's logits and labels
    come along: ``reweighter.backward(losses, ids, logits=logits, labels=labels)``. (``ReweightMixin`` hands them over.)
    Scores over the whole of training are made of the table by ``assay.train.trajectories``.

    Args:
        model: the model in training, or a checkpoint of it.
        task: what a sample and its loss are.
        name: prefix of the columns if it is not ``dynamics``.
    """

    def __init__(self, model: nn.Module, task: Task, *, name: str = "dynamics") -> None:
        self.name = name
        self.model, self.task = model, task
        self._has_classes = isinstance(task, Classification) and not task.soft

    @property
    def columns(self) -> Sequence[Column]:
        found = (LOSS, *CLASSES) if self._has_classes else (LOSS,)
        return [Column(self._named(column.name), column.keep, column.description) for column in found]

    def _named(self, score: str) -> str:
        return score if self.name == "dynamics" else f"{self.name}_{score}"

    def needs(self) -> Mapping[str, Need]:
        return {"model": Need(self.model, self.task, logits=self._has_classes)}

    def score(self, signals: Mapping[str, Signals]) -> dict[str, Tensor]:
        model = signals["model"]
        scores = {"loss": model.losses}
        if self._has_classes:
            logits, labels = self._rows(model)
            scores |= class_scores(logits, labels)
        return {self._named(name): values for name, values in scores.items()}

    def _rows(self, model: Signals) -> tuple[Tensor, Tensor]:
        """The batch's logits and labels, one row per sample."""
        if model.logits is None or model.labels is None:
            raise ValueError(
                f"{self.name}: the batch has no logits and labels, of which all but the loss is made; in a loop of "
                "your own pass them: reweighter.backward(losses, ids, logits=logits, labels=labels) (labels that are "
                "probabilities are none: Classification(soft=True) has the loss alone)"
            )
        return model.logits.detach(), model.labels


def class_scores(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """``probability``, ``margin``, ``correct`` and ``el2n`` of rows of logits.

    Args:
        logits: (B, C), floating; −inf is probability 0.
        labels: (B,) int64 in [0, C).

    Returns:
        (B,) float32 each (float64 of float64 logits); NaN where a logit is NaN or +inf, or the label is −100.

    Raises:
        TypeError, ValueError, IndexError: other shapes or types; a label outside [0, C).
    """
    stats = ops.ensemble_stats([logits], labels, fields=("nll", "agreement", "el2n"))
    assert stats.nll is not None
    assert stats.agreement is not None
    assert stats.el2n is not None
    z, own = wide(logits), labels.clamp(min=0)[:, None]
    rival = z.scatter(1, own, -torch.inf).amax(1)
    margin = z.gather(1, own)[:, 0] - rival
    return {
        "probability": (-stats.nll).exp(),
        "margin": margin.masked_fill(stats.nll.isnan() | rival.isneginf(), torch.nan),
        "correct": stats.agreement,
        "el2n": stats.el2n,
    }
