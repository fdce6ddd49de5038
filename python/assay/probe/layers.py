"""What the probe knows about layers: how an input and an output gradient become a per-sample parameter
gradient.

Only types whose formula is known exactly have a rule. A subclass has none: it may compute something else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.probe.experts import are_experts
from assay.probe.gradient import Convolution, Dense, Outer, Scatter, Term
from assay.tasks.base import Lazy, wide

_Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
_ConvTranspose = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


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


@dataclass(frozen=True)
class Rule:
    """One kind of layer. The functions get the module, its one input (B, ...) and its output's gradient (B,
    ...).

    Attributes:
        factors: input and output gradient -> the weight's factors.
        rows: output gradient -> (B, T, O), a row per position; their sum over T is the bias' gradient.
        ndim: the fewest dimensions of an input that has a batch dimension.
        refusal: why this module cannot be tapped, or None.
        weight: input and output gradient -> the weight's gradient, where the factors are not its best form.
        transposed: the weight is (I, O).
        routed: a mixture's experts, called with tokens, indices and weights; they have no factors (see ``Routing``).
        trailing: positions are independent of one another, whatever the dimensions before the last are.
    """

    factors: Callable[[Any, Tensor, Tensor], Factors]
    rows: Callable[[Any, Tensor], Tensor]
    ndim: Callable[[Any], int]
    refusal: Callable[[Any], str | None] = lambda module: None
    weight: Callable[[Any, Tensor, Tensor], Term] | None = None
    transposed: bool = False
    trailing: bool = False
    routed: bool = False

    def term(self, module: nn.Module, name: str, inputs: Tensor, grads: Tensor) -> Term:
        """The gradient of the module's parameter ``name`` ("weight" or "bias") from one call."""
        if name == "bias":
            bias = self.rows(module, grads).sum(1, dtype=wide(grads[:0]).dtype)
            return Dense(bias.reshape(-1, *module.get_parameter(name).shape))
        if self.weight is not None:
            return self.weight(module, inputs, grads)
        factors = self.factors(module, inputs, grads)
        if factors.kind == "scatter":
            return Scatter(factors.inputs, factors.grads)
        if factors.kind == "elementwise":
            scale = (wide(factors.inputs) * wide(factors.grads)).sum(1)
            return Dense(scale.reshape(-1, *module.get_parameter(name).shape))
        if self.transposed:
            return Outer(factors.inputs, factors.grads)
        return Outer(factors.grads, factors.inputs)


def find_rule(module: nn.Module) -> Rule | str:
    """The rule for a module that owns parameters, or the reason why there is none."""
    if are_experts(module):
        return _EXPERTS
    rule = _RULES.get(type(module)) or _by_class_name(module)
    if rule is None:
        return f"no exact formula is known for {type(module).__module__}.{type(module).__qualname__}"
    if extra := sorted(name for name, _ in module.named_parameters(recurse=False) if name not in ("weight", "bias")):
        return f"it has parameters that a plain {type(module).__name__} has not: {', '.join(extra)}"
    return rule.refusal(module) or rule


def follows_parameters(module: nn.Module) -> bool:
    """Whether a module without a rule computes with parameters of its own by operations that a probe can follow."""
    cls = type(module)
    if cls in (nn.ParameterList, nn.ParameterDict):
        return True
    containers = (nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict)
    layers = [c for c in cls.__mro__ if c.__module__.startswith("torch.") and c not in containers]
    return not layers and not cls.__name__.endswith("Experts")  # whose tokens are gathered by expert


def _by_class_name(module: nn.Module) -> Rule | None:
    """Layers of transformers and its kin, recognised without importing them."""
    cls = type(module)
    if cls.__name__ == "Conv1D" and cls.__module__.startswith("transformers."):
        return _CONV1D
    if cls.__name__.endswith("ScaledWordEmbedding") and cls.__bases__ == (nn.Embedding,):
        return _SCALED_EMBEDDING if cls.__module__.startswith("transformers.") else None
    names = [name for name, _ in module.named_parameters(recurse=False)]
    is_rms = cls.__name__.endswith(("RMSNorm", "T5LayerNorm")) and names == ["weight"]
    return _LLAMA_RMS_NORM if is_rms and _llama_eps(module) is not None else None


# ---- Linear, Conv1D of transformers, Embedding


def _last(module: nn.Module, tensor: Tensor) -> Tensor:
    return tensor.reshape(len(tensor), -1, tensor.shape[-1])


