"""Losses with which small models help large ones: distillation, weak-to-strong, and what was won by it.

They are losses by sample: their mean is trained on, or they go through ``Reweighter.backward`` as any others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from assay.ops._distillation_backends import divergence, normalise, plain_sums, to_residual
from assay.ops._tensors import check_int, check_matrices, check_tensor, first_order, wide_dtype
from assay.ops.distillation import check_flag, check_temperature
from assay.ops.distillation import linear_distillation as distillation
from assay.ops.ensemble import check_weights
from assay.ops.ensemble import normalise as normalised_shares

__all__ = ["confidence", "distillation", "distillation_of_logits", "performance_gap_recovered", "ramp"]


def distillation_of_logits(
    logits: Tensor,
    teacher_logits: Tensor | Sequence[Tensor],
    *,
    teacher_weights: Tensor | Sequence[float] | None = None,
    temperature: float = 1.0,
    reverse: bool = False,
) -> Tensor:
    """``distillation`` of logits that are there anyway, a classifier's: T² KL(q‖p) of each row.

    Args:
        logits: (N, C), the student's; float32, bfloat16, float16 or float64.
        teacher_logits: (N, C), (K, N, C) or K tensors (N, C): the same rows and classes. Not differentiated.
        teacher_weights, temperature, reverse: as in ``distillation``.

    Returns:
        (N,) float32 (float64 for float64 logits); −inf and NaN as in ``distillation``. Differentiable once.

    Raises:
        TypeError, ValueError: a shape, dtype, device, weight or number is wrong.
    """
    check_tensor("logits", logits, (2,), "two dimensions, (N, C)")
    teachers = check_matrices("teacher_logits", teacher_logits, "N, C")
    for k, z in enumerate(teachers):
        _check_teacher(f"teacher_logits[{k}]", z, logits)
    if logits.shape[1] == 0:
        raise ValueError(f"logits: expected at least one class, got shape {tuple(logits.shape)}")
    given = check_weights(teacher_weights, len(teachers), "teacher_weights")
    shares = normalised_shares(given, len(teachers), "teacher_weights")
    temperature = check_temperature(temperature)
    check_flag("reverse", reverse)
    wide = wide_dtype(logits, *teachers)
    each = [
        _log_softmax(z, temperature, wide).add_(math.log(s)) for z, s in zip(teachers, shares, strict=True) if s > 0
    ]
    log_q = torch.stack(each).logsumexp(0) if len(each) > 1 else each[0]
    made: Tensor = _DivergenceOfLogits.apply(logits, log_q, temperature, reverse)  # type: ignore[no-untyped-call]
    return made * temperature**2


def _check_teacher(name: str, z: Tensor, logits: Tensor) -> None:
    if z.shape == logits.shape and z.device == logits.device:
        return
    form = tuple(logits.shape)
    found = f"{name}: expected shape {form} on {logits.device}, as logits, got {tuple(z.shape)} on {z.device}"
    if len(z) == len(logits) and z.shape[1] != logits.shape[1]:
        padded, least = (name, logits.shape[1]) if z.shape[1] > logits.shape[1] else ("logits", z.shape[1])
        found += f"; where one has columns of padding, slice them off: {padded}[:, :{least}]"
    raise ValueError(found)


def _log_softmax(z: Tensor, temperature: float, wide: torch.dtype) -> Tensor:
    made = z.detach().to(wide, copy=True, memory_format=torch.contiguous_format)
    normalise(plain_sums, made, temperature, made.new_empty(2, len(made)))
    return made


class _DivergenceOfLogits(torch.autograd.Function):
    """``log_q`` is lost."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, log_q: Tensor, temperature: float, reverse: bool) -> Tensor:
        log_p = _log_softmax(logits, temperature, log_q.dtype)
        losses = divergence(log_p, log_q, reverse, plain_sums)
        if ctx.needs_input_grad[0]:
            to_residual(log_p, log_q, reverse, losses)
            ctx.save_for_backward(log_p.div_(temperature))
            ctx.dtype = logits.dtype
        return losses

    @staticmethod
    @first_order("the divergence")
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        counted = outer[0][:, None]  # a row that does not count adds nothing, whatever its loss
        return (gradient * counted).masked_fill_(counted == 0, 0).to(ctx.dtype), None, None, None


def confidence(logits: Tensor, weak: Tensor, alpha: float) -> Tensor:
    """Each sample's cross-entropy to (1 − alpha) · weak + alpha · the model's own hardened prediction (2312.09390).

    A strong model trained on a weak one's labels learns their errors, too; with a share of its own predictions as the
    target it may keep to what it knows. The hardened prediction is a constant, of which nothing is learned.

    With two classes the prediction is hardened at the threshold at which as many of the batch are in class 1 as the
    weak labels' mean says (half of a sample rounds up): without it a model may settle on one class. Of samples that
    are equally likely the earlier ones are in class 1. With more classes it is the likeliest (arg max, of equally
    likely ones the lowest), and nothing keeps the classes in balance. The threshold is the batch's: small batches, or
    accumulated ones, harden otherwise than large ones.

    Args:
        logits: (B, C) with C ≥ 2, float32, bfloat16, float16 or float64.
        weak: (B,) int64 in [0, C), or (B, C) probabilities.
        alpha: in [0, 1]; the paper takes up to 0.5, and 0.75 for the largest students. It starts at 0: ``ramp``.

    Returns:
        (B,) float32 (float64 for float64 logits), nats.

    Raises:
        TypeError, ValueError: a shape, dtype or number is wrong, or a row of ``weak`` is no distribution.
        IndexError: a class outside [0, C).
    """
    check_tensor("logits", logits, (2,), "two dimensions, (B, C)")
    if logits.shape[1] < 2:
        raise ValueError(
            f"logits: expected (B, C) with two classes or more, got shape {tuple(logits.shape)}; "
            "of one logit z per sample, torch.stack([torch.zeros_like(z), z], 1) makes two"
        )
    if not 0 <= _number("alpha", alpha) <= 1:
        raise ValueError(f"alpha: expected a number in [0, 1], got {alpha}")
    wide = wide_dtype(logits)
    target = _distributions(weak, logits).to(wide)
    own = _hardened(logits.detach().to(wide), target)
    target = (1 - alpha) * target + alpha * torch.nn.functional.one_hot(own, logits.shape[1])
    log_p = logits.to(wide).log_softmax(1)
    impossible = (target == 0) & ~log_p.isnan()  # 0 · −inf is 0
    return -(target * log_p).masked_fill(impossible, 0).sum(1)


