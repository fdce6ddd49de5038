"""Taps on a model that a trainer runs: the same recorder, in the trainer's own forward and backward pass."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from assay.probe.gradient import PerSampleGradient
from assay.probe.layouts import Layout
from assay.probe.quiet import other_leaves
from assay.probe.recording import Recorder
from assay.probe.reductions import Reduction
from assay.probe.selection import make_taps
from assay.probe.verify import Check, signed_check

_HELD = "\0held"  # the key of the taps' own reduction: no user's key
BatchSize = Callable[[tuple[Any, ...], dict[str, Any]], int]


@dataclass
class Held:
    """A reduction that keeps the per-sample gradients themselves, as factors, and gives zeros."""

    parameters: Collection[str]
    gradients: dict[str, PerSampleGradient] = field(default_factory=dict)
    degree: ClassVar[int] = 1  # they are held as they come

    def __call__(self, parameter: str, gradient: PerSampleGradient) -> Tensor:
        self.gradients[parameter] = gradient
        return torch.zeros(gradient.samples)


@dataclass(frozen=True)
class Passed:
    """What a backward pass gave.

    Attributes:
        reduced: by reduction, of the losses' own gradients.
        held: by parameter, scale_b times the per-sample gradient.
    """

    reduced: Mapping[str, Tensor]
    held: Mapping[str, PerSampleGradient]


class TrainingTaps:
    """Taps on a model that somebody else runs forward, one pass over a batch for one call of ``backward``.

    Args:
        model: in training mode or not; its parameters ask for gradients, and its optimizer's state is not touched.
        parameters: names of those to tap, as ``tapped_parameters`` gives them.
        batch_size: the number of samples in the model's arguments; None: the first dimension of the first tensor in
            them.
        verify: compare the per-sample gradients with autograd's, on the first batch and whenever layers meet their
            inputs in a new way. A backward pass or two more in that step.

    Attributes:
        is_on: whether the next forward pass is recorded. An evaluation never is: one without gradients, or in eval mode
            where the model has been in training mode before.
    """

    def __init__(
        self, model: nn.Module, parameters: Collection[str], *, batch_size: BatchSize | None = None, verify: bool = True
    ) -> None:
        check_can_be_tapped(model)
        self.parameters = list(parameters)
        self.is_on = True
        self._model, self._verify = model, verify
        self._batch_size = batch_size or first_dimension
        self._taps = make_taps(model, parameters)
        self._constants = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        self._verified: set[Any] = set()
        self._layouts: dict[str, Layout] = {}
        self._recorder: Recorder | None = None
        self._trains = False  # in training mode
        self._came = False  # a backward pass, ever
        self._passes = 0  # forward passes since the last backward pass
        self._running = ExitStack()
        self._coupled: str | None = None  # by a batch norm that ran after a tapped layer
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True),
            model.register_forward_hook(self._after, always_call=True),
        ]
        tapped = {tap.module for tap in self._taps}
        for name, module in model.named_modules():
            if isinstance(module, _BatchNorm):
                self._handles.append(module.register_forward_pre_hook(self._at_batch_norm(name, module in tapped)))

    def detach(self) -> None:
        """Take every hook off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._recorder = [], None

    # ---- forward

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._running.close()
        self._trains = self._trains or module.training
        is_evaluation = not torch.is_grad_enabled() or (self._trains and not module.training)
        if not self.is_on or is_evaluation:
            return
        if self._passes and not self._came:
            raise RuntimeError(
                "the model runs forward again and Reweighter.backward never came, so that no weights were used; "
                "call it in place of loss.backward()"
            )
        self._passes += 1
        self._coupled = None
        known = ((), None, self._constants, (), self._layouts)
        self._recorder = Recorder(
            self._taps, self._batch_size(args, kwargs), *known, guess=self._verify, may_follow=False, in_training=True
        )
        self._running.enter_context(self._recorder.attached())

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._running.close()

    def _at_batch_norm(self, name: str, is_tapped: bool) -> Callable[[nn.Module, Any], None]:
        def before(module: nn.Module, args: Any) -> None:
            uses_batch = module.training or module.running_mean is None
            if self._recorder is not None and uses_batch and (is_tapped or self._recorder.has_run):
                self._coupled = self._coupled or name

        return before

    # ---- backward

    def recorded(self) -> bool:
        """Whether a forward pass was recorded since the last backward pass.

        Raises:
            RuntimeError: several were, or one that mixes the samples.
        """
        passes, self._passes, self._came = self._passes, 0, True
        if passes > 1:
            self._recorder = None
            raise RuntimeError(
                f"the model ran forward {passes} times with gradients since the last backward(); expected once. Run "
                "what is not trained on under torch.no_grad()"
            )
        if self._recorder is not None and self._coupled is not None:
            self._recorder = None
            raise RuntimeError(
                f"layer {self._coupled!r} is a batch norm in training mode, which mixes the samples' gradients in the "
                "layers before it. Choose layers behind it (layers='head', say), put it into eval mode, or use a group "
                "norm"
            )
        return self._recorder is not None

    def backward(
        self,
        losses: Tensor,
        scale: Tensor,
        reductions: Mapping[str, Reduction],
        hold: Collection[str],
        *,
        recompute: bool = False,
    ) -> Passed:
        """The backward pass of Σ_b scale_b ℓ_b for all leaves of the graph but the parameters to ``hold``.

        Args:
            losses: (B,), of the forward pass that ``recorded`` told of.
            scale: (B,).
            reductions: of the losses' own gradients.
            hold: names of parameters whose gradients are not summed but held.
            recompute: hold only what ``weighted_pass`` cannot make; it must come afterwards.

        Raises:
            RuntimeError: not one loss per sample; a layer did not run, or cannot be tapped as the model called it; the
                gradients fail the check.
        """
        recorder, self._recorder = self._recorder, None
        assert recorder is not None
        if recorder.size != len(losses):
            raise RuntimeError(
                f"{len(losses)} losses came, and the model ran on a batch of {recorder.size} (the first dimension of "
                "its first tensor); expected one loss per sample. If the batch's size is elsewhere, say where: "
                "batch_size=lambda args, kwargs: ..."
            )
        tapped = self._tapped()
        recorder.settle({})
        held = Held(recorder.followed.intersection(hold) if recompute else hold)
        with torch.autocast(losses.device.type, enabled=False):
            if recorder.patterns - self._verified:
                self._meet_anew(recorder, losses, tapped)
            reduced = recorder.begin(losses, {**reductions, _HELD: held}, last=True, scale=scale)
            own = [parameter for name, parameter in tapped.items() if name in hold]
            self._differentiate(recorder, losses, scale, own, recompute)
            values = recorder.finish(reduced)
        return Passed({key: value for key, value in values.items() if key != _HELD}, held.gradients)

    def _differentiate(
        self, recorder: Recorder, losses: Tensor, scale: Tensor, own: Sequence[Tensor], retain: bool
    ) -> None:
        """Backpropagate to all leaves but ``own``, and to those through whatever was cut off of the graph."""
        region = recorder.region
        cut = {id(leaf) for _, leaf in region.cuts}
        before: dict[int, list[Tensor]] = {}  # by leaf of a cut, what its value comes from and wants a gradient
        for value, leaf in region.cuts:
            found = [x for x in _leaves_of(value, own) if id(x) not in cut or id(x) in before]
            if found:
                before[id(leaf)] = found
        leaves = {id(leaf): leaf for leaf in region.leaves}
        leaves |= {id(leaf): leaf for _, leaf in region.cuts if id(leaf) in before}
        others = [x for x in other_leaves(losses, own) if id(x) not in cut]
        inputs: list[Any] = [*others, *region.edges, *leaves.values()]
        if inputs:
            torch.autograd.backward(losses, scale, inputs=inputs, retain_graph=retain)
        region.finish([leaf.grad for leaf in region.leaves])
        for value, leaf in reversed(region.cuts):
            if leaf.grad is not None and id(leaf) in before:
                torch.autograd.backward(value, leaf.grad, inputs=before[id(leaf)], retain_graph=True)

    def weighted_pass(self, losses: Tensor, scale: Tensor, parameters: Collection[str]) -> None:
        """A second backward pass of Σ_b scale_b ℓ_b, into the ``.grad`` of these parameters alone."""
        tapped = self._tapped()
        with torch.autocast(losses.device.type, enabled=False):
            torch.autograd.backward(losses, scale, inputs=[tapped[name] for name in parameters])

    def add(self, gradients: Mapping[str, Tensor]) -> None:
        """Add to the ``.grad`` of parameters, with all hooks that a backward pass runs."""
        tapped = self._tapped()
        parameters = [tapped[name] for name in gradients]
        each = [g.to(p.device, p.dtype) for g, p in zip(gradients.values(), parameters, strict=True)]
        if each:
            torch.autograd.backward(parameters, each)

    def _tapped(self) -> dict[str, nn.Parameter]:
        owned = dict(self._model.named_parameters())
        return {name: owned[name] for name in self.parameters}

    def _meet_anew(self, recorder: Recorder, losses: Tensor, tapped: Mapping[str, nn.Parameter]) -> None:
        """Layers met their inputs in a way that has not been seen yet."""
        if not self._verified and recorder.idle:
            raise RuntimeError(
                f"layer {recorder.idle[0]!r} did not run in the first step, so that nothing can be learned of its "
                f"parameters; leave it out: layers=['*', {'!' + recorder.idle[0]!r}]"
            )
        if self._verify:
            self._check(recorder, losses, tapped)
        else:
            self._verified |= recorder.patterns

    def _check(self, recorder: Recorder, losses: Tensor, tapped: Mapping[str, nn.Parameter]) -> None:
        """Compare with autograd, and where a layer's input leaves a choice, take what is right.

        Raises:
            RuntimeError: nothing is.
        """
        check = signed_check(losses, tapped, recorder.region.cuts)
        recorder.settle(check.gradients)
        first: dict[str, str] = {}
        for layouts in _choices(recorder.ambiguous):
            recorder.take_layouts(layouts)
            self._fill(check, recorder, losses, tapped)
            complaints = check.complaints()
            first = first or complaints
            if not complaints:
                break
        else:
            raise RuntimeError(next(iter(first.values())))
        if check.is_conclusive:
            self._verified |= recorder.patterns
            if recorder.size > 1:
                self._layouts = self._layouts | recorder.learned | layouts

    def _fill(self, check: Check, recorder: Recorder, losses: Tensor, tapped: Mapping[str, nn.Parameter]) -> None:
        check.dots.clear()
        reduced = recorder.begin(losses, {"check": check}, last=False)
        own, leaves = list(tapped.values()), recorder.region.leaves
        others = other_leaves(losses, [*own, *(leaf for _, leaf in recorder.region.cuts)])
        inputs: list[Any] = [*leaves, *recorder.region.edges, *others]
        arrived = torch.autograd.grad(losses.sum(), inputs, retain_graph=True, allow_unused=True)
        recorder.region.finish(arrived[: len(leaves)])
        recorder.finish(reduced)


