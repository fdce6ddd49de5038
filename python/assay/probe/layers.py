"""Which layers the probe knows, and the formula of each.

A rule stands for exactly one type. What has none may still be followed, operation by operation (``shared.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrize import ParametrizationList

from assay.ops._exact import exact
from assay.probe import formulas
from assay.probe.experts import are_experts
from assay.probe.formulas import Factors
from assay.probe.recurrent import stepwise
from assay.probe.terms import Outer, Scatter, Term
from assay.tasks.base import wide


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
            return formulas.shift(self.rows(module, grads), module.get_parameter(name).shape)
        if self.weight is not None:
            return self.weight(module, inputs, grads)
        factors = self.factors(module, inputs, grads)
        if factors.kind == "scatter":
            return Scatter(factors.inputs, factors.grads)
        if factors.kind == "elementwise":
            return formulas.scale(factors, module.get_parameter(name).shape)
        if self.transposed:
            return Outer(factors.inputs, factors.grads)
        return Outer(factors.grads, factors.inputs)

    @property
    def by_position(self) -> bool:
        """Whether what a position gives of the gradient follows from that position alone, and is known."""
        return self.trailing and not self.routed

    def dot_by_position(self, module: nn.Module, name: str, inputs: Tensor, grads: Tensor, direction: Tensor) -> Tensor:
        """What each position gives of the inner product of a gradient, as in ``term``, and a direction, (B, T)."""
        factors = None if name == "bias" else self.factors(module, inputs, grads)
        left = self.rows(module, grads) if factors is None else factors.grads
        dtype = torch.promote_types(wide(left[:0]).dtype, direction.dtype)
        left = left.to(dtype)
        if factors is not None and factors.kind == "scatter":
            return (direction[factors.inputs].to(dtype) * left).sum(2)
        along = direction.to(dtype)
        with exact():
            if factors is None:
                return left @ along.flatten()
            right = factors.inputs.to(dtype)
            if factors.kind == "elementwise":
                return (right * left) @ along.flatten()
            return (left @ (along.T if self.transposed else along) * right).sum(2)


def find_rule(module: nn.Module) -> Rule | str:
    """The rule for a module that owns parameters, or the reason why there is none."""
    if are_experts(module):
        return _EXPERTS
    rule = _RULES.get(type(module)) or _by_class_name(module)
    if rule is None:
        if isinstance(module, nn.EmbeddingBag) and (refusal := formulas.embedding_refusal(module)) is not None:
            return refusal
        return f"no exact formula is known for {type(module).__module__}.{type(module).__qualname__}"
    if extra := sorted(name for name, _ in module.named_parameters(recurse=False) if name not in ("weight", "bias")):
        return f"it has parameters that a plain {type(module).__name__} has not: {', '.join(extra)}"
    return rule.refusal(module) or rule


def follows_parameters(module: nn.Module) -> bool:
    """Whether a module without a rule computes with parameters of its own by operations that a probe can follow."""
    cls = type(module)
    if stepwise(module) is not None:
        return True
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and formulas.embedding_refusal(module) is not None:
        return False
    if cls in _FOLLOWED:
        return not (isinstance(module, nn.EmbeddingBag) and module.mode == "max")
    if isinstance(module, _KNOWN):  # what a subclass makes of the weight is seen; a hook that sets it is not
        return cls not in _RULES
    containers = (nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict)
    layers = [c for c in cls.__mro__ if c.__module__.startswith("torch.") and c not in containers]
    # Experts gather tokens; Llama 4's all get all of them.
    return not layers and (not cls.__name__.endswith("Experts") or cls.__name__ == "Llama4TextExperts")


def _by_class_name(module: nn.Module) -> Rule | None:
    """Layers of transformers and its kin, recognised without importing them."""
    cls = type(module)
    if cls.__name__ == "Conv1D" and cls.__module__.startswith("transformers."):
        return _CONV1D
    if cls.__name__.endswith("ScaledWordEmbedding") and cls.__bases__ == (nn.Embedding,):
        return _SCALED_EMBEDDING if cls.__module__.startswith("transformers.") else None
    names = [name for name, _ in module.named_parameters(recurse=False)]
    is_rms = cls.__name__.endswith(("RMSNorm", "T5LayerNorm")) and names == ["weight"]
    return _LLAMA_RMS_NORM if is_rms and formulas.llama_eps(module) is not None else None


_CONV1D = Rule(formulas.linear, formulas.last, formulas.two, transposed=True, trailing=True)
_CONV_TRANSPOSE = Rule(formulas.conv_transpose, formulas.channels, formulas.conv_ndim, weight=formulas.transposed)
_CONVOLUTION = Rule(formulas.conv, formulas.channels, formulas.conv_ndim, weight=formulas.convolution)
_LLAMA_RMS_NORM = Rule(formulas.llama_rms_norm, formulas.last, formulas.two, trailing=True)
_EXPERTS = Rule(formulas.linear, formulas.last, formulas.two, routed=True)
_SCALED_EMBEDDING = Rule(
    formulas.scaled_embedding, formulas.last, lambda module: 1, formulas.embedding_refusal, trailing=True
)
_BATCH_NORM = Rule(formulas.batch_norm, formulas.channels, formulas.two, formulas.batch_norm_refusal)
_RULES: Mapping[type[nn.Module], Rule] = {
    nn.Linear: Rule(formulas.linear, formulas.last, formulas.two, trailing=True),
    nn.Conv1d: _CONVOLUTION,
    nn.Conv2d: _CONVOLUTION,
    nn.Conv3d: _CONVOLUTION,
    nn.Embedding: Rule(formulas.embedding, formulas.last, lambda module: 1, formulas.embedding_refusal, trailing=True),
    nn.LayerNorm: Rule(formulas.layer_norm, formulas.trailing, formulas.trailing_ndim, trailing=True),
    nn.RMSNorm: Rule(formulas.rms_norm, formulas.trailing, formulas.trailing_ndim, trailing=True),
    nn.GroupNorm: Rule(formulas.group_norm, formulas.channels, formulas.two),
    nn.BatchNorm1d: _BATCH_NORM,
    nn.BatchNorm2d: _BATCH_NORM,
    nn.BatchNorm3d: _BATCH_NORM,
    nn.SyncBatchNorm: _BATCH_NORM,
    nn.InstanceNorm1d: Rule(formulas.instance_norm, formulas.channels, lambda module: 3),
    nn.InstanceNorm2d: Rule(formulas.instance_norm, formulas.channels, lambda module: 4),
    nn.InstanceNorm3d: Rule(formulas.instance_norm, formulas.channels, lambda module: 5),
    nn.ConvTranspose1d: _CONV_TRANSPOSE,
    nn.ConvTranspose2d: _CONV_TRANSPOSE,
    nn.ConvTranspose3d: _CONV_TRANSPOSE,
    nn.PReLU: Rule(formulas.prelu, formulas.channels, formulas.two),
}
_KNOWN = (*_RULES, nn.EmbeddingBag, nn.Bilinear)
_FOLLOWED = (
    *(nn.ParameterList, nn.ParameterDict, ParametrizationList, nn.EmbeddingBag, nn.Bilinear),
    *(nn.MultiheadAttention, NonDynamicallyQuantizableLinear),
)
