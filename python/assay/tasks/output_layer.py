"""A language model's output layer, fused with the loss: the widest tensor of the model is never made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

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

    def padded(self, classes: int) -> OutputLayer:
        """The same over more classes, which have probability 0."""
        more = classes - len(self.weight)
        if more == 0:
            return self
        bias = self.weight.new_zeros(len(self.weight)) if self.bias is None else self.bias
        return OutputLayer(self.hidden, F.pad(self.weight, (0, 0, 0, more)), F.pad(bias, (0, more), value=-torch.inf))


class LogitsUsed(Exception):
    """Logits that were not made have been used: the model must run as it is."""


# What may be asked of logits that have not been made, because the answer is that of the real ones.
_SAME_ANSWER = frozenset(
    [
        Tensor.size,
        Tensor.dim,
        Tensor.numel,
        *(getattr(Tensor, name).__get__ for name in ("shape", "ndim", "device", "layout", "is_cuda")),
    ]
)


_SCALES = (Tensor.mul, Tensor.__mul__, Tensor.div, Tensor.__truediv__, torch.mul, torch.div)


def _changes_nothing(func: Any, args: Any) -> bool:
    if func in _SCALES:
        return len(args) == 2 and type(args[1]) in (int, float) and args[1] == 1
    return func is Tensor.float and args[0]._dtype == torch.float32


class UnmadeLogits(Tensor):
    """Logits (B, T, C) that can be handed on and nothing else.

    They hold no numbers. Whatever is done to them (a cut, a mask, a cast, a look at a value) raises ``LogitsUsed`` and
    is remembered, also where the model catches the error: nothing that a model does to its logits depends on luck with
    the values of a batch. Only what cannot change any tensor, a scale that is the number 1 or a cast to their own type,
    gives them back.

    Attributes:
        losses: (B, T), each position's cross entropy with its autograd graph. Taps replace it by what they tapped.
        source: the losses, or what makes them when they are first asked for.
        labels: (B, T), of what; -100 where nothing is predicted.
        used: whether anything was done to the logits.
    """

    source: Tensor | Callable[[], Tensor]
    labels: Tensor
    used: bool
    _dtype: torch.dtype

    @staticmethod
    def __new__(
        cls,
        losses: Tensor | Callable[[], Tensor],
        labels: Tensor,
        classes: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> UnmadeLogits:
        made: UnmadeLogits = Tensor._make_wrapper_subclass(cls, (*labels.shape, classes), dtype=dtype, device=device)
        made.source, made.labels, made.used, made._dtype = losses, labels, False, dtype
        return made

    @property
    def losses(self) -> Tensor:
        if not isinstance(self.source, Tensor):
            self.source = self.source()
        return self.source

    @losses.setter
    def losses(self, losses: Tensor) -> None:
        self.source = losses

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _SAME_ANSWER:
            return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        if not kwargs and _changes_nothing(func, args):
            return args[0]
        return cls.__torch_dispatch__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, UnmadeLogits):
                value.used = True
        raise LogitsUsed(f"{getattr(func, '__name__', func)} of logits that were fused with their loss")


class FusedForward:
    """Stands in for an output layer's ``forward``: gives each position's loss (B, T) instead of its logits (B, T, C).

    The losses travel as ``UnmadeLogits``.
    """

    def __init__(self, module: nn.Linear, labels: Tensor) -> None:
        self.module, self.labels = module, labels
        self.output: UnmadeLogits | None = None
        self.failed = False
        self._hidden: Tensor | None = None
        self._version = 0

    def __call__(self, hidden: Tensor) -> Tensor:
        weight, bias = self.module.weight, self.module.bias
        if self.output is not None or hidden.shape != (*self.labels.shape, weight.shape[1]):
            self.failed = True  # not every position, or more than once
            raise LogitsUsed("the output layer does not run once over all positions")
        if hidden.is_inference():
            hidden = hidden.clone()  # nobody counts what the model may yet change in place
        self._hidden, self._version = hidden.detach(), _version(hidden)
        losses = self._losses(hidden, weight, bias)
        made = losses() if torch.is_grad_enabled() else losses
        self.output = UnmadeLogits(made, self.labels, len(weight), _dtype_of(hidden), hidden.device)
        return self.output

    def _losses(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Callable[[], Tensor]:
        """Makes them when first asked: who only wants statistics of the logits has the losses among these."""
        graph = torch.is_grad_enabled()

        @cache
        def make() -> Tensor:
            flat, labels = hidden.flatten(0, 1), self.labels.flatten().to(hidden.device)
            with torch.set_grad_enabled(graph):
                losses = ops.linear_cross_entropy(flat, weight, labels, bias=bias, ignore_index=IGNORE)
            return losses.view(self.labels.shape)

        return make

    @property
    def changed(self) -> bool:
        """Whether the model does more with this layer's logits than to hand them on."""
        return self.failed or (self.output is not None and self.output.used)

    def is_output(self, output: Tensor) -> bool:
        """Whether the model returned what this gave it, so that these are its losses."""
        if self.changed or self._hidden is None or output is not self.output:
            return False
        return _version(self._hidden) == self._version  # else the logits can no longer be made

    def output_layer(self) -> OutputLayer:
        assert self._hidden is not None
        bias = self.module.bias
        return OutputLayer(
            self._hidden.flatten(0, 1), self.module.weight.detach(), None if bias is None else bias.detach()
        )


def _dtype_of(hidden: Tensor) -> torch.dtype:
    """What the layer's own product would have."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def _version(tensor: Tensor) -> int:
    """Counts changes in place; one made in inference mode has no count, and is here a copy that nobody else has."""
    return 0 if tensor.is_inference() else tensor._version


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