def _leaves_of(value: Tensor, own: Sequence[Tensor]) -> list[Tensor]:
    """``other_leaves``, of a value that may be one itself: a parameter that the model adds as it is."""
    if value.grad_fn is None:
        return [value] if value.requires_grad and all(value is not x for x in own) else []
    return other_leaves(value, own)


def _choices(ambiguous: Mapping[str, Sequence[Layout]]) -> Iterator[dict[str, Layout]]:
    """First what the layers were taken to have, then another layout for all that may have it, then one by one."""
    taken = {layer: layouts[0] for layer, layouts in ambiguous.items()}
    yield taken
    for other in dict.fromkeys(
        layout for layouts in ambiguous.values() for layout in layouts[1:] if layout != "shared"
    ):
        yield taken | {layer: other for layer, layouts in ambiguous.items() if other in layouts}
    for layer, layouts in ambiguous.items():
        yield from (taken | {layer: other} for other in layouts[1:] if other != "shared")


def first_dimension(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """The first dimension of the first tensor among a model's arguments.

    Raises:
        RuntimeError: there is none.
    """
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.ndim > 0:
            return len(value)
    raise RuntimeError(
        "the model was called without a tensor, so that its number of samples is not known; say how to tell: "
        "batch_size=lambda args, kwargs: ..."
    )


def check_can_be_tapped(model: nn.Module) -> None:
    """ValueError of a model whose layers' inputs and output gradients nobody sees, or whose weights lie elsewhere."""
    for module in model.modules():
        if type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None:
            raise ValueError(
                f"{type(module).__name__}: the model, or a layer of it, is compiled (torch.compile), and its layers' "
                "inputs cannot be seen; train it uncompiled, or score offline with assay.score"
            )
    for name, parameter in model.named_parameters():
        if type(parameter).__name__ == "DTensor" or type(parameter.data).__name__ == "DTensor":
            raise ValueError(
                f"parameter {name!r} is sharded (a DTensor, of FSDP2 or tensor parallelism): its layer's weight is not "
                "whole when its gradient is made. Use DistributedDataParallel, or score offline with assay.score"
            )
