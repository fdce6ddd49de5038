"""A language model's output layer, fused with the loss: the widest tensor of the model is never made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay import ops
from assay.tasks.base import IGNORE

# Models that change their logits after the output layer, as Gemma 2's soft cap does.
_CHANGED: WeakSet[nn.Module] = WeakSet()


@dataclass(frozen=True)
class OutputLayer:
    """Logits that have not been made: hidden weightᵀ + bias, of shapes (N, D), (C, D) and (C,)."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None

    def logits(self) -> Tensor:
        """(N, C), made now."""
        return F.linear(self.hidden, self.weight, self.bias)


class FusedForward:
    """Stands in for an output layer's ``forward``: gives each position's loss (B, T) instead of its logits (B, T, C).

    Hooks on the layer see these losses as its output; ``labels`` says of what.
    """

    def __init__(self, module: nn.Linear, labels: Tensor) -> None:
        self.module, self.labels = module, labels
        self.hidden: Tensor | None = None
        self.losses: Tensor | None = None
        self.calls = 0

    def __call__(self, hidden: Tensor) -> Tensor:
        self.calls += 1
        weight, bias = self.module.weight, self.module.bias
        if hidden.shape != (*self.labels.shape, weight.shape[1]):
            return F.linear(hidden, weight, bias)  # not every position: found out by `is_output`
        self.hidden = hidden.detach()
        flat, labels = hidden.flatten(0, 1), self.labels.flatten().to(hidden.device)
        losses = ops.linear_cross_entropy(flat, weight, labels, bias=bias, ignore_index=IGNORE)
        self.losses = losses.view(self.labels.shape)
        return self.losses

    def is_output(self, output: Tensor) -> bool:
        """Whether the model returned what this gave it, so that these are its losses."""
        if self.losses is None or self.calls != 1 or output.shape != self.losses.shape:
            return False
        return torch.equal(output.detach().to(self.losses.dtype).nan_to_num(), self.losses.detach().nan_to_num())

    def output_layer(self) -> OutputLayer:
        assert self.hidden is not None
        bias = self.module.bias
        return OutputLayer(
            self.hidden.flatten(0, 1), self.module.weight.detach(), None if bias is None else bias.detach()
        )


@contextmanager
def fused(module: nn.Linear, labels: Tensor) -> Iterator[FusedForward]:
    """Let ``module`` give losses against ``labels`` (B, T) for as long as the block lasts."""
    stand_in = FusedForward(module, labels)
    module.forward = stand_in  # type: ignore[assignment, method-assign]
    try:
        yield stand_in
    finally:
        del module.forward


def find_output_layer(model: nn.Module, name: str | None) -> nn.Linear | None:
    """The layer to fuse: the one called ``name``, else what transformers says; None if it cannot be fused.

    Only a plain ``nn.Linear`` can be: a subclass or a patched ``forward`` may compute something else.

    Raises ValueError if there is no layer of that name, or if it is no plain ``nn.Linear``.
    """
    if name is not None:
        named = dict(model.named_modules()).get(name)
        if type(named) is not nn.Linear:
            found = "no such layer" if named is None else type(named).__name__
            raise ValueError(f"CausalLM: output_layer {name!r}: expected the name of an nn.Linear, found {found}")
        return named
    if model in _CHANGED or hasattr(model, "_orig_mod"):  # the latter: compiled by torch.compile
        return None
    get = getattr(model, "get_output_embeddings", None)
    layer = get() if callable(get) else None
    return layer if type(layer) is nn.Linear and "forward" not in vars(layer) else None


def remember_changed(model: nn.Module) -> None:
    """This model does something to its logits: do not fuse it again."""
    _CHANGED.add(model)
