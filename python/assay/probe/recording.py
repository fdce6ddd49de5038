"""One forward and backward pass with taps on layers: the only place where assay touches a model's hooks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from assay.probe.gradient import Dense, PerSampleGradient, Term
from assay.probe.head import Head
from assay.probe.layers import Factors
from assay.probe.reductions import Displaced, Feature, Reduction
from assay.probe.selection import Tap


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run with the model in eval mode and all parameters frozen; afterwards it is exactly as it was found.

    Frozen, because a weight that asks for its gradient gets it: a third of the work of a training step,
    thrown away.
    """
    training = [(module, module.training) for module in model.modules()]
    trainable = [p for p in model.parameters() if p.requires_grad]
    try:
        for module, _ in training:
            module.training = False  # not eval(): models override it, and it could not be undone module by module
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        for module, was_training in training:
            module.training = was_training


@dataclass
class _Call:
    """One call of a tapped layer. ``open`` counts the layer's parameters that still need it.

    A fused output layer's ``grads`` (B, T) are those of its row losses, and ``labels`` (B, T) say of which.
    """

    tap: Tap
    inputs: Tensor
    version: int
    open: int
    labels: Tensor | None
    grads: Tensor | None = None

    def factors(self) -> Factors:
        assert self.grads is not None
        if self.labels is None:
            return self.tap.rule.factors(self.tap.module, self.checked_inputs(), self.grads)
        residual: Any = self._head().residual
        return Factors(self.checked_inputs(), residual)

    def term(self, local: str) -> Term:
        """The gradient of the layer's parameter ``local``."""
        assert self.grads is not None
        if self.labels is None:
            return self.tap.rule.term(self.tap.module, local, self.checked_inputs(), self.grads)
        head = self._head()
        return head if local == "weight" else Dense(head.bias_gradient())

    def _head(self) -> Head:
        assert self.labels is not None
        assert self.grads is not None
        weight, bias = self.tap.module.weight, self.tap.module.bias
        return Head(
            self.checked_inputs(),
            weight.detach(),  # type: ignore[operator]
            None if bias is None else bias.detach(),  # type: ignore[operator]
            self.labels,
            self.grads,
        )

    def checked_inputs(self) -> Tensor:
        if self.inputs._version != self.version:
            raise RuntimeError(
                f"the input of layer {self.tap.layer!r} was modified in place after the layer had used it, "
                "so that the gradient of its weight is lost; make the operation out of place"
            )
        return self.inputs

    def release(self) -> None:
        # The graph's hooks hold this object until the whole backward pass is over.
        self.inputs, self.grads = self.inputs.new_empty(0), None


