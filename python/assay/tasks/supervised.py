"""A label per sample: classification and regression."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from assay.tasks.base import (
    Outputs,
    as_bool,
    call,
    check_probabilities,
    check_range,
    class_indices,
    logits_of,
    pair,
    to_device,
    wide,
)
from assay.tasks.losses import row_losses, soft_losses


class Supervised:
    """Batches ``(x, y)``; ``x`` is a tensor, or a mapping of keyword arguments."""

    def size(self, batch: Any) -> int:
        return len(self._pair(batch)[1])

    def to(self, batch: Any, device: torch.device) -> Any:
        return to_device(batch, device)

    def mask(self, batch: Any) -> Tensor | None:
        x, _ = self._pair(batch)
        if isinstance(x, Mapping) and "attention_mask" in x:
            return as_bool(x["attention_mask"])
        return None

    def _pair(self, batch: Any) -> tuple[Any, Tensor]:
        return pair(batch, type(self).__name__, "(x, y)")


@dataclass(frozen=True)
class Classification(Supervised):
    """Batches ``(x, y)``: cross entropy of ``model(x)`` (B, C) against the class indices ``y`` (B,).

    ``x`` is a tensor, or a mapping of keyword arguments. Every label must lie in [0, C).

    ``y`` may also be probabilities, (B, C) floating, not negative and of sum 1 within 1e-4: the loss is −Σ_c y_c log
    q_c with q = softmax(model(x)). That is the cross entropy, not the Kullback–Leibler divergence, which is less by the
    label's own entropy: a one-hot label then has the loss of its class, and the gradient, q − y, is the same. Such a
    batch has no ``labels``: methods that compare with one class refuse it.

    Args:
        soft: labels are probabilities, so that those methods can refuse before anything runs.
    """

    soft: bool = False

    def forward(self, model: nn.Module, batch: Any) -> Outputs:
        x, y = self._pair(batch)
        logits = logits_of(call(model, x))
        is_soft = y.is_floating_point() and y.ndim == 2
        if logits.ndim != 2 or y.shape != (logits.shape if is_soft else logits.shape[:1]):
            raise ValueError(
                f"Classification: logits of shape {tuple(logits.shape)} and labels of shape "
                f"{tuple(y.shape)}; expected (B, C) and (B,), or (B, C) probabilities"
            )
        if is_soft:
            check_probabilities(y)
            losses = soft_losses(logits, y)
            return Outputs(losses.float(), logits, row_losses=losses)
        labels = class_indices(y)
        check_range(labels, logits.shape[1], ignore=None)
        losses = row_losses(logits, labels)
        return Outputs(losses.float(), logits, labels, row_losses=losses)

    def relabelled(self, batch: Any, labels: Tensor) -> Any:
        return self._pair(batch)[0], labels


@dataclass(frozen=True)
class Regression(Supervised):
    """Batches ``(x, y)``: the mean over a sample's outputs of (prediction - y)²; no factor of one half.

    ``x`` is a tensor, or a mapping of keyword arguments. ``model(x)`` and ``y`` must have the same shape (B, ...): (B,)
    against (B, 1) would broadcast to (B, B).
    """

    def forward(self, model: nn.Module, batch: Any) -> Outputs:
        x, y = self._pair(batch)
        prediction = logits_of(call(model, x))
        if prediction.shape != y.shape:
            raise ValueError(
                f"Regression: prediction of shape {tuple(prediction.shape)} and target of shape "
                f"{tuple(y.shape)}; expected equal shapes: reshape the target"
            )
        prediction = wide(prediction)
        target = y.to(prediction.dtype)
        squares = (prediction - target).square()
        losses = squares.flatten(1).mean(1).float() if squares.ndim > 1 else squares.float()
        return Outputs(losses, prediction=prediction, target=target)
