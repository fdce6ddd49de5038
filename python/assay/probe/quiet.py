"""The model as it was found, and what in its graph is not the probe's."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from assay.probe.recurrent import stepwise


class _Shortcut:
    """Attention's shortcut, which is the process's: off from the first that leaves it until the last is back."""

    def __init__(self) -> None:
        self._lock, self._away, self._was_on = threading.Lock(), 0, True

    def leave(self) -> None:
        with self._lock:
            if self._away == 0:
                self._was_on = torch.backends.mha.get_fastpath_enabled()
                torch.backends.mha.set_fastpath_enabled(False)
            self._away += 1

    def come_back(self) -> None:
        with self._lock:
            self._away -= 1
            if self._away == 0:
                torch.backends.mha.set_fastpath_enabled(self._was_on)


_SHORTCUT = _Shortcut()
_LOOKED_AT: list[set[int]] = []  # ids of modules, by call of undisturbed


def is_looked_at(module: nn.Module) -> bool:
    """Whether a module runs within ``undisturbed``, and not for its trainer."""
    return any(id(module) in modules for modules in _LOOKED_AT)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run with the model in eval mode and all parameters frozen; afterwards it is exactly as it was found.

    Frozen, because a weight that asks for its gradient gets it: a third of the work of a training step,
    thrown away. Attention layers run their formula, not the shortcut that torch has for them without gradients: it
    passes their layers by. cuDNN's recurrent layers have a backward pass in training mode alone: they stay in it, and
    drop nothing.
    """
    training = [(module, module.training) for module in model.modules()]
    trainable = [p for p in model.parameters() if p.requires_grad]
    recurrent: list[Any] = [module for module, _ in training if _trains_alone(module)]
    dropouts = [module.dropout for module in recurrent]
    own = {id(module) for module, _ in training}
    _LOOKED_AT.append(own)
    try:
        _SHORTCUT.leave()
        for module, _ in training:
            module.training = False  # not eval(): models override it, and it could not be undone module by module
        for layer in recurrent:
            layer.training, layer.dropout = True, 0.0
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        _LOOKED_AT.remove(own)
        _SHORTCUT.come_back()
        for parameter in trainable:
            parameter.requires_grad_(True)
        for layer, dropout in zip(recurrent, dropouts, strict=True):
            layer.dropout = dropout
        for module, was_training in training:
            module.training = was_training


def _trains_alone(module: Any) -> bool:
    """Whether it is a recurrent layer of torch's own that cuDNN runs."""
    known = isinstance(module, nn.RNNBase) and stepwise(module) is not None
    return known and any(parameter.is_cuda for parameter in module.parameters())


@contextmanager
def exchanged(model: nn.Module, parameters: Mapping[str, Tensor]) -> Iterator[None]:
    """Run with other tensors in the parameters' places, by their first names, wherever a parameter is used.

    ``torch.func.functional_call`` does not put back the parameters of a module that has two names.
    """
    known = dict(model.named_parameters())
    others = {id(known[name]): tensor for name, tensor in parameters.items()}
    owners = [module._parameters for module in model.modules()]
    found = [(own, name, p) for own in owners for name, p in own.items() if id(p) in others]
    try:
        for own, name, p in found:
            own[name] = others[id(p)]  # type: ignore[assignment]
        yield
    finally:
        for own, name, p in found:
            own[name] = p


def on_gradient(output: Tensor, arrived: Callable[[Tensor], None]) -> None:
    """Call with a layer's output's gradient, also where the model goes on to modify the output in place.

    A linear layer may give a view of what it computed, and torch forgets a view's hooks when it is modified; not those
    of the tensor that is viewed, which nobody else has.
    """
    shape = output.shape
    _hooked(output).register_hook(lambda grads: arrived(grads.reshape(shape)))  # type: ignore[no-untyped-call]


def edge_of(output: Tensor) -> GradientEdge:
    """What autograd is asked for, so that the gradient arrives at the hook of ``on_gradient``."""
    return get_gradient_edge(_hooked(output))


def _hooked(output: Tensor) -> Tensor:
    whole = output._base
    return whole if whole is not None and whole.grad_fn is not None and _all_of(whole, output) else output


def _all_of(whole: Tensor, view: Tensor) -> bool:
    return whole.numel() == view.numel() and whole.is_contiguous() and view.is_contiguous()


@dataclass
class Inside:
    """The nodes of a graph that lie within calls of layers, and those by which a call is entered."""

    nodes: set[Any] = field(default_factory=set)
    entries: set[Any] = field(default_factory=set)

    def add(self, inputs: Sequence[Tensor], output: Tensor) -> None:
        """What a layer made of these inputs."""
        ends = {get_gradient_edge(x).node for x in inputs if x.requires_grad}
        self.entries |= {output.grad_fn, _hooked(output).grad_fn}
        stack: list[Any] = [output.grad_fn]
        while stack:
            node = stack.pop()
            if node is not None and node not in ends and node not in self.nodes:
                self.nodes.add(node)
                stack += [after for after, _ in node.next_functions]

    def clear(self) -> None:
        """Forget them: a node and a hook of it hold one another."""
        self.nodes, self.entries = set(), set()

    def passed_by(self, losses: Tensor, own: Collection[Tensor]) -> Tensor | None:
        """One of our leaves that the losses depend on by another way than through a call."""
        known = {id(leaf): leaf for leaf in own}
        for node, after in _edges(losses.grad_fn):
            if node not in self.nodes and after not in self.entries:
                leaf = getattr(after, "variable", None)
                if id(leaf) in known:
                    return leaf
                if after in self.nodes:  # a weight's cast to another type, say
                    below = (getattr(end, "variable", None) for _, end in _edges(after))
                    return next((leaf for leaf in below if id(leaf) in known), None)
        return None


def _edges(root: Any) -> Iterator[tuple[Any, Any]]:
    """(node, what comes after it on the way back) of a graph."""
    stack, seen = [root], {root}
    while stack:
        node = stack.pop()
        for after, _ in node.next_functions if node is not None else ():
            if after is not None:
                yield node, after
                if after not in seen:
                    seen.add(after)
                    stack.append(after)


def other_leaves(losses: Tensor, own: Collection[Tensor]) -> list[Tensor]:
    """Tensors that ask for gradients and are not ours: a hook of the model's, or a tensor that it keeps.

    Without them autograd would not enter the part of the graph that starts there, nor reach the layers tapped in it.
    """
    known = {id(leaf) for leaf in own}
    leaves = {
        id(leaf): leaf for _, after in _edges(losses.grad_fn) if (leaf := getattr(after, "variable", None)) is not None
    }
    # not a parameter in what the model has kept
    return [leaf for key, leaf in leaves.items() if key not in known and leaf.requires_grad]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out; torch's CPU allocator and CUDA's libraries say so only in words."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # cuBLAS and cuDNN have their own: CUBLAS_STATUS_ALLOC_FAILED, CUDNN_STATUS_..._ALLOCATION_FAILED.
    words = ("not enough memory", "DefaultCPUAllocator", "out of memory", "ALLOC_FAILED", "ALLOCATION_FAILED")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
