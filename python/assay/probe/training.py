"""Taps on a model that a trainer runs: the same recorder, in the trainer's own forward and backward pass."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from assay.probe.company import Company, signature
from assay.probe.holding import Held, Summed, add_to_grad
from assay.probe.layouts import Layout, choices
from assay.probe.packing import Packing
from assay.probe.quiet import is_looked_at, other_leaves
from assay.probe.recording import Recorder
from assay.probe.reductions import Reduction
from assay.probe.selection import make_taps
from assay.probe.verify import Check, signed_check
from assay.probe.wrappers import check_can_be_tapped, looks_for_unused, refuse_static_graph

_HELD = "\0held"  # the key of the taps' own reduction: no user's key
BatchSize = Callable[[tuple[Any, ...], dict[str, Any]], int]


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
        packing: of the batches that the model runs on, where their samples lie end to end in rows.
    """

    def __init__(
        self, model: nn.Module, parameters: Collection[str], *, batch_size: BatchSize | None = None, verify: bool = True
    ) -> None:
        check_can_be_tapped(model)
        _check_is_free(model)
        self.parameters = list(parameters)
        self.is_on = True
        self.packing: Packing | None = None
        self._model, self._verify = model, verify
        self._batch_size = batch_size or first_dimension
        self._taps = make_taps(model, parameters)
        self._verified: set[Any] = set()
        self._apart: set[tuple[Any, ...]] = set()  # how the model was called when it kept packed samples apart
        self._company: tuple[tuple[Any, ...], Company] | None = None
        self._layouts: dict[str, Layout] = {}
        self._recorder: Recorder | None = None
        self._trains = False  # in training mode
        self._looks_for_unused = False  # DistributedDataParallel does
        self._came = False  # a backward pass, ever
        self._ran = False  # a forward pass that trains, recorded or not
        self._runs = False  # one, at the moment
        self._passes = 0  # recorded forward passes since the last backward pass
        self._running = ExitStack()
        self._coupled: str | None = None  # by a batch norm that ran after a tapped layer
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True),
            model.register_forward_hook(self._after, always_call=True),
        ]
        tapped = {tap.module for tap in self._taps}
        for name, module in model.named_modules():
            if isinstance(module, _BatchNorm):
                hook = partial(self._at_batch_norm, name, module, module in tapped)
                self._handles.append(module.register_forward_pre_hook(hook))

    def detach(self) -> None:
        """Take every hook off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._forget()

    def _forget(self) -> None:
        """Let go of a forward pass of which no backward pass comes."""
        if self._recorder is not None:
            self._recorder.close()
        self._recorder = None

    def __deepcopy__(self, memo: Any) -> TrainingTaps:
        """A copy of the model, as for a moving average, is not trained: its hooks find another model here."""
        return self

    def __reduce__(self) -> Any:
        """Nor is one that is loaded from a file, or sent to another process."""
        return _Nothing, ()

    # ---- forward

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module is not self._model or is_looked_at(module):
            return
        self._running.close()
        self._trains = self._trains or module.training
        is_evaluation = not torch.is_grad_enabled() or (self._trains and not module.training)
        if is_evaluation or not any(p.requires_grad for p in module.parameters()):
            return
        if self._ran and not self._came:
            raise RuntimeError(
                "the model runs forward again and Reweighter.backward never came, so that no weights were used; "
                "call it in place of loss.backward()"
            )
        refuse_static_graph()
        if not self._came:  # what was done to the model since the taps were made
            check_can_be_tapped(self._model)
        self._runs = True
        if self.is_on:
            self._record(args, kwargs)

    def _record(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for name, parameter in self._tapped().items():
            if not parameter.requires_grad:
                raise RuntimeError(
                    f"parameter {name!r} has been frozen since the Reweighter was made; detach() it and make another"
                )
        self._forget()
        self._looks_for_unused = looks_for_unused()
        self._passes += 1
        self._coupled = None
        # As they are now, and held for as long as they are compared by id: a model that moves has other buffers.
        constants = [*self._model.parameters(), *self._model.buffers()]
        self._running.callback(constants.clear)
        known = ((), None, {id(tensor) for tensor in constants}, (), self._layouts)
        size = self._batch_size(args, kwargs) if self.packing is None else self.packing.size
        how: Any = {"guess": self._verify, "may_follow": False, "in_training": True, "packing": self.packing}
        self._recorder = Recorder(self._taps, size, *known, **how)
        self._running.enter_context(self._recorder.attached())
        self._company = None
        if self._verify and self.packing is not None:
            how = signature(args, kwargs)
            if how not in self._apart and self.packing.has_company:
                self._company = how, Company(self.packing)
                self._running.enter_context(self._company[1].watched(self._model))

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if module is not self._model or is_looked_at(module):
            return
        self._running.close()
        if self._runs and output is None:  # it failed
            self._passes = max(0, self._passes - 1)
            self._forget()
        self._ran = self._ran or (self._runs and output is not None)
        self._runs = False

    def _at_batch_norm(self, name: str, own: nn.Module, is_tapped: bool, module: nn.Module, args: Any) -> None:
        uses_batch = module.training or module.running_mean is None
        recorder = self._recorder if module is own and self._runs and uses_batch else None
        if recorder is not None and (is_tapped or recorder.has_run):
            self._coupled = self._coupled or name

    # ---- backward

    def recorded(self) -> bool:
        """Whether a forward pass was recorded since the last backward pass.

        Raises:
            RuntimeError: several were, or one that mixes the samples.
        """
        passes, self._passes, self._came = self._passes, 0, True
        if passes > 1:
            self._forget()
            raise RuntimeError(
                f"the model ran forward {passes} times with gradients since the last backward(); expected once. Run "
                "what is not trained on under torch.no_grad()"
            )
        if self._recorder is not None and self._coupled is not None:
            self._forget()
            raise RuntimeError(
                f"layer {self._coupled!r} is a batch norm in training mode, which mixes the samples' gradients in the "
                "layers before it. Choose layers behind it (layers='head', say), put it into eval mode, or use a group "
                "norm"
            )
        if self._recorder is not None and self._recorder.region.cuts and self._looks_for_unused:
            self._forget()
            raise RuntimeError(
                "DistributedDataParallel(find_unused_parameters=True) looks for parameters in the graph, and those "
                "that all samples share (positions, a class token) are cut off from it to tell the samples apart. "
                "Leave it off where every parameter is used, or choose other layers (layers='head', say)"
            )
        return self._recorder is not None

    def backward(
        self,
        losses: Tensor,
        scale: Tensor,
        reductions: Mapping[str, Reduction],
        held: Held | Summed,
        *,
        recompute: bool = False,
    ) -> dict[str, Tensor]:
        """The backward pass of Σ_b scale_b ℓ_b for all leaves of the graph but the parameters of ``held``.

        Args:
            losses: (B,), of the forward pass that ``recorded`` told of.
            scale: (B,).
            reductions: of the losses' own gradients.
            held: gets scale_b times the per-sample gradients of its parameters, and nobody adds them to ``.grad`` yet.
            recompute: it gets only what ``weighted_pass`` cannot make, which must come afterwards.

        Returns:
            By reduction, (B,) or wider.

        Raises:
            RuntimeError: not one loss per sample; a layer did not run, or cannot be tapped as the model called it; the
                gradients fail the check.
        """
        recorder, self._recorder = self._recorder, None
        assert recorder is not None
        try:
            return self._backward(recorder, losses, scale, reductions, held, recompute)
        finally:
            recorder.close()

    def _backward(
        self,
        recorder: Recorder,
        losses: Tensor,
        scale: Tensor,
        reductions: Mapping[str, Reduction],
        held: Held | Summed,
        recompute: bool,
    ) -> dict[str, Tensor]:
        if recorder.size != len(losses):
            raise RuntimeError(
                f"{len(losses)} losses came, and the model ran on a batch of {recorder.size} (the first dimension of "
                "its first tensor); expected one loss per sample. If the batch's size is elsewhere, say where: "
                "batch_size=lambda args, kwargs: ..."
            )
        if any(leaf.grad is not None for _, leaf in recorder.region.cuts):
            raise RuntimeError(
                "something else was backpropagated through this forward pass before, and parameters that all samples "
                "share (positions, a class token) are cut off from its graph: their gradients would be lost. Add it to "
                "the losses, or choose other layers (layers='head', say)"
            )
        tapped = self._tapped()
        self._refuse_behind(recorder, losses, tapped)
        recorder.settle({})
        own = [parameter for name, parameter in tapped.items() if name in held.parameters]
        if recompute:
            held.parameters = recorder.followed.intersection(held.parameters)
        with torch.autocast(losses.device.type, enabled=False):
            self._keep_apart(losses)
            if recorder.patterns - self._verified:
                self._meet_anew(recorder, losses, tapped)
            reduced = recorder.begin(losses, {**reductions, _HELD: held}, last=True, scale=scale)
            self._differentiate(recorder, losses, scale, own, recompute)
            values = recorder.finish(reduced)
        return {key: value for key, value in values.items() if key != _HELD}

    def _refuse_behind(self, recorder: Recorder, losses: Tensor, tapped: Mapping[str, nn.Parameter]) -> None:
        """RuntimeError where the losses depend on a tapped parameter by a way that no tap sees, in whatever step."""
        found = recorder.inside.passed_by(losses, list(tapped.values()))
        recorder.inside.clear()
        for name, parameter in tapped.items():
            if parameter is found:
                raise RuntimeError(
                    f"parameter {name!r}: the losses depend on it behind its layer's back, as in F.linear(x, "
                    "layer.weight) or a penalty on the weight itself, or by a forward pass that was not recorded; its "
                    "gradient would be lost. Call the layer within the model's forward pass, give a penalty a "
                    f"backward() of its own, or leave the parameter out (layers=['*', {'!' + name!r}])"
                )

    def _differentiate(
        self, recorder: Recorder, losses: Tensor, scale: Tensor, own: Sequence[Tensor], retain: bool
    ) -> None:
        """Backpropagate to all leaves but ``own``, and to those through whatever was cut off of the graph."""
        region = recorder.region
        cut = {id(leaf) for _, leaf in region.cuts}
        before: dict[int, list[Tensor]] = {}  # by leaf of a cut, what its value comes from and wants a gradient
        for value, leaf in region.cuts:
            ends = [value] if value.is_leaf else other_leaves(value, own)  # a bare parameter is its own beginning
            found = [x for x in ends if not _is_in(x, own) and (id(x) not in cut or id(x) in before)]
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

    def add(self, held: Held | Summed, factors: Tensor) -> None:
        """Add Σ_b factors_b · gradient_b to the ``.grad`` of parameters, with all hooks that a backward pass runs."""
        tapped = self._tapped()
        with torch.autocast(factors.device.type, enabled=False):
            add_to_grad([(tapped[name], make) for name, make in held.sums(factors).items()])

    def _tapped(self) -> dict[str, nn.Parameter]:
        owned = dict(self._model.named_parameters())
        if lost := [name for name in self.parameters if name not in owned]:
            raise RuntimeError(
                f"parameter {lost[0]!r} is the model's no more, since the Reweighter was made: a layer was put in its "
                "layer's place, or a wrapper (FullyShardedDataParallel) took it. Make the Reweighter of the model that "
                "is trained"
            )
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

    def _keep_apart(self, losses: Tensor) -> None:
        """RuntimeError where samples of a packed row see one another, looked at whenever the model is called anew."""
        company, self._company = self._company, None
        if company is not None and company[1].check(losses):
            self._apart.add(company[0])

    def _check(self, recorder: Recorder, losses: Tensor, tapped: Mapping[str, nn.Parameter]) -> None:
        """Compare with autograd, and where a layer's input leaves a choice, take what is right.

        Raises:
            RuntimeError: nothing is.
        """
        check = signed_check(losses, tapped, recorder.region.cuts, recorder.region.is_coarse)
        recorder.settle(check.gradients)
        first: dict[str, str] = {}
        for layouts in choices(recorder.placement.ambiguous):
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
                self._layouts = self._layouts | recorder.placement.learned | layouts

    def _fill(self, check: Check, recorder: Recorder, losses: Tensor, tapped: Mapping[str, nn.Parameter]) -> None:
        check.dots.clear()
        reduced = recorder.begin(losses, {"check": check}, last=False)
        own, leaves = list(tapped.values()), recorder.region.leaves
        others = other_leaves(losses, [*own, *(leaf for _, leaf in recorder.region.cuts)])
        inputs: list[Any] = [*leaves, *recorder.region.edges, *others]
        arrived = torch.autograd.grad(losses.sum(), inputs, retain_graph=True, allow_unused=True)
        recorder.region.finish(arrived[: len(leaves)])
        recorder.finish(reduced)


def _is_in(tensor: Tensor, tensors: Collection[Tensor]) -> bool:
    return any(tensor is other for other in tensors)


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


class _Nothing:
    """What the hooks of a model's copy call in another process."""

    def _before(self, *args: Any) -> None: ...

    def _after(self, *args: Any) -> None: ...

    def _at_batch_norm(self, *args: Any) -> None: ...


def _check_is_free(model: nn.Module) -> None:
    """ValueError of a model that has taps already: two of them would cut off each other's parameters."""
    for name, module in model.named_modules():
        for hook in module._forward_pre_hooks.values():
            other = getattr(hook, "__self__", None)
            if isinstance(other, TrainingTaps) and other._model is module:
                what = f"its layer {name!r}" if name else "the model"
                raise ValueError(f"{what} has a Reweighter already; detach() that one first, or use it")
