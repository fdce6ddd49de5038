"""A class per token: tags."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from assay.tasks.base import IGNORE, Outputs, as_bool, check_range, class_indices, describe, logits_of, to_device
from assay.tasks.losses import row_losses, sample_losses


@dataclass(frozen=True)
class TokenClassification:
    """Batches are mappings: ``labels`` (B, T), the class of each position or -100 where none is predicted, and the
    model's arguments, such as ``input_ids`` and ``attention_mask``, both (B, T).

    A position's logits are compared with its own label: nothing is shifted. A sample's loss is the mean
    (``reduction="sum"``: the sum) over its positions with a label; one without any has loss NaN and gradient 0.
    A position whose attention mask is 0 must not have a label.
    """

    reduction: Literal["mean", "sum"] = "mean"

    def __post_init__(self) -> None:
        if self.reduction not in ("mean", "sum"):
            raise ValueError(f"TokenClassification: reduction {self.reduction!r}; expected 'mean' or 'sum'")

    def size(self, batch: Any) -> int:
        return len(self._labels(batch))

    def to(self, batch: Any, device: torch.device) -> Any:
        return to_device(batch, device)

    def forward(self, model: nn.Module, batch: Any) -> Outputs:
        labels, mask = self._labels(batch), self.mask(batch)
        if mask is not None and bool((~mask & (labels != IGNORE)).any()):
            raise ValueError("TokenClassification: a position of the padding has a label; expected -100 there")
        logits = logits_of(model(**{name: value for name, value in batch.items() if name != "labels"}))
        if logits.ndim != 3 or logits.shape[:2] != labels.shape:
            raise ValueError(
                f"TokenClassification: logits of shape {tuple(logits.shape)} for labels of shape "
                f"{tuple(labels.shape)}; expected (B, T, classes)"
            )
        check_range(labels, logits.shape[2], ignore=IGNORE)
        flat = logits.flatten(0, 1)
        by_row = row_losses(flat, labels.flatten()).view(labels.shape)
        rows = torch.arange(len(labels), device=labels.device).repeat_interleave(labels.shape[1])
        losses = sample_losses(by_row, labels, self.reduction)
        return Outputs(losses, flat, labels.flatten(), rows, row_losses=by_row)

    def relabelled(self, batch: Mapping[str, Any], labels: Tensor) -> dict[str, Any]:
        return {**batch, "labels": labels.view(batch["labels"].shape)}

    def by_token(self, values: Tensor, labels: Tensor, samples: int) -> Tensor:
        """Row (b, t) is about token t."""
        return values.masked_fill(labels == IGNORE, torch.nan).view(samples, -1)

    def mask(self, batch: Any) -> Tensor | None:
        labels, mask = self._labels(batch), batch.get("attention_mask")
        if mask is not None and mask.shape != labels.shape:
            raise ValueError(
                f"TokenClassification: attention_mask of shape {tuple(mask.shape)} for labels of shape "
                f"{tuple(labels.shape)}; expected the same shape"
            )
        return None if mask is None else as_bool(mask)

    def _labels(self, batch: Any) -> Tensor:
        if not isinstance(batch, Mapping) or not isinstance(batch.get("labels"), Tensor):
            raise TypeError(f"TokenClassification: a batch is a mapping with a tensor 'labels', got {describe(batch)}")
        if batch["labels"].ndim != 2:
            raise ValueError(f"TokenClassification: labels of shape {tuple(batch['labels'].shape)}; expected (B, T)")
        return class_indices(batch["labels"])
