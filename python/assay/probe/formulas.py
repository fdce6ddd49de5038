"""The formulas of layers: how an input and an output gradient become a per-sample parameter gradient.

A ``module`` is looked at for its options alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.probe.terms import Convolution, Dense
from assay.tasks.base import Lazy, wide

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
ConvTranspose = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


@dataclass(frozen=True)
class Factors:
    """The two sides of a layer's per-sample weight gradient, one entry per position t.

    ``kind`` says how they combine to the gradient of sample b, viewed as the weight:

    - ``"outer"``: Σ_t grads[b,t]ᵀ inputs[b,t]; ``inputs`` (B, T, I), ``grads`` (B, T, O). Linear and
      convolutions (T positions of the output, I = channels × kernel). For transformers' Conv1D the weight is
      this, transposed.
    - ``"scatter"``: row inputs[b,t] gets grads[b,t]; ``inputs`` (B, T) int64, ``grads`` (B, T, D).
      Embeddings.
    - ``"elementwise"``: Σ_t grads[b,t] · inputs[b,t]; ``inputs`` (B, T, D) normalised, ``grads`` (B, T, D).
      Norms.

    A layer called twice in a forward pass has both calls end to end along T. The ``grads`` of a fused output layer,
    (B, T, vocabulary), are made when they are first read.
    """

    inputs: Tensor
    grads: Tensor = Lazy()  # type: ignore[assignment]
    kind: Literal["outer", "scatter", "elementwise"] = "outer"


# ---- Linear, Conv1D of transformers, Embedding


def scale(factors: Factors, shape: Sequence[int]) -> Dense:
    """The gradient of a weight of this shape that multiplies what is normalised, element by element."""
    return Dense((wide(factors.inputs) * wide(factors.grads)).sum(1).reshape(-1, *shape))


def shift(rows: Tensor, shape: Sequence[int] | None = None) -> Dense:
    """The gradient of what is added to every row: (B, T, D) -> (B, D), or of a ``shape`` of its own."""
    total = rows.sum(1, dtype=wide(rows[:0]).dtype)
    return Dense(total if shape is None else total.reshape(-1, *shape))


def last(module: nn.Module, tensor: Tensor) -> Tensor:
    return tensor.reshape(len(tensor), -1, tensor.shape[-1])


def linear(module: nn.Module, inputs: Tensor, grads: Tensor) -> Factors:
    return Factors(last(module, inputs), last(module, grads))


def embedding(module: nn.Embedding, ids: Tensor, grads: Tensor) -> Factors:
    ids = ids.reshape(len(ids), -1).long()
    grads = last(module, grads)
    if module.padding_idx is not None:
        grads = grads.masked_fill((ids == module.padding_idx)[..., None], 0)
    return Factors(ids, grads, "scatter")


def scaled_embedding(module: Any, ids: Tensor, grads: Tensor) -> Factors:
    """An embedding times ``embed_scale``, which a buffer holds in another precision than the weight's."""
    scale = module.embed_scale
    scale = scale.to(module.weight.dtype) if isinstance(scale, Tensor) else scale
    return embedding(module, ids, grads * scale)


def embedding_refusal(module: nn.Embedding | nn.EmbeddingBag) -> str | None:
    if module.max_norm is not None:
        return "max_norm changes the weight during the forward pass"
    if module.scale_grad_by_freq:
        return "scale_grad_by_freq makes a sample's gradient depend on the other samples"
    if module.sparse:
        return "sparse=True; set it to False, which computes the same values"
    return None


# ---- Convolutions


def channels(module: nn.Module, tensor: Tensor) -> Tensor:
    """(B, C, *positions) -> (B, T, C)."""
    return tensor.reshape(*tensor.shape[:2], -1).mT


def convolution(module: Conv, inputs: Tensor, grads: Tensor) -> Convolution:
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = F.pad(inputs, module._reversed_padding_repeated_twice, mode=mode)
    return Convolution(padded, grads, module.kernel_size, module.stride, module.dilation, module.groups)


def conv(module: Conv, inputs: Tensor, grads: Tensor) -> Factors:
    outer = convolution(module, inputs, grads).outer()
    return Factors(outer.right, outer.left)


