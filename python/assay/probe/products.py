"""Operations in which samples meet a weight as they do in a layer, and each weight's gradient there.

They are functions of torch as a model calls them: inside a layer's subclass, inside ``MultiheadAttention``, with a
weight that is taken from another layer or computed from parameters. The formulas are those of the layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from assay.probe import formulas
from assay.probe.experts import Experts
from assay.probe.terms import Dense, Outer, Scatter, Term
from assay.tasks.base import wide

Arrange = Callable[[Tensor], Tensor]
"""(*lead, ...) -> (B, T, ...)."""


@dataclass(frozen=True)
class Lead:
    """How the samples lie in the first dimensions of an operation's arguments.

    Attributes:
        arrange: the lengths of the dimensions before an argument's own -> how they become (B, T), or None.
        batch: whether a first dimension is the batch's.
    """

    arrange: Callable[[Sequence[int]], Arrange | None]
    batch: Callable[[Tensor], bool]


# Attention as a function, with what it is made of seen one by one.
ATTENTION = FunctionType(
    F.multi_head_attention_forward.__code__,
    {**vars(F), "has_torch_function": lambda tensors: False},
    argdefs=F.multi_head_attention_forward.__defaults__,
)

Gradients = Mapping[str, Callable[[Tensor], Term]]
"""By argument: the output's gradient -> that argument's, where it is a weight."""


def arguments(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
    """The arguments of an operation that is known here, by name."""
    names = _NAMES.get(func)
    return None if names is None or len(args) > len(names) else {**dict(zip(names, args, strict=False)), **kwargs}


def gradients(func: Any, given: Mapping[str, Any], lead: Lead) -> Gradients | None:
    """The formulas of an operation as it was called; None where there are none, or the samples cannot be told apart.

    Args:
        func: one for which there are ``arguments``.
        given: its arguments, detached.
        lead: how samples lie in them.
    """
    formula: Callable[[Any, Lead], Gradients | None] = _FORMULAS[func]
    return formula(SimpleNamespace(**{**_DEFAULTS.get(func, {}), **given}), lead)


def _linear(given: Any, lead: Lead) -> Gradients | None:
    if (arrange := lead.arrange(given.input.shape[:-1])) is None:
        return None
    return {
        "weight": lambda grads: Outer(arrange(grads), arrange(given.input)),
        "bias": lambda grads: formulas.shift(arrange(grads)),
    }


def _matmul(given: Any, lead: Lead) -> Gradients | None:
    """x W, x w for a vector w or, with the samples on the right, W x."""
    left, right = given.input, given.other
    if right.ndim == 1 and left.ndim > 1 and (arrange := lead.arrange(left.shape[:-1])) is not None:
        return {"other": lambda grads: Dense((wide(arrange(left)) * wide(arrange(grads))[..., None]).sum(1))}
    if right.ndim == 2 and left.ndim > 1 and (arrange := lead.arrange(left.shape[:-1])) is not None:
        return {"other": lambda grads: Outer(arrange(left), arrange(grads))}
    if left.ndim == 2 and right.ndim == 3 and lead.batch(right):
        return {"input": lambda grads: Outer(grads.mT, right.mT)}
    return None


def _addmm(given: Any, lead: Lead) -> Gradients | None:
    """b + x W."""
    if (given.beta, given.alpha) != (1, 1) or given.input.ndim > 1:
        return None
    if (arrange := lead.arrange(given.mat1.shape[:-1])) is None:
        return None
    return {
        "mat2": lambda grads: Outer(arrange(given.mat1), arrange(grads)),
        "input": lambda grads: formulas.shift(arrange(grads)),
    }


def _embedding(given: Any, lead: Lead) -> Gradients | None:
    arrange = lead.arrange(given.input.shape)
    if arrange is None or given.max_norm is not None or given.scale_grad_by_freq:
        return None
    return {"weight": lambda grads: _scatter(arrange(given.input), arrange(grads), given)}


def _scatter(ids: Tensor, grads: Tensor, given: Any) -> Scatter:
    ids = ids.long()
    if given.padding_idx is not None:
        padding = given.padding_idx % len(given.weight)
        grads = grads.masked_fill((ids == padding)[..., None], 0)
    return Scatter(ids, grads)


def _embedding_bag(given: Any, lead: Lead) -> Gradients | None:
    """A bag is a sample, or several of one dimension are a sample's."""
    allowed = given.mode in ("sum", "mean") and given.max_norm is None and not given.scale_grad_by_freq
    ids, weights = given.input, given.per_sample_weights
    if not allowed or (ids.ndim == 1 and given.offsets is None):
        return None
    if ids.ndim == 1:
        ids, weights, real = _padded(ids, given.offsets, weights, given.include_last_offset)
    else:
        real = torch.ones_like(ids, dtype=torch.bool)
    if (arrange := lead.arrange(ids.shape[:1])) is None:
        return None
    if given.padding_idx is not None:
        real = real & (ids != given.padding_idx % len(given.weight))

    def weight(grads: Tensor) -> Term:
        share = real.to(wide(grads[:0]).dtype) if weights is None else wide(weights) * real
        if given.mode == "mean":
            share = share / real.sum(1, keepdim=True).clamp(min=1)
        spread = wide(grads)[:, None] * share[..., None]
        return Scatter(arrange(ids).flatten(1), arrange(spread).flatten(1, 2))

    return {"weight": weight}


