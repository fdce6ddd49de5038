"""One forward and backward pass with taps on layers: the only place where assay touches a model's hooks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from assay.ops._exact import exact
from assay.probe.calls import Call
from assay.probe.experts import Routing
from assay.probe.formulas import Factors
from assay.probe.gradient import PerSampleGradient
from assay.probe.layouts import Layout
from assay.probe.packed_region import PackedRegion
from assay.probe.packing import Packed, Packing
from assay.probe.placement import Placement, Untapped, called
from assay.probe.quiet import Inside, edge_of, on_gradient, other_leaves
from assay.probe.recurrent import stepwise
from assay.probe.reductions import Reduced, Reduction
from assay.probe.selection import Tap
from assay.probe.shared import Region
from assay.probe.starts import untapped
from assay.probe.terms import Term, sum_of
from assay.tasks.output_layer import UnmadeLogits


@dataclass
class Recorder:
    """Taps layers for one forward pass over one batch, and one backward pass or several. Use it once.

    Args:
        taps: every layer that uses one of the parameters in ``keep`` or in a reduction.
        size: the number of samples, B.
        keep: names of the layers whose factors are kept.
        positions: T where the task has a mask of (B, T).
        constants: ids of the model's parameters and buffers.
        droppable: names of the parameters that may be left out instead of raising.
        layouts: by layer, what is known of how samples lie in its input, for where the shape leaves a choice.
        guess: whether a layout that only the shape speaks for may be taken: it is checked.
        in_order: layers of whose inputs (B, T, …) is known that T are the tokens. It grows.
        may_follow: whether parameters that are used behind their layers' backs may be followed instead.
        in_training: the graph is a trainer's, and stays whole: parameters ask for their gradients themselves.
        packing: of a batch whose samples lie end to end in rows.

    Attributes:
        dropped: those that were, with the reason.
        patterns: how layers met their inputs: a gradient that is booked on the wrong sample shows in a new one first.
        placement: how samples lie in the layers' inputs.
    """

    taps: Sequence[Tap]
    size: int
    keep: Collection[str] = ()
    positions: int | None = None
    constants: Collection[int] = ()
    droppable: Collection[str] = ()
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    guess: bool = False
    may_follow: bool = True
    in_order: set[str] = field(default_factory=set)
    in_training: bool = False
    packing: Packing | None = None
    dropped: dict[str, str] = field(default_factory=dict)
    patterns: set[tuple[Any, ...]] = field(default_factory=set)
    # By parameter: the calls that use it, with its name in their layer, and how many have no gradient yet.
    _calls: dict[str, list[tuple[Call, str]]] = field(default_factory=lambda: defaultdict(list))
    _waiting: dict[str, int] = field(default_factory=dict)
    _open: dict[str, None] = field(default_factory=dict)  # parameters that are not folded yet
    _kept: dict[str, list[Call]] = field(default_factory=lambda: defaultdict(list))  # by layer
    _leaves: list[Tensor] = field(default_factory=list)
    _fold_into: Callable[[str], None] = field(default=lambda name: None)
    inside: Inside = field(default_factory=Inside)  # in training: the graph's nodes within the layers' calls

    def __post_init__(self) -> None:
        how = {"size": self.size, "constants": self.constants, "in_training": self.in_training}
        self.region = _region(self.packing, positions=self.positions, **how)
        self.placement = Placement(self.region, self.packing, self.layouts, self.guess, self.patterns)

    @property
    def _recording(self) -> bool:
        return self.region.recording

    @contextmanager
    def attached(self) -> Iterator[None]:
        """The hooks, for as long as the model runs forward and backward."""
        with ExitStack() as stack:
            for tap in self.taps:
                if tap.rule is None:
                    self._exchange(tap, stack)
                    continue
                # First of all hooks: what others do to the output comes after the layer's own.
                hook = tap.module.register_forward_hook(self._hook(tap), with_kwargs=True, prepend=True)
                stack.callback(hook.remove)
            yield

    def _exchange(self, tap: Tap, stack: ExitStack) -> None:
        """Put shared values into the places of a module's bare parameters."""
        own = tap.module._parameters
        if isinstance(tap.module, ParametrizationList):
            _replace(tap.module, _within(tap.module.forward, self.region.without_samples), stack)
        if (forward := stepwise(tap.module)) is not None:
            _replace(tap.module, forward, stack)
        for local, name in tap.parameters.items():
            parameter = own[local]
            assert parameter is not None
            owner = f"parameter {name!r} of layer {tap.layer!r} ({type(tap.module).__name__})"
            start, value = self.region.begin(parameter, owner, (name,), copy=False)
            value._is_param = True  # an nn.Parameter to isinstance()
            own[local] = value  # type: ignore[assignment]
            stack.callback(own.__setitem__, local, parameter)
            call = Call(tap, {local: name}, parameter, parameter._version, start=start)
            start.complete = partial(self._arrived, call)
            self._calls[name].append((call, local))
            self.patterns.add(((name,),))

    def settle(self, gradients: Mapping[str, Tensor]) -> None:
        """After the forward pass: what turned out not to be tapped is dropped, or an error.

        Args:
            gradients: autograd's own by parameter, as far as they were taken.

        Raises:
            Behind: layers did not run although the losses depend on their parameters, which may be followed instead.
            RuntimeError: a shared value met the samples in a way that cannot be followed, or a layer did not run
                although the losses depend on its parameter.
        """
        self.region.recording = False  # from here on a layer that runs is a checkpoint being recomputed
        self.patterns |= self.region.patterns
        for start in self.region.starts:
            if start.obstacle is not None:
                self._refuse(start.parameters, untapped(start.what, start.obstacle))
        behind = [
            name
            for name, gradient in gradients.items()
            if name not in self._calls and name not in self.dropped and bool((gradient != 0).any())
        ]
        if layers := self._to_follow(behind):
            raise Behind(layers)
        for name in behind:
            self._refuse((name,), untapped(f"parameter {name!r}", "it is used behind its layer's back"))
        self._forget()

    @property
    def has_run(self) -> bool:
        """Whether a tapped layer, or what follows bare parameters, has run."""
        return bool(self._calls)

    @property
    def idle(self) -> list[str]:
        """Tapped layers that did not run."""
        names = {name for name in self._calls if self._calls[name]}
        return [tap.layer for tap in self.taps if names.isdisjoint(tap.parameters.values())]

    @property
    def followed(self) -> set[str]:
        """Parameters whose gradient does not come by their layers' outputs."""
        return {name for start in self.region.starts for name in start.parameters}

    def take_layouts(self, layouts: Mapping[str, Layout]) -> None:
        """Read layers' inputs in another way, where the shape leaves a choice."""
        for calls in self._calls.values():
            for call, _ in calls:
                if call.start is None:  # what was taken to be shared is in the graph as such
                    call.layout = layouts.get(call.tap.layer, call.layout)

    def drop(self, reasons: Mapping[str, str]) -> None:
        """Leave out parameters of which it turned out later that they cannot be tapped."""
        self.dropped |= reasons
        self._forget()

    def _forget(self) -> None:
        for name in self.dropped:
            self._calls.pop(name, None)
        for layer, calls in list(self._kept.items()):
            if any(name in self.dropped for call in calls for name in call.parameters.values()):
                del self._kept[layer]

    def _to_follow(self, behind: Collection[str]) -> set[str]:
        """The layers that own these parameters, where nothing speaks against following them."""
        if not self.may_follow:
            return set()
        owners = [tap for tap in self.taps if not set(behind).isdisjoint(tap.parameters.values())]
        return {tap.layer for tap in owners if tap.rule is not None and not tap.rule.routed} - set(self.keep)

    def _refuse(self, names: Collection[str], message: str) -> None:
        if not all(name in self.droppable for name in names):
            raise RuntimeError(message)
        self.dropped |= dict.fromkeys(names, message)

    def backward(
        self, losses: Tensor, reductions: Mapping[str, Reduction], last: bool = True
    ) -> tuple[dict[str, Tensor], dict[str, Factors]]:
        """Backpropagate the sum of the losses -> what the reductions gave, and the kept factors.

        Args:
            losses: (B,).
            reductions: folded as soon as the last use of a parameter has its gradient.
            last: whether nobody needs the graph and the layers' inputs any more.
        """
        reduced = self.begin(losses, reductions, last)
        # A forward pass under autocast is differentiated outside of it; its casts are in the graph.
        with torch.autocast(losses.device.type, enabled=False):
            if losses.requires_grad and (leaves := [*self.region.leaves, *self._leaves]):
                leaves += other_leaves(losses, leaves)
                arrived = torch.autograd.grad(losses.sum(), leaves, allow_unused=True, retain_graph=not last)
                self.region.finish(arrived[: len(self.region.leaves)])
                del arrived
            return self.finish(reduced), self._factors()

    def begin(
        self, losses: Tensor, reductions: Mapping[str, Reduction], last: bool, scale: Tensor | None = None
    ) -> Reduced:
        """Get ready for a backward pass of Σ_b scale_b ℓ_b."""
        reduced = Reduced(self.size, reductions, losses.detach(), self.positions, scale)
        self.region.reset()
        self._open = dict.fromkeys(self._calls)
        self._waiting = {name: len(calls) for name, calls in self._calls.items()}
        for calls in self._calls.values():
            for call, _ in calls:
                call.grads, call.open = None, sum(name in self._open for name in call.parameters.values())
        self._fold_into = lambda name: self._fold(name, reduced, last)
        return reduced

    @torch.no_grad()
    @exact()
    def finish(self, reduced: Reduced) -> dict[str, Tensor]:
        """What the reductions gave of the losses' own gradients, once the backward pass is over."""
        self._finish_shared()
        for name in list(self._open):  # some of their calls have got no gradient: it is zero
            self._fold_into(name)
        reduced.add_untouched({name for tap in self.taps for name in tap.parameters.values()} - set(self.dropped))
        return reduced.unscaled()

    def _finish_shared(self) -> None:
        for calls in self._calls.values():
            for call, _ in calls:
                if call.start is not None:
                    call.grads = call.start.grads if call.tap.rule is None else call.start.all_grads()

    def close(self) -> None:
        """Let go of the batch, and of its graph: a recorder and the hooks that it left there hold one another."""
        self._fold_into = _ignore
        self.region.close()
        self.inside.clear()
        for kept in (self._calls, self._kept, self._open, self._leaves):
            kept.clear()

    @torch.no_grad()
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

    def _hook(self, tap: Tap) -> Any:
        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            names = {local: name for local, name in tap.parameters.items() if name not in self.dropped}
            if not names:
                return None
            unmade = output if isinstance(output, UnmadeLogits) else None
            try:
                if tap.rule is not None and tap.rule.routed:
                    return self._route(tap, names, [*args, *kwargs.values()], output)
                inputs = self._the_input(tap, args, kwargs)
                layout = self.placement.of(tap, inputs, output)
            except Untapped as error:
                self._refuse(tuple(names.values()), str(error))
                return None
            if layout == "shared":
                return self._share(tap, names, inputs, output)
            tapped = self._grown([inputs], output if unmade is None else unmade.losses)
            if self._recording:
                labels = None if unmade is None else unmade.labels
                call = Call(tap, names, inputs.detach(), inputs._version, labels, layout, self.size)
                call.packing = self.packing if layout == "packed" else None
                self._watch(call, tapped)
            if unmade is None:
                return tapped
            unmade.losses = tapped
            return None

        return after

    def _grown(self, inputs: Sequence[Tensor], output: Tensor) -> Tensor:
        """The output as part of a graph that starts at the first tapped layer."""
        if self.in_training:
            if self._recording:
                self.inside.add(inputs, output)
                self.region.see(output)
                if not inputs[0].requires_grad:
                    self.region.edges.append(edge_of(output))
            return output
        # What asks for gradients before any layer was tapped is none of ours: a hook, or a model's own tensor.
        if output.requires_grad and (self._leaves or self.region.leaves):
            return output
        # A clone: no leaf may be modified in place, as by an inplace ReLU.
        leaf = output.detach().requires_grad_()
        if self._recording:
            self._leaves.append(leaf)
        return leaf.clone()

    def _route(self, tap: Tap, names: Mapping[str, str], values: list[Any], output: Tensor) -> Tensor:
        """Experts, called with tokens (N, D), the experts' indices (N, k) and their weights (N, k)."""
        fits = len(values) == 3 and all(isinstance(x, Tensor) and x.ndim == 2 for x in values)
        count = len(values[0]) if fits else 0
        owner = self.placement.owner(count)
        if not fits or owner is None or not torch.is_grad_enabled():
            what = called(tap, values[0], output, self.size)
            raise Untapped(
                untapped(what, "its tokens are not all positions of all samples, one sample after the other")
            )
        tokens, index, weights = (x.detach() for x in values)
        tapped = self._grown(values, output)
        if self._recording:
            self.patterns |= {(tuple(tap.parameters.values()),), (tuple(tap.parameters.values()), self.size > 1)}
            routing = Routing(index, weights, owner.to(tokens.device), self.size)
            self._watch(Call(tap, names, tokens, tokens._version, routing=routing), tapped)
        return tapped

    def _share(self, tap: Tap, names: Mapping[str, str], inputs: Tensor, output: Tensor) -> Tensor:
        what = called(tap, inputs, output, self.size)
        start, value = self.region.begin(output, what, tuple(names.values()))
        if self._recording:
            plain = inputs.detach().as_subclass(Tensor)
            self._record(Call(tap, names, plain, plain._version, start=start))
            self.patterns.add((tuple(tap.parameters.values()),))
        return value

    def _the_input(self, tap: Tap, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        values = [*args, *kwargs.values()]
        if len(values) != 1 or not isinstance(values[0], Tensor):
            kinds = ", ".join(type(value).__name__ for value in values) or "nothing"
            raise Untapped(f"layer {tap.layer!r} was called with ({kinds}); expected exactly one tensor")
        return values[0]

    def _watch(self, call: Call, output: Tensor) -> None:
        self._record(call)

        def arrived(grads: Tensor) -> None:
            if not self._open.keys().isdisjoint(call.parameters.values()):  # nobody else would let go of it
                call.grads = grads.detach()
                self._arrived(call)

        on_gradient(output, arrived)

    def _arrived(self, call: Call) -> None:
        for name in call.parameters.values():
            if name in self._open:
                self._waiting[name] -= 1
                if self._waiting[name] == 0:
                    self._fold_into(name)

    def _record(self, call: Call) -> None:
        if call.tap.layer in self.keep:
            self._kept[call.tap.layer].append(call)
        for local, name in call.parameters.items():
            self._calls[name].append((call, local))

    @exact()
    def _fold(self, name: str, reduced: Reduced, last: bool) -> None:
        """Hand the parameter's gradient to the reductions that name it, and free what nobody else needs."""
        del self._open[name]
        calls = self._calls[name]
        if reduced.wants(name) and (terms := self._terms(calls)):
            shape = _shape(calls)
            reduced.add(name, PerSampleGradient(shape, terms, partial(self._dot_by_position, calls)))
        for call, _ in calls:
            call.open -= 1
            if call.open == 0 and call.tap.layer not in self.keep:
                call.release(last)

    def _terms(self, calls: Sequence[tuple[Call, str]]) -> list[Term]:
        """What a parameter's gradient is the sum of; nothing where it is zero."""
        if self.packing is None or not any(call.packing for call, _ in calls):
            return [term for call, local in calls for term in call.terms(local)]
        shape, each = _shape(calls), []
        for group in self.packing.groups:
            terms = [term for call, local in calls if call.start is None for term in call.terms(local, group)]
            each += [(group.samples, PerSampleGradient(shape, terms))] if terms else []
        of_all = [term for call, local in calls if call.start is not None for term in call.terms(local)]
        return [*([Packed(each, self.size)] if each else []), *of_all]

    def _dot_by_position(self, calls: Sequence[tuple[Call, str]], direction: Tensor) -> Tensor:
        reached = [(call, local) for call, local in calls if call.grads is not None or call.tap.rule is None]
        return sum_of(
            [call.dot_by_position(local, direction, self.positions, self.in_order) for call, local in reached]
        )


def _ignore(name: str) -> None: ...


def _within(forward: Callable[..., Any], context: Callable[[], AbstractContextManager[None]]) -> Callable[..., Any]:
    def within(*args: Any, **kwargs: Any) -> Any:
        with context():
            return forward(*args, **kwargs)

    return within


def _replace(module: nn.Module, forward: Callable[..., Any], stack: ExitStack) -> None:
    """Let the module run another forward pass, for as long as the stack is open."""
    own = vars(module).get("forward")
    module.forward = forward
    stack.callback(delattr, module, "forward") if own is None else stack.callback(setattr, module, "forward", own)


def _region(packing: Packing | None, **how: Any) -> Region:
    return Region(**how) if packing is None else PackedRegion(packing=packing, **how)


def _shape(calls: Sequence[tuple[Call, str]]) -> torch.Size:
    """Of the parameter that they use."""
    call, local = calls[0]
    return call.tap.module._parameters[local].shape  # type: ignore[union-attr]


class Behind(Exception):
    """Parameters are used behind their layers' backs, ``layers``."""

    def __init__(self, layers: set[str]) -> None:
        self.layers = layers