def _hardened(logits: Tensor, target: Tensor) -> Tensor:
    """(B,) classes."""
    if logits.shape[1] > 2:
        return logits.argmax(1)
    margin = logits[:, 1] - logits[:, 0]
    count = int((target[:, 1].double().sum() + 0.5).floor())
    classes = torch.zeros(len(margin), dtype=torch.int64, device=logits.device)
    classes[(-margin).argsort(stable=True)[:count]] = 1  # NaN come last
    return classes


def _distributions(weak: Tensor, logits: Tensor) -> Tensor:
    """(B, C) probabilities of classes or of what is checked to be probabilities."""
    (rows, classes), device = logits.shape, logits.device
    if not isinstance(weak, Tensor):
        raise TypeError(f"weak: expected a tensor of classes or probabilities, got {type(weak).__name__}")
    if weak.device != device or weak.layout != torch.strided or weak.shape not in ((rows,), (rows, classes)):
        raise ValueError(
            f"weak: expected shape ({rows},) or ({rows}, {classes}) on {device}, as logits, "
            f"got {tuple(weak.shape)} on {weak.device}"
        )
    weak = weak.detach()
    if weak.dim() == 1:
        if weak.dtype != torch.int64:
            raise TypeError(
                f"weak: expected int64 classes, or probabilities of shape ({rows}, {classes}), got {weak.dtype}"
            )
        wrong = (weak < 0) | (weak >= classes)
        if wrong.any():
            row = int(wrong.nonzero()[0])
            raise IndexError(f"weak: expected classes in [0, {classes}), got {int(weak[row])} in row {row}")
        return torch.nn.functional.one_hot(weak, classes)
    check_tensor("weak", weak)
    fits = (weak >= 0).all(1) & ((weak.double().sum(1) - 1).abs() <= 1e-2)  # 16-bit probabilities are that far off
    if not fits.all():
        row = int((~fits).nonzero()[0])
        raise ValueError(
            f"weak: expected probabilities, not negative and of sum 1 in each row, got {weak[row].tolist()!r:.100} in "
            f"row {row}; of logits, softmax(1) makes them"
        )
    return weak


def ramp(step: int, warmup_steps: int, alpha: float) -> float:
    """alpha · step / warmup_steps, and alpha from there on: the coefficient of ``confidence`` at a step, 0 the first.

    (The paper's code multiplies alpha by the share of training that is done until that reaches the warm-up's, a tenth,
    and by 1 from there on: a jump.)

    Raises:
        TypeError, ValueError: a step is negative or no int.
    """
    step, warmup_steps = check_int("step", step, 0), check_int("warmup_steps", warmup_steps, 0)
    alpha = _number("alpha", alpha)
    return alpha if step >= warmup_steps else alpha * step / warmup_steps


def performance_gap_recovered(weak: float, strong: float, ceiling: float) -> float:
    """(strong − weak) / (ceiling − weak), the PGR of weak-to-strong (2312.09390).

    0: no better than the weak model; 1: as good as with true labels. Not clipped: below 0 it is worse than the weak
    model, above 1 better than the ceiling. Where the gap is small the ratio is mostly noise: report its spread.

    Args:
        weak: the weak model's performance, of whatever is better where it is higher (an accuracy, not a loss).
        strong: that of the strong model trained on the weak one's labels (or choice).
        ceiling: that of the strong model trained on true labels.

    Raises:
        TypeError: a value is no number.
        ValueError: a value is not finite, or the ceiling is not above the weak performance, where there is no gap.
    """
    values = {"weak": weak, "strong": strong, "ceiling": ceiling}
    for name, value in values.items():
        if not math.isfinite(_number(name, value)):
            raise ValueError(f"{name}: expected a finite performance, got {value}")
    gap = float(ceiling) - float(weak)
    if gap <= 0:
        raise ValueError(
            f"ceiling: expected more than the weak performance, {weak}, got {ceiling}: there is no gap to recover "
            "(of losses, which are better where they are lower, hand over the negatives)"
        )
    return (float(strong) - float(weak)) / gap


def _number(name: str, value: Any) -> float:
    scalar = (
        value.dim() == 0 if isinstance(value, Tensor) else isinstance(value, int | float | np.integer | np.floating)
    )
    if isinstance(value, bool) or not scalar:
        raise TypeError(f"{name}: expected a number, got {value!r:.100}")
    return float(value)