def _linear(module: nn.Module, inputs: Tensor, grads: Tensor) -> Factors:
    return Factors(_last(module, inputs), _last(module, grads))


def _embedding(module: nn.Embedding, ids: Tensor, grads: Tensor) -> Factors:
    ids = ids.reshape(len(ids), -1).long()
    grads = _last(module, grads)
    if module.padding_idx is not None:
        grads = grads.masked_fill((ids == module.padding_idx)[..., None], 0)
    return Factors(ids, grads, "scatter")


def _scaled_embedding(module: Any, ids: Tensor, grads: Tensor) -> Factors:
    """An embedding times ``embed_scale``, which a buffer holds in another precision than the weight's."""
    scale = module.embed_scale
    scale = scale.to(module.weight.dtype) if isinstance(scale, Tensor) else scale
    return _embedding(module, ids, grads * scale)


def _embedding_refusal(module: nn.Embedding) -> str | None:
    if module.max_norm is not None:
        return "max_norm changes the weight during the forward pass"
    if module.scale_grad_by_freq:
        return "scale_grad_by_freq makes a sample's gradient depend on the other samples"
    if module.sparse:
        return "sparse=True; set it to False, which computes the same values"
    return None


# ---- Convolutions


def _channels(module: nn.Module, tensor: Tensor) -> Tensor:
    """(B, C, *positions) -> (B, T, C)."""
    return tensor.reshape(*tensor.shape[:2], -1).mT


def _convolution(module: _Conv, inputs: Tensor, grads: Tensor) -> Convolution:
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = F.pad(inputs, module._reversed_padding_repeated_twice, mode=mode)
    return Convolution(padded, grads, module.kernel_size, module.stride, module.dilation, module.groups)


def _conv(module: _Conv, inputs: Tensor, grads: Tensor) -> Factors:
    outer = _convolution(module, inputs, grads).outer()
    return Factors(outer.right, outer.left)


def _transposed(module: _ConvTranspose, inputs: Tensor, grads: Tensor) -> Convolution:
    """It is the adjoint of a convolution of the output with the same weight: ⟨y(x), g⟩ = ⟨x, conv(g)⟩."""
    kernel: Any = module.kernel_size
    sizes: Any = module.padding
    padded = F.pad(grads, [n for size in reversed(sizes) for n in (size, size)])
    for axis, (size, stride, dilation) in enumerate(zip(kernel, module.stride, module.dilation, strict=True), 2):
        # An output padding as large as the stride adds outputs that no input reaches.
        padded = padded.narrow(axis, 0, (inputs.shape[axis] - 1) * stride + dilation * (size - 1) + 1)
    return Convolution(padded, inputs, kernel, module.stride, module.dilation, module.groups)


def _conv_transpose(module: _ConvTranspose, inputs: Tensor, grads: Tensor) -> Factors:
    outer = _transposed(module, inputs, grads).outer()
    return Factors(outer.right, outer.left)


# ---- PReLU: the gradient of the slope is what it was multiplied with


def _prelu(module: nn.PReLU, inputs: Tensor, grads: Tensor) -> Factors:
    negative = inputs.clamp(max=0)
    if module.num_parameters > 1:
        return Factors(_channels(module, negative), _channels(module, grads), "elementwise")
    size = len(inputs)
    return Factors(negative.reshape(size, -1, 1), grads.reshape(size, -1, 1), "elementwise")


# ---- Norms: the gradient of the scale is the normalised input times the output gradient


def _layer_norm(module: nn.LayerNorm, inputs: Tensor, grads: Tensor) -> Factors:
    normal = F.layer_norm(wide(inputs), module.normalized_shape, None, None, module.eps)
    return Factors(_trailing(module, normal), _trailing(module, grads), "elementwise")


def _rms_norm(module: nn.RMSNorm, inputs: Tensor, grads: Tensor) -> Factors:
    # Without an eps of its own it takes that of the input's dtype, which must then not be widened.
    inputs = inputs if module.eps is None else wide(inputs)
    normal = F.rms_norm(inputs, module.normalized_shape, None, module.eps)
    return Factors(_trailing(module, normal), _trailing(module, grads), "elementwise")


def _llama_rms_norm(module: nn.Module, inputs: Tensor, grads: Tensor) -> Factors:
    """x / sqrt(mean(x²) + eps), scaled by the weight or, as in Gemma, by one plus the weight."""
    x = wide(inputs)
    normal = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + _llama_eps(module))
    return Factors(_last(module, normal), _last(module, grads), "elementwise")


