"""Cross entropy of rows of logits, and what samples make of their rows'."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from assay import ops
from assay.tasks.base import IGNORE, wide

_CHUNK = 1 << 19  # logits worked on at a time: 2 MiB of float32 stay in cache from one operation to the next


class _RowLosses(torch.autograd.Function):
    """Cross entropy of rows in float32 or wider that keeps the logits as they are and two numbers per row.

    ``F.cross_entropy(logits.float())`` would keep two more tensors of the logits' size; here the gradient is the only
    one, written in place.
    """

    differentiable_twice = True

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        losses = ops.ensemble_stats([logits], labels, ignore_index=IGNORE, fields=("nll",)).nll
        assert losses is not None
        peak = wide(logits.amax(1) if logits.numel() else logits.new_zeros(len(logits)))
        target = logits.gather(1, labels.clamp(min=0)[:, None])[:, 0]
        # log Σ e^z as (maximum, log of the rest): under a large common offset their sum would lose digits
        spread = losses + (wide(target) - peak)
        impossible = target == -torch.inf  # ∞ − ∞: an infinite loss has a gradient all the same
        if bool(impossible.any()):
            spread[impossible] = (wide(logits[impossible]) - peak[impossible, None]).exp().sum(1).log()
        ctx.save_for_backward(logits, labels, peak, spread)
        return losses.masked_fill(labels == IGNORE, 0)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None]:
        logits, labels, peak, spread = ctx.saved_tensors
        (outer,) = outputs
        if torch.is_grad_enabled():  # create_graph: the gradient is to be differentiated in turn
            return _gradient(logits, labels, outer), None
        grads = torch.empty_like(logits)
        for part in _row_parts(logits):
            wide = grads[part] if grads.dtype == peak.dtype else torch.empty_like(grads[part], dtype=peak.dtype)
            torch.sub(logits[part], peak[part, None], out=wide)
            wide.sub_(spread[part, None]).exp_()
            target = labels[part].clamp(min=0)[:, None]
            wide.scatter_add_(1, target, wide.new_full((1, 1), -1).expand_as(target))
            wide.mul_(outer[part, None]).masked_fill_(labels[part, None] == IGNORE, 0)
            if wide.dtype != grads.dtype:
                grads[part] = wide
        return grads, None


def _gradient(logits: Tensor, labels: Tensor, outer: Tensor) -> Tensor:
    """(p − y) · ``outer`` by operations that have derivatives themselves; 0 at -100."""
    one = torch.zeros_like(logits).scatter_(1, labels.clamp(min=0)[:, None], 1)
    return ((wide(logits).softmax(1) - one) * outer.masked_fill(labels == IGNORE, 0)[:, None]).to(logits.dtype)


def row_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """(N, C), (N,) int64 -> (N,): each row's cross entropy in float32 (float64 if the logits are), 0 at -100.

    Labels must lie in [0, C) or be -100. One row's NaN stays in its row; an ignored row has gradient 0. Can be
    differentiated twice.
    """
    losses: Tensor = _RowLosses.apply(logits, labels)  # type: ignore[no-untyped-call]
    return losses


def soft_losses(logits: Tensor, probabilities: Tensor) -> Tensor:
    """(N, C), (N, C) -> (N,): −Σ_c p_c log q_c with q = softmax(logits), in float32 or float64, with its graph.

    A class of probability 0 adds nothing, also where q is 0.
    """
    log_q = wide(logits).log_softmax(1)
    p = probabilities.to(log_q.dtype)
    return -torch.where(p > 0, p * log_q, 0.0).sum(1)


def sample_losses(row_losses: Tensor, labels: Tensor, reduction: Literal["mean", "sum"]) -> Tensor:
    """(B, T), (B, T) -> (B,) float32: the mean or sum over a sample's rows with a label; NaN, of gradient 0, without.

    ``row_losses`` are 0 where the label is -100.
    """
    totals = row_losses.sum(1)
    predicted = (labels != IGNORE).sum(1)
    losses = totals / predicted.clamp(min=1) if reduction == "mean" else totals
    # where() sends no gradient to what it did not choose: a NaN here harms nobody's gradient.
    return torch.where(predicted > 0, losses, torch.nan).float()


def _row_parts(logits: Tensor) -> list[slice]:
    step = max(1, _CHUNK // max(1, logits.shape[1]))
    return [slice(start, start + step) for start in range(0, len(logits), step)]
