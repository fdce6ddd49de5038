"""RDS+: embedding similarity with states weighted by their position, 2503.01807."""

from __future__ import annotations

from torch import nn

from assay.methods.embedding_similarity import EmbeddingSimilarity
from assay.methods.targets import Targets
from assay.tasks import Task


class RDSPlus(EmbeddingSimilarity):
    """max over t of cos(e_i, e_t) with e = Σ_p p·h_p / Σ_p p over a sample's positions p = 1, 2, …: keep high.

    h_p are the last hidden states. As ``EmbeddingSimilarity`` with ``pooling="position"`` and ``within="max"``; padding
    has no weight, whichever batch a sample comes in. The paper then lets targets take turns: ``select.round_robin``.

    Args:
        model: a causal language model; a task's own samples may be whole conversations.
        task: what a sample is.
        targets: batches by name.
        at: name or glob of the layer whose input is h; None: the output layer.
        name: of the aggregated column, and prefix of the targets'.
    """

    def __init__(
        self, model: nn.Module, task: Task, targets: Targets, *, at: str | None = None, name: str = "rds_plus"
    ) -> None:
        super().__init__(model, task, targets, within="max", across="max", at=at, pooling="position", name=name)