def transposed(module: ConvTranspose, inputs: Tensor, grads: Tensor) -> Convolution:
    """It is the adjoint of a convolution of the output with the same weight: ⟨y(x), g⟩ = ⟨x, conv(g)⟩."""
    kernel: Any = module.kernel_size
    sizes: Any = module.padding
    padded = F.pad(grads, [n for size in reversed(sizes) for n in (size, size)])
    for axis, (size, stride, dilation) in enumerate(zip(kernel, module.stride, module.dilation, strict=True), 2):
        # An output padding as large as the stride adds outputs that no input reaches.
        padded = padded.narrow(axis, 0, (inputs.shape[axis] - 1) * stride + dilation * (size - 1) + 1)
    return Convolution(padded, inputs, kernel, module.stride, module.dilation, module.groups)


def conv_transpose(module: ConvTranspose, inputs: Tensor, grads: Tensor) -> Factors:
    outer = transposed(module, inputs, grads).outer()
    return Factors(outer.right, outer.left)


# ---- PReLU: the gradient of the slope is what it was multiplied with


def prelu(module: nn.PReLU, inputs: Tensor, grads: Tensor) -> Factors:
    negative = inputs.clamp(max=0)
    if module.num_parameters > 1:
        return Factors(channels(module, negative), channels(module, grads), "elementwise")
    size = len(inputs)
    return Factors(negative.reshape(size, -1, 1), grads.reshape(size, -1, 1), "elementwise")


# ---- Norms: the gradient of the scale is the normalised input times the output gradient


def layer_norm(module: nn.LayerNorm, inputs: Tensor, grads: Tensor) -> Factors:
    normal = F.layer_norm(wide(inputs), module.normalized_shape, None, None, module.eps)
    return Factors(trailing(module, normal), trailing(module, grads), "elementwise")


def rms_norm(module: nn.RMSNorm, inputs: Tensor, grads: Tensor) -> Factors:
    # Without an eps of its own it takes that of the input's dtype, which must then not be widened.
    inputs = inputs if module.eps is None else wide(inputs)
    normal = F.rms_norm(inputs, module.normalized_shape, None, module.eps)
    return Factors(trailing(module, normal), trailing(module, grads), "elementwise")


def llama_rms_norm(module: nn.Module, inputs: Tensor, grads: Tensor) -> Factors:
    """x / sqrt(mean(x²) + eps), scaled by the weight or, as in Gemma, by one plus the weight."""
    x = wide(inputs)
    normal = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + llama_eps(module))
    return Factors(last(module, normal), last(module, grads), "elementwise")


def llama_eps(module: nn.Module) -> Any:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


def group_norm(module: nn.GroupNorm, inputs: Tensor, grads: Tensor) -> Factors:
    normal = F.group_norm(wide(inputs), module.num_groups, None, None, module.eps)
    return Factors(channels(module, normal), channels(module, grads), "elementwise")


def batch_norm(module: nn.BatchNorm2d, inputs: Tensor, grads: Tensor) -> Factors:
    x = wide(inputs)
    assert module.running_mean is not None  # refused otherwise
    assert module.running_var is not None
    mean, variance = module.running_mean.to(x.dtype), module.running_var.to(x.dtype)
    normal = F.batch_norm(x, mean, variance, None, None, training=False, eps=module.eps)
    return Factors(channels(module, normal), channels(module, grads), "elementwise")


def instance_norm(module: nn.InstanceNorm2d, inputs: Tensor, grads: Tensor) -> Factors:
    if module.running_mean is not None:
        return batch_norm(module, inputs, grads)  # type: ignore[arg-type]  # in eval mode it is one
    return Factors(
        channels(module, F.instance_norm(wide(inputs), eps=module.eps)), channels(module, grads), "elementwise"
    )


def batch_norm_refusal(module: nn.BatchNorm2d) -> str | None:
    if module.running_mean is None or module.running_var is None:
        return "without running statistics it normalises with the batch's own, which couples the samples"
    return None


def trailing(module: nn.LayerNorm | nn.RMSNorm, tensor: Tensor) -> Tensor:
    """(B, *positions, *normalized_shape) -> (B, T, D)."""
    return tensor.reshape(len(tensor), -1, math.prod(module.normalized_shape))


def trailing_ndim(module: nn.LayerNorm | nn.RMSNorm) -> int:
    return 1 + len(module.normalized_shape)


def conv_ndim(module: Conv | ConvTranspose) -> int:
    return 2 + len(module.kernel_size)


def two(module: nn.Module) -> int:
    return 2