def _padded(ids: Tensor, offsets: Tensor, weights: Tensor | None, last: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """Bags that lie end to end -> ids and weights (bags, longest), and which of them are real."""
    bounds = offsets if last else torch.cat([offsets, offsets.new_tensor([len(ids)])])
    lengths = bounds.diff()
    places = torch.arange(int(lengths.max()) if len(lengths) else 0, device=ids.device)
    real = places < lengths[:, None]
    flat = (bounds[:-1, None] + places).clamp(max=max(len(ids) - 1, 0))
    if not len(ids):
        return ids.new_zeros(real.shape), None, real
    return ids[flat], None if weights is None else weights[flat], real


def _convolution(given: Any, lead: Lead) -> Gradients | None:
    n = given.weight.ndim - 2
    if given.input.ndim != n + 2 or not lead.batch(given.input):
        return None
    layer = _convolution_options(given, n)
    if given.padding == "same":
        totals = [d * (k - 1) for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
        pads = [(total // 2, total - total // 2) for total in totals]
    else:
        pads = [(p, p) for p in ([0] * n if given.padding == "valid" else _each(given.padding, n))]
    layer.padding_mode = "zeros"
    layer._reversed_padding_repeated_twice = [side for pad in reversed(pads) for side in pad]
    return {
        "weight": lambda grads: formulas.convolution(layer, given.input, grads),
        "bias": lambda grads: formulas.shift(grads.flatten(2).mT),
    }


def _conv_transpose(given: Any, lead: Lead) -> Gradients | None:
    n = given.weight.ndim - 2
    if given.input.ndim != n + 2 or not lead.batch(given.input):
        return None
    layer = _convolution_options(given, n)
    layer.padding = _each(given.padding, n)
    return {
        "weight": lambda grads: formulas.transposed(layer, given.input, grads),
        "bias": lambda grads: formulas.shift(grads.flatten(2).mT),
    }


def _convolution_options(given: Any, n: int) -> Any:
    return SimpleNamespace(
        kernel_size=tuple(given.weight.shape[2:]),
        stride=_each(given.stride, n),
        dilation=_each(given.dilation, n),
        groups=given.groups,
    )


def _each(value: Any, n: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    return values * n if len(values) == 1 else values


def _trailing_norm(formula: Callable[[Any, Tensor, Tensor], formulas.Factors]) -> Any:
    def found(given: Any, lead: Lead) -> Gradients | None:
        own = len(given.normalized_shape)
        if (arrange := lead.arrange(given.input.shape[: given.input.ndim - own])) is None:
            return None
        return _scale_and_shift(given, lambda grads: formula(given, arrange(given.input), arrange(grads)), arrange)

    return found


def _channel_norm(formula: Callable[[Any, Tensor, Tensor], formulas.Factors]) -> Any:
    def found(given: Any, lead: Lead) -> Gradients | None:
        if given.input.ndim < 2 or not lead.batch(given.input) or given.training:
            return None
        return _scale_and_shift(given, partial(formula, given, given.input), partial(formulas.channels, given))

    return found


def _scale_and_shift(given: Any, factors: Callable[[Tensor], formulas.Factors], rows: Arrange) -> Gradients:
    return {
        "weight": lambda grads: formulas.scale(factors(grads), given.weight.shape),
        "bias": lambda grads: formulas.shift(rows(grads), given.bias.shape),
    }


def _prelu(given: Any, lead: Lead) -> Gradients | None:
    if not lead.batch(given.input):
        return None
    layer: Any = SimpleNamespace(num_parameters=given.weight.numel())
    return {"weight": lambda grads: formulas.scale(formulas.prelu(layer, given.input, grads), given.weight.shape)}


def _bilinear(given: Any, lead: Lead) -> Gradients | None:
    if (arrange := lead.arrange(given.input1.shape[:-1])) is None:
        return None

    def weight(grads: Tensor) -> Term:
        first, second = wide(arrange(given.input1)), wide(arrange(given.input2))
        return Outer(arrange(grads), (first[..., None] * second[..., None, :]).flatten(2))

    return {"weight": weight, "bias": lambda grads: formulas.shift(arrange(grads))}


def _baddbmm(given: Any, lead: Lead) -> Gradients | None:
    """b_h + x_h W_h for heads h, each with a weight of its own: x (H, B·T, I), W (H, I, O)."""
    left = given.batch1
    plain = given.input is None or given.input.shape[1] == 1
    if left.ndim != 3 or (given.beta, given.alpha) != (1, 1) or not plain:
        return None
    if (arrange := lead.arrange(left.shape[1:2])) is None:
        return None

    def weight(grads: Tensor) -> Term:
        heads, rows = left.shape[:2]
        head = torch.arange(heads, device=grads.device).repeat_interleave(rows)
        samples = len(arrange(left[0]))
        owner = torch.arange(samples, device=grads.device)[:, None].expand(samples, rows // samples).flatten()
        inner, outer = (torch.cat([arrange(x).flatten(0, 1) for x in wide(sides)]) for sides in (left, grads))
        return Experts(inner, outer, head, owner.repeat(heads), samples)

    def shift(grads: Tensor) -> Term:
        return Dense(torch.stack([wide(arrange(side)).sum(1, keepdim=True) for side in grads], 1))

    return {"batch2": weight, "input": shift}


_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_CONV_TRANSPOSE = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_BAG = (
    *("input", "weight", "offsets", "max_norm", "norm_type", "scale_grad_by_freq", "mode", "sparse"),
    *("per_sample_weights", "include_last_offset", "padding_idx"),
)
_OPTIONS = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
_TABLE: tuple[tuple[Sequence[Any], Any, Sequence[str], Mapping[str, Any]], ...] = (
    ([F.linear], _linear, ("input", "weight", "bias"), {}),
    (
        [torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__],
        _matmul,
        ("input", "other"),
        {},
    ),
    ([torch.addmm, Tensor.addmm], _addmm, ("input", "mat1", "mat2", "beta", "alpha"), {"beta": 1, "alpha": 1}),
    (
        [F.embedding],
        _embedding,
        ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"),
        {"padding_idx": None, "max_norm": None, "scale_grad_by_freq": False},
    ),
    (
        [F.embedding_bag],
        _embedding_bag,
        _BAG,
        {
            **dict.fromkeys(("offsets", "max_norm", "per_sample_weights", "padding_idx")),
            **dict.fromkeys(("scale_grad_by_freq", "include_last_offset"), False),
            "mode": "mean",
        },
    ),
    ([F.conv1d, F.conv2d, F.conv3d], _convolution, _CONV, _OPTIONS),
    ([F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d], _conv_transpose, _CONV_TRANSPOSE, _OPTIONS),
    (
        [F.layer_norm],
        _trailing_norm(formulas.layer_norm),
        ("input", "normalized_shape", "weight", "bias", "eps"),
        {"eps": 1e-5},
    ),
    (
        [F.rms_norm],
        _trailing_norm(formulas.rms_norm),
        ("input", "normalized_shape", "weight", "eps"),
        {"eps": None},
    ),
    (
        [F.group_norm],
        _channel_norm(formulas.group_norm),
        ("input", "num_groups", "weight", "bias", "eps"),
        {"eps": 1e-5, "training": False},
    ),
    (
        [F.batch_norm],
        _channel_norm(formulas.batch_norm),
        ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
        {"eps": 1e-5, "training": False},
    ),
    ([F.prelu], _prelu, ("input", "weight"), {}),
    ([F.bilinear], _bilinear, ("input1", "input2", "weight", "bias"), {}),
    ([torch.baddbmm], _baddbmm, ("input", "batch1", "batch2", "beta", "alpha"), {"beta": 1, "alpha": 1}),
    ([torch.bmm, Tensor.bmm], _baddbmm, ("batch1", "batch2"), {"input": None, "beta": 1, "alpha": 1}),
)
_NAMES = {func: names for funcs, _, names, _ in _TABLE for func in funcs}
_FORMULAS = {func: formula for funcs, formula, _, _ in _TABLE for func in funcs}
_DEFAULTS = {func: defaults for funcs, _, _, defaults in _TABLE for func in funcs}