@dataclass
class Recorder:
    """Taps layers for one pass over one batch. Use it once.

    Args:
        taps: every layer that uses one of the parameters in ``keep`` or in a reduction.
        size: the number of samples, B.
        reductions: folded as soon as the last use of a parameter has its gradient.
        keep: names of the layers whose factors are kept.
    """

    taps: Sequence[Tap]
    size: int
    reductions: Mapping[str, Reduction]
    keep: Collection[str]
    reduced: dict[str, Tensor] = field(default_factory=dict)
    factors: dict[str, Factors] = field(default_factory=dict)
    # By parameter: the calls that use it, with its name in their layer, and how many have no gradient yet.
    _calls: dict[str, list[tuple[_Call, str]]] = field(default_factory=lambda: defaultdict(list))
    _waiting: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    _kept: dict[str, list[_Call]] = field(default_factory=lambda: defaultdict(list))  # by layer
    _touched: set[str] = field(default_factory=set)  # parameters in which a sample has a gradient
    _leaves: list[Tensor] = field(default_factory=list)
    _recording: bool = True

    @contextmanager
    def attached(self) -> Iterator[None]:
        """The hooks, for as long as the model runs forward and backward."""
        with ExitStack() as stack:
            for tap in self.taps:
                before, after = self._hooks(tap)
                stack.callback(tap.module.register_forward_pre_hook(before, with_kwargs=True).remove)
                stack.callback(tap.module.register_forward_hook(after, with_kwargs=True).remove)
            yield

    def backward(self, losses: Tensor) -> None:
        """Backpropagate the sum of the losses: fills ``reduced`` on the way and ``factors`` at the end."""
        self._recording = False  # from here on a layer that runs is a checkpoint being recomputed
        self.reduced = {key: self._nothing(reduction, losses.detach()) for key, reduction in self.reductions.items()}
        # A forward pass under autocast is differentiated outside of it; its casts are in the graph.
        with torch.autocast(losses.device.type, enabled=False):
            if self._leaves and losses.requires_grad:
                torch.autograd.grad(losses.sum(), self._leaves, allow_unused=True)
            with torch.no_grad():
                for name in list(self._calls):  # some of their calls have got no gradient: it is zero
                    self._fold(name)
                self._add_untouched()
                self.factors = self._factors()

    def _factors(self) -> dict[str, Factors]:
        """The kept factors; a layer that the losses do not depend on has gradient zero and no entry."""
        kept = {}
        for layer, calls in self._kept.items():
            parts = [call.factors() for call in calls if call.grads is not None]
            if len(parts) == 1:
                kept[layer] = parts[0]
            elif parts:
                inputs = torch.cat([part.inputs for part in parts], 1)
                grads = torch.cat([part.grads for part in parts], 1)
                kept[layer] = Factors(inputs, grads, parts[0].kind)
        return kept

    def _hooks(self, tap: Tap) -> tuple[Any, Any]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            inputs = self._the_input(tap, args, kwargs)
            # GPT-2 embeds positions of shape (1, T) and broadcasts: per sample from here on. With fewer
            # dimensions the 1 need not be a batch's.
            if inputs.shape[:1] == (1,) and inputs.ndim >= (3 if inputs.is_floating_point() else 2):
                inputs = inputs.expand(self.size, *inputs.shape[1:])
            return ((inputs,), {}) if args else ((), dict.fromkeys(kwargs, inputs))

        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
            if self._recording:
                self._check_call(tap, self._the_input(tap, args, kwargs), output)
            tapped = output
            if not output.requires_grad:
                # The graph starts here. A clone: no leaf may be modified in place, as by an inplace ReLU.
                leaf = output.detach().requires_grad_()
                tapped = leaf.clone()
                if self._recording:
                    self._leaves.append(leaf)
            if self._recording:
                self._watch(tap, self._the_input(tap, args, kwargs), tapped)
            return tapped

        return before, after

    def _the_input(self, tap: Tap, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        values = [*args, *kwargs.values()]
        if len(values) != 1 or not isinstance(values[0], Tensor):
            found = ", ".join(type(value).__name__ for value in values) or "nothing"
            raise RuntimeError(f"layer {tap.layer!r} was called with ({found}); expected exactly one tensor")
        return values[0]

    def _check_call(self, tap: Tap, inputs: Tensor, output: Any) -> None:
        if not torch.is_grad_enabled():
            raise RuntimeError(
                f"layer {tap.layer!r} ran without gradients (torch.no_grad, or reentrant checkpointing); use "
                "torch.utils.checkpoint with use_reentrant=False, or leave the layer out"
            )
        fits = inputs.ndim >= tap.rule.ndim(tap.module) and inputs.shape[0] == self.size
        if not fits or not isinstance(output, Tensor) or output.shape[:1] != inputs.shape[:1]:
            shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise RuntimeError(
                f"layer {tap.layer!r} ({type(tap.module).__name__}) was called with an input of shape "
                f"{tuple(inputs.shape)} and gave {shape}, in a batch of {self.size}; to know which sample a "
                "gradient belongs to, its first dimension must be the batch's. Leave the layer out, or "
                "change the model"
            )

    def _watch(self, tap: Tap, inputs: Tensor, output: Tensor) -> None:
        labels = getattr(tap.module.forward, "labels", None)  # a fused output layer's
        call = _Call(tap, inputs.detach(), inputs._version, len(tap.parameters), labels)
        if tap.layer in self.keep:
            self._kept[tap.layer].append(call)
        for local, name in tap.parameters.items():
            self._calls[name].append((call, local))
            self._waiting[name] += 1

        def arrived(grads: Tensor) -> None:
            call.grads = grads.detach()
            for name in tap.parameters.values():
                self._waiting[name] -= 1
                if self._waiting[name] == 0:
                    self._fold(name)

        output.register_hook(arrived)  # type: ignore[no-untyped-call]

    def _fold(self, name: str) -> None:
        """Hand the parameter's gradient to the reductions that name it, and free what nobody else needs."""
        calls = self._calls.pop(name)
        wanting = [(key, reduction) for key, reduction in self.reductions.items() if name in reduction.parameters]
        if wanting:
            terms = [call.term(local) for call, local in calls if call.grads is not None]
            if terms:
                self._touched.add(name)
                owner, local = calls[0][0].tap.module, calls[0][1]
                gradient = PerSampleGradient(owner.get_parameter(local).shape, terms)
                for key, reduction in wanting:
                    self._add(key, name, reduction(name, gradient))
        for call, _ in calls:
            call.open -= 1
            if call.open == 0 and call.tap.layer not in self.keep:
                call.release()

    def _add_untouched(self) -> None:
        """What reductions make of a gradient of 0 where no sample has another."""
        for key, reduction in self.reductions.items():
            if isinstance(reduction, Displaced):
                for name in [name for name in reduction.parameters if name not in self._touched]:
                    self._add(key, name, reduction.at_zero(name).expand(self.size, -1))

    def _nothing(self, reduction: Reduction, losses: Tensor) -> Tensor:
        return (
            losses.new_zeros(self.size, reduction.size)
            if isinstance(reduction, Feature)
            else losses.new_zeros(self.size)
        )

    def _add(self, key: str, name: str, value: Tensor) -> None:
        reduction, total = self.reductions[key], self.reduced[key]
        total = total.to(torch.promote_types(total.dtype, value.dtype))
        mine = total[:, reduction.place(name)] if isinstance(reduction, Feature) else total
        if value.shape != mine.shape:
            found, expected = tuple(value.shape), tuple(mine.shape)
            raise ValueError(f"reduction {key!r} gave shape {found} for parameter {name!r}; expected {expected}")
        mine += value.to(total.device)
        self.reduced[key] = total
