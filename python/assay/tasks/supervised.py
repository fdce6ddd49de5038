"""A label per sample: classification and regression."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from assay.tasks.base import Outputs, as_bool, call, check_range, class_indices, logits_of, pair, to_device, wide
from assay.tasks.losses import row_losses


@dataclass(frozen=True)
class Classification:
    """Batches ``(x, y)``: cross entropy of ``model(x)`` (B, C) against the class indices ``y`` (B,).

    ``x`` is a tensor, or a mapping of keyword arguments. Every label must lie in [0, C).
    """

    def size(self, batch: Any) -> int:
        return len(pair(batch, "Classification", "(x, y)")[1])

    def to(self, batch: Any, device: torch.device) -> Any:
        return to_device(batch, device)

    def forward(self, model: nn.Module, batch: Any) -> Outputs:
        x, y = pair(batch, "Classification", "(x, y)")
        logits = logits_of(call(model, x))
        if logits.ndim != 2 or y.shape != logits.shape[:1]:
            raise ValueError(
                f"Classification: logits of shape {tuple(logits.shape)} and labels of shape "
                f"{tuple(y.shape)}; expected (B, C) and (B,)"
            )
        labels = class_indices(y)
        check_range(labels, logits.shape[1], ignore=None)
        losses = row_losses(logits, labels)
        return Outputs(losses.float(), logits, labels, row_losses=losses)

    def relabelled(self, batch: Any, labels: Tensor) -> Any:
        return pair(batch, "Classification", "(x, y)")[0], labels

    def mask(self, batch: Any) -> Tensor | None:
        x, _ = pair(batch, "Classification", "(x, y)")
        if isinstance(x, Mapping) and "attention_mask" in x:
            return as_bool(x["attention_mask"])
        return None


@dataclass(frozen=True)
class Regression:
    """Batches ``(x, y)``: the mean over a sample's outputs of (prediction - y)²; no factor of one half.

    ``model(x)`` and ``y`` must have the same shape (B, ...): (B,) against (B, 1) would broadcast to (B, B).
    """

    def size(self, batch: Any) -> int:
        return len(pair(batch, "Regression", "(x, y)")[1])

    def to(self, batch: Any, device: torch.device) -> Any:
        return to_device(batch, device)

    def forward(self, model: nn.Module, batch: Any) -> Outputs:
        x, y = pair(batch, "Regression", "(x, y)")
        prediction = logits_of(call(model, x))
        if prediction.shape != y.shape:
            raise ValueError(
                f"Regression: prediction of shape {tuple(prediction.shape)} and target of shape "
                f"{tuple(y.shape)}; expected equal shapes: reshape the target"
            )
        prediction = wide(prediction)
        squares = (prediction - y.to(prediction.dtype)).square()
        return Outputs(squares.flatten(1).mean(1).float() if squares.ndim > 1 else squares.float())

    def mask(self, batch: Any) -> Tensor | None:
        return None
