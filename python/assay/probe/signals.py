"""What the probe gives off about a batch, and what methods take."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from assay.probe.formulas import Factors
from assay.tasks import OutputLayer
from assay.tasks.base import Lazy


@dataclass(frozen=True)
class Signals:
    """What a model gives off about a batch of B samples. Nothing here carries an autograd graph.

    Attributes:
        losses: (B,) float32. A fused language model's are made when they are read, if no gradient was asked for.
        logits: (N, C), one row per position; None if the task has none or they were not asked for. With an
            ``output_layer`` they have not been made: reading them makes them.
        labels: (N,) int64, -100 where nothing is predicted; None if the task has none.
        rows: (N,) int64, the sample that owns each row; None when row i is sample i.
        factors: by layer name. A layer that the losses do not depend on has no entry: its gradient is zero.
        embeddings: (B, D) float32, pooled inputs of the layer that was named.
        reduced: by reduction, (B,) or (B, width) float32 (float64 from a float64 model).
        output_layer: what the logits of a fused language model are the product of, if they were asked for.
        row_losses: (B,) or (B, T): the cross entropies that the losses are made of, 0 where nothing is predicted; None
            if the task has none.
        raw: by name, the samples' own columns, each of B values; the probe gives none.
        prediction, target: (B, ...), a regression's; the prediction if logits were asked for.
        left_out: parameters that could not be tapped: nothing here holds their gradients.
        size: B, where it is known before the losses are; see ``samples``.
    """

    losses: Tensor = Lazy()  # type: ignore[assignment]
    logits: Tensor | None = Lazy()  # type: ignore[assignment]
    labels: Tensor | None = None
    rows: Tensor | None = None
    factors: Mapping[str, Factors] = field(default_factory=dict)
    embeddings: Tensor | None = None
    reduced: Mapping[str, Tensor] = field(default_factory=dict)
    output_layer: OutputLayer | None = None
    row_losses: Tensor | None = Lazy()  # type: ignore[assignment]
    raw: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    prediction: Tensor | None = None
    target: Tensor | None = None
    left_out: frozenset[str] = frozenset()
    size: int | None = None

    @property
    def samples(self) -> int:
        """B."""
        return len(self.losses) if self.size is None else self.size

    def with_reduced(self, reduced: Mapping[str, Tensor], raw: Mapping[str, Sequence[Any]] | None = None) -> Signals:
        """The same signals with other reductions, and raw columns; logits that have not been made stay so."""
        other = copy.copy(self)
        object.__setattr__(other, "reduced", reduced)
        object.__setattr__(other, "raw", raw or {})
        return other