def _llama_eps(module: nn.Module) -> Any:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


def _group_norm(module: nn.GroupNorm, inputs: Tensor, grads: Tensor) -> Factors:
    normal = F.group_norm(wide(inputs), module.num_groups, None, None, module.eps)
    return Factors(_channels(module, normal), _channels(module, grads), "elementwise")


def _batch_norm(module: nn.BatchNorm2d, inputs: Tensor, grads: Tensor) -> Factors:
    x = wide(inputs)
    assert module.running_mean is not None  # refused otherwise
    assert module.running_var is not None
    mean, variance = module.running_mean.to(x.dtype), module.running_var.to(x.dtype)
    normal = F.batch_norm(x, mean, variance, None, None, training=False, eps=module.eps)
    return Factors(_channels(module, normal), _channels(module, grads), "elementwise")


def _instance_norm(module: nn.InstanceNorm2d, inputs: Tensor, grads: Tensor) -> Factors:
    if module.running_mean is not None:
        return _batch_norm(module, inputs, grads)  # type: ignore[arg-type]  # in eval mode it is one
    return Factors(
        _channels(module, F.instance_norm(wide(inputs), eps=module.eps)), _channels(module, grads), "elementwise"
    )


def _batch_norm_refusal(module: nn.BatchNorm2d) -> str | None:
    if module.running_mean is None or module.running_var is None:
        return "without running statistics it normalises with the batch's own, which couples the samples"
    return None


def _trailing(module: nn.LayerNorm | nn.RMSNorm, tensor: Tensor) -> Tensor:
    """(B, *positions, *normalized_shape) -> (B, T, D)."""
    return tensor.reshape(len(tensor), -1, math.prod(module.normalized_shape))


def _trailing_ndim(module: nn.LayerNorm | nn.RMSNorm) -> int:
    return 1 + len(module.normalized_shape)


def _conv_ndim(module: _Conv | _ConvTranspose) -> int:
    return 2 + len(module.kernel_size)


def _two(module: nn.Module) -> int:
    return 2


_CONV1D = Rule(_linear, _last, _two, transposed=True, trailing=True)
_CONV_TRANSPOSE = Rule(_conv_transpose, _channels, _conv_ndim, weight=_transposed)
_CONVOLUTION = Rule(_conv, _channels, _conv_ndim, weight=_convolution)
_LLAMA_RMS_NORM = Rule(_llama_rms_norm, _last, _two, trailing=True)
_EXPERTS = Rule(_linear, _last, _two, routed=True)
_SCALED_EMBEDDING = Rule(_scaled_embedding, _last, lambda module: 1, _embedding_refusal, trailing=True)
_BATCH_NORM = Rule(_batch_norm, _channels, _two, _batch_norm_refusal)
_RULES: Mapping[type[nn.Module], Rule] = {
    nn.Linear: Rule(_linear, _last, _two, trailing=True),
    nn.Conv1d: _CONVOLUTION,
    nn.Conv2d: _CONVOLUTION,
    nn.Conv3d: _CONVOLUTION,
    nn.Embedding: Rule(_embedding, _last, lambda module: 1, _embedding_refusal, trailing=True),
    nn.LayerNorm: Rule(_layer_norm, _trailing, _trailing_ndim, trailing=True),
    nn.RMSNorm: Rule(_rms_norm, _trailing, _trailing_ndim, trailing=True),
    nn.GroupNorm: Rule(_group_norm, _channels, _two),
    nn.BatchNorm1d: _BATCH_NORM,
    nn.BatchNorm2d: _BATCH_NORM,
    nn.BatchNorm3d: _BATCH_NORM,
    nn.SyncBatchNorm: _BATCH_NORM,
    nn.InstanceNorm1d: Rule(_instance_norm, _channels, lambda module: 3),
    nn.InstanceNorm2d: Rule(_instance_norm, _channels, lambda module: 4),
    nn.InstanceNorm3d: Rule(_instance_norm, _channels, lambda module: 5),
    nn.ConvTranspose1d: _CONV_TRANSPOSE,
    nn.ConvTranspose2d: _CONV_TRANSPOSE,
    nn.ConvTranspose3d: _CONV_TRANSPOSE,
    nn.PReLU: Rule(_prelu, _channels, _two),
}
