"""Distillation from hidden states and output matrices: a student's divergence from a mixture of teachers, no logits.

With the student's p = softmax(z / T) and the teachers' mixture q = Σ_k w_k softmax(z_k / T), KL(q‖p) has the gradient
(p − q) / T in z, and KL(p‖q) has p (log p − log q − KL) / T.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from assay.ops import _backend, ensemble
from assay.ops import _distillation_backends as backends
from assay.ops._tensors import check_like, check_matrices, check_tensor, first_order, wide_dtype
from assay.ops.head import Tensors, check_models


def linear_distillation(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensors,
    teacher_weight: Tensors,
    *,
    bias: Tensor | None = None,
    teacher_bias: Tensor | Sequence[Tensor | None] | None = None,
    teacher_weights: Tensor | Sequence[float] | None = None,
    temperature: float = 1.0,
    reverse: bool = False,
) -> Tensor:
    """Each row's T² KL(q‖p) of a student's p from a mixture q of teachers, differentiable, without storing the logits.

    p = softmax(z / T) with z = hidden weightᵀ + bias, and q = Σ_k w_k softmax(z_k / T) with each teacher's own. T²
    keeps the gradients' size whatever the temperature (Hinton et al., 1503.02531). Everything is made of
    log-probabilities. The gradient in ``hidden`` is made in the forward pass, while a block of logits is at hand; those
    in ``weight`` and ``bias`` take the products once more, in the backward pass.

    Args:
        hidden: (N, D), the student's; weight: (C, D); bias: (C,) or None; float32, bfloat16 or float16 (float64 runs
            the reference), any strides.
        teacher_hidden: (N, D_1) of one teacher, (K, N, D), or K tensors (N, D_k) for the same N positions. Teachers are
            not differentiated.
        teacher_weight: (C, D_1), (K, C, D), or K tensors (C, D_k): the student's classes, in their order.
        teacher_bias: (C,), (K, C), or K tensors (C,), each of which may be None.
        teacher_weights: (K,), not negative, scaled to sum to 1. None: equal. A teacher with weight 0 is not computed.
        temperature: T, above 0.
        reverse: KL(p‖q) in place of KL(q‖p): it asks for one of the teachers' modes rather than for all they allow.

    Returns:
        (N,) float32 (float64 for float64 inputs), nats times T², not reduced. A class of logit −inf is impossible. The
        result is +inf where the teachers allow a class that the student excludes (``reverse``: where the student allows
        one that all teachers exclude; such a row's gradient is not finite). A row with a NaN or +inf logit, or nothing
        but −inf, is NaN, and no other row is; a row whose loss enters the sum with a factor of 0 adds 0 to gradients,
        whatever its loss.

    Raises:
        TypeError, ValueError: a shape, dtype, device, weight, number or vocabulary is wrong.
    """
    check_tensor("hidden", hidden, (2,), "two dimensions, (N, D)")
    check_tensor("weight", weight, (2,), "two dimensions, (C, D)")
    if bias is not None:
        check_tensor("bias", bias, (1,), "one dimension, (C,)")
    detached = check_models(hidden, weight, bias)
    if not torch.is_grad_enabled():
        (hidden,), (weight,), _, (bias,) = detached  # no gradient is made
    teachers = _check_teachers(hidden, weight, teacher_hidden, teacher_weight, teacher_bias)
    share = ensemble.check_weights(teacher_weights, len(teachers) // 3, "teacher_weights")
    temperature = check_temperature(temperature)
    check_flag("reverse", reverse)
    made: Tensor = _LinearDistillation.apply(hidden, weight, bias, share, temperature, reverse, *teachers)  # type: ignore[no-untyped-call]
    return made * temperature**2


def check_temperature(temperature: Any) -> float:
    if isinstance(temperature, bool) or not isinstance(temperature, int | float | np.integer | np.floating):
        raise TypeError(f"temperature: expected a number above 0, got {temperature!r:.100}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature: expected a finite number above 0, got {temperature}")
    return float(temperature)


def check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {value!r:.100}")


def _check_teachers(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensors,
    teacher_weight: Tensors,
    teacher_bias: Tensor | Sequence[Tensor | None] | None,
) -> list[Tensor | None]:
    """K hidden states, K weights and K biases (some None), detached."""
    weights, classes = check_matrices("teacher_weight", teacher_weight, "C, D"), len(weight)
    for k, w in enumerate(weights):
        if len(w) != classes:
            padded, least = ("weight", len(w)) if len(w) < classes else (f"teacher_weight[{k}]", classes)
            raise ValueError(
                f"teacher_weight[{k}]: expected the {classes} classes of weight, got {len(w)}; where one vocabulary is "
                f"padded with more rows, slice them off: {padded}[:{least}], and its bias alike"
            )
    models = check_models(teacher_hidden, weights, teacher_bias, prefix="teacher_")
    first = models.hidden[0]
    check_like("teacher_hidden[0]", first, (len(hidden), first.shape[1]), hidden.device)
    return [*models.hidden, *models.weight, *models.bias]


class _LinearDistillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        share: Tensor | None,
        temperature: float,
        reverse: bool,
        *teachers: Tensor | None,
    ) -> Tensor:
        of_hidden, *of_others = ctx.needs_input_grad[:3]
        models = _arguments(hidden, weight, bias, share, teachers)
        kl, gradient, normal = _distillation(*models, temperature, reverse, of_hidden)
        if any(of_others):
            ctx.save_for_backward(gradient, kl, normal, hidden, weight, bias, share, *teachers)
        else:
            ctx.save_for_backward(gradient)
        ctx.dtype, ctx.temperature, ctx.reverse = hidden.dtype, temperature, reverse
        losses: Tensor = kl
        return losses

    @staticmethod
    @first_order("linear_distillation")
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        gradient, *saved = ctx.saved_tensors
        into_hidden = into_weight = into_bias = None
        if ctx.needs_input_grad[0]:
            into_hidden = (gradient * outer[0][:, None]).masked_fill_((outer[0] == 0)[:, None], 0).to(ctx.dtype)
        if saved:
            kl, normal, hidden, weight, bias, share, *teachers = saved
            models = _arguments(hidden, weight, bias, share, teachers)
            into_weight, into_bias = _weight_gradient(*models, ctx.temperature, ctx.reverse, normal, kl, outer[0])
        nothing = [None] * (len(ctx.needs_input_grad) - 3)
        return into_hidden, into_weight, into_bias if ctx.needs_input_grad[2] else None, *nothing


def _arguments(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, share: Tensor | None, teachers: Sequence[Tensor | None]
) -> tuple[Any, ...]:
    """The models, as both ops take them."""
    k = len(teachers) // 3
    return hidden, weight, list(teachers[:k]), list(teachers[k : 2 * k]), bias, list(teachers[2 * k :]), share


@_backend.op(
    "linear_distillation",
    reference=partial(backends.divergences, backends.PLAIN),
    cpu=partial(backends.divergences, backends.NATIVE),
    operands=4,
    prepare=backends.prepare,
)
def _distillation(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Sequence[Tensor],
    teacher_weight: Sequence[Tensor],
    bias: Tensor | None,
    teacher_bias: Sequence[Tensor | None],
    share: Tensor | None,
    temperature: float,
    reverse: bool,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """KL (N,), its gradient in the student's hidden states (N, D), or empty, and each model's two logarithms."""
    n, wide = len(hidden), wide_dtype(hidden, weight, *teacher_hidden, *teacher_weight)
    made = hidden.new_empty(hidden.shape if gradient else (0,), dtype=wide)
    return made.new_empty(n), made, made.new_empty(1 + len(teacher_hidden), 2, n)


@_backend.op(
    "linear_distillation_weight_gradient",
    reference=partial(backends.weight_gradient, backends.PLAIN),
    cpu=partial(backends.weight_gradient, backends.NATIVE),
    operands=4,
    prepare=backends.prepare,
    label=lambda *_: "linear_distillation",
)
def _weight_gradient(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Sequence[Tensor],
    teacher_weight: Sequence[Tensor],
    bias: Tensor | None,
    teacher_bias: Sequence[Tensor | None],
    share: Tensor | None,
    temperature: float,
    reverse: bool,
    normal: Tensor,
    kl: Tensor,
    outer: Tensor,
) -> tuple[Tensor, Tensor]:
    into_bias = weight.new_empty(len(weight), dtype=weight.dtype if bias is None else bias.dtype)
    return torch.empty_like(weight, memory_format=torch.contiguous_format), into_bias
