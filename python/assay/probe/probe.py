"""The probe: a model and a batch in, signals out, and the model as it was."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from assay.probe.formulas import Factors
from assay.probe.jvp import Jvp
from assay.probe.layouts import Layout
from assay.probe.pooling import Pooled, Pooling
from assay.probe.quiet import is_out_of_memory, undisturbed
from assay.probe.readings import Reading, all_parameters
from assay.probe.recording import Behind, Recorder
from assay.probe.reductions import Reduction, TokenDot
from assay.probe.selection import coverage, make_taps, select
from assay.probe.signals import Signals
from assay.probe.verify import Check, check_losses, prepare_check
from assay.tasks import Outputs, Task
from assay.tasks.base import base_task, is_made, later, read, take_samples

_CHECK = "\0check"  # the key of the probe's own reduction: no user's key


class Probe:
    """Runs a model on batches and returns their signals::

        with Probe(model, task, factors="head.*") as probe:
            signals = probe(batch)

    The model runs in eval mode (no dropout, batch norms with their running statistics) with all parameters
    frozen, and is found after every call, also one that raised, as it was before: flags, hooks and ``.grad``
    of its own. Gradients are those of the *sum* of the losses. The backward pass computes no weight gradients
    and stops at the earliest layer that is tapped; when nothing is tapped there is none.

    Args:
        model: parameters with ``requires_grad`` now, at construction, can be probed; frozen ones cost
            nothing.
        task: what a batch and a loss are.
        factors: layers whose factors the signals keep, selected as ``tapped_parameters`` says. None means
            every layer with trainable parameters, or no layer when there are reductions; ``()`` means no
            layer.
        reductions: by key; folded while the backward pass runs, their factors freed on the way. A ``Jvp`` runs the
            model forward a few times more and taps nothing.
        embeddings: name or glob of the one layer whose input is pooled: the mean over the positions in the
            task's mask; or a ``Pooled``, which may weigh them.
        logits: whether the signals keep the logits.
        skip_unsupported: tap what can be tapped exactly instead of raising; ``left_out`` and ``coverage`` say what
            that is. Names: only these parameters may be left out. What turns out on the first batch (of two samples or
            more) is left out as well; later it is an error, for scores of one table are made of the same layers.
        verify: compare a signed sum of the per-sample gradients with an ordinary backward pass: on the first, second,
            fourth, eighth, … batch, whenever a layer runs for the first time, and for inputs of a shape in which
            gradients could be booked on the wrong samples for the first time. Relative tolerance 1e-3; 5e-2 with
            float16, bfloat16, autocast or TF32.
        readings: further tasks that read the same forward pass as ``task`` (a ``Margin`` of it), with reductions of
            their own: ``read`` gives the signals of all.
        inference: run in ``torch.inference_mode`` where no gradient is wanted. What the model keeps between calls, a
            table of positions say, is then lost to autograd: not for a model that is also trained.

    Attributes:
        parameters: names of the tapped parameters, in the order of ``model.named_parameters()``.
        coverage: the share of the trainable parameters' elements that they hold.
        left_out: by name the parameters that could not be tapped, with the reason.

    Raises:
        ValueError: a glob or a name that matches nothing, a layer without an exact formula, a frozen model.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        *,
        factors: str | Sequence[str] | None = None,
        reductions: Mapping[str, Reduction | Jvp] | None = None,
        embeddings: str | Pooled | None = None,
        logits: bool = True,
        skip_unsupported: bool | Collection[str] = False,
        verify: bool = True,
        readings: Sequence[tuple[Task, Mapping[str, Reduction | Jvp]]] = (),
        inference: bool = False,
    ) -> None:
        self._model, self._task, self._logits, self._verify = model, base_task(task), logits, verify
        self._readings = [Reading.of(task, reductions or {}), *(Reading.of(*reading) for reading in readings)]
        if any(base_task(reading.task) != self._task for reading in self._readings):
            raise ValueError(f"Probe: every reading must be of the forward pass of {self._task}")
        if factors is None and reductions:
            factors = ()
        kept = select(model, factors, bool(skip_unsupported), bare=False)  # bare parameters have no factors
        self.left_out = dict(kept.left_out)
        tapped = all_parameters(kept.names, self._readings)
        self.parameters = [name for name, _ in model.named_parameters() if name in tapped]
        self._taps = make_taps(model, tapped)
        self._keep = [tap.layer for tap in self._taps if not set(kept.names).isdisjoint(tap.parameters.values())]
        self._inference = inference and not self._taps and not any(reading.jvps for reading in self._readings)
        self._pooling = None if embeddings is None else Pooling(model, embeddings)
        droppable = self.parameters if isinstance(skip_unsupported, bool) else skip_unsupported
        self._droppable = set(droppable if skip_unsupported else ())
        self._verified: set[Any] = set()  # patterns of calls that were checked
        self._batches = 0  # that were read
        self._layouts: dict[str, Layout] = {}  # by layer, where that is known and its input's shape leaves a choice
        self._tried: dict[str, set[Layout]] = {}  # of the batch that is being read
        self._in_order: set[str] = set()  # layers on (B, T, …) with the tokens in T
        self._may_follow = True  # what is used behind its layer's back
        self._constants = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}

    @property
    def coverage(self) -> float:
        return coverage(self._model, self.parameters)

    def __enter__(self) -> Probe:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to undo: the model is restored after every call."""

    @property
    def task(self) -> Task:
        """May be set to another: what has been verified, and left out, stays so."""
        return self._readings[0].task

    @task.setter
    def task(self, task: Task) -> None:
        self._task, self._readings[0] = base_task(task), replace(self._readings[0], task=task)

    def __call__(self, batch: Any) -> Signals:
        """The signals of one batch.

        Raises:
            RuntimeError: a layer cannot be tapped as the model calls it (the message names it), or the
                gradients fail the check.
        """
        return self.read(batch)[0]

    def read(self, batch: Any) -> list[Signals]:
        """The signals of one batch under ``task`` and each of the ``readings``, from one forward pass."""
        gradients = bool(self._taps)
        with undisturbed(self._model), torch.inference_mode(self._inference), torch.set_grad_enabled(gradients):
            first = next(self._model.parameters(), None)
            batch = self._task.to(batch, torch.device("cpu") if first is None else first.device)
            size = self._task.size(batch)
            if size == 0:
                return [_no_signals(reading) for reading in self._readings]
            self._batches += 1
            is_known = self._stage <= self._verified and bool(self._verified)
            if is_known or not self._verify or not self._taps:
                try:
                    return self._run(batch, size, None)
                except _Unverified:
                    pass
            return self._checked(batch, size)

    @property
    def _stage(self) -> set[Any]:
        """A pattern of its own from the 2nd, 4th, 8th, … batch on: what a model does with samples may follow from what
        is in them."""
        return {("batches", self._batches.bit_length())} if self._differentiated else set()

    def _checked(self, batch: Any, size: int) -> list[Signals]:
        """The signals, with a check. One that a sample spoils is made of a batch with others in its place."""
        check = self._prepare_check(batch)
        if size > 1 and not check.is_conclusive and (others := check.without_bad(batch)) is not None:
            trial = self._another_check(others, True)
            if trial.is_conclusive:
                self._solve(others, size, trial)
                try:
                    return self._run(batch, size, None)
                except _Unverified:
                    pass
        return self._solve(batch, size, check)

    def _solve(self, batch: Any, size: int, check: Check) -> list[Signals]:
        """A run with a check, and where it fails in what else the layers' inputs and parameters may be."""
        self._tried = {}
        found = self._try(batch, size, check)
        if isinstance(found, Behind):
            return self._follow(batch, size, found, check.is_trial)
        return self._reread(batch, size, found, check.is_trial) if isinstance(found, _Misread) else found

    def _try(self, batch: Any, size: int, check: Check) -> list[Signals] | _Misread | Behind:
        try:
            return self._run(batch, size, check)
        except (_Misread, Behind) as again:
            return again.with_traceback(None)  # its frames hold the failed run's graph

    def _prepare_check(self, batch: Any) -> Check:
        return prepare_check(self._model, self._readings[self._differentiated[0]].task, batch, self.parameters)

    @property
    def _differentiated(self) -> list[int]:
        """The readings that need a backward pass, one at least where anything is tapped; the first is checked."""
        return [i for i, reading in enumerate(self._readings) if reading.reductions or (i == 0 and self._keep)]

    def _run(self, batch: Any, size: int, check: Check | None) -> list[Signals]:
        mask = self._task.mask(batch)
        positions = None if mask is None or mask.ndim != 2 else mask.shape[1]
        known = (self._keep, positions, self._constants, self._droppable, self._layouts)
        recorder = Recorder(
            self._taps, size, *known, guess=self._verify, may_follow=self._may_follow, in_order=self._in_order
        )
        recorder.patterns |= self._stage
        watched: AbstractContextManager[list[Tensor]] = nullcontext([])
        if self._pooling is not None:
            watched = self._pooling.attached()
        with recorder.attached():
            with watched as caught:
                outputs = self._task.forward(self._model, batch)
            recorder.settle({} if check is None else check.gradients)
            if self._verify and check is None and recorder.patterns - self._verified:
                raise _Unverified
            read_off = [read(reading.task, outputs) for reading in self._readings]
            if check is not None and (recorder.placement.ambiguous or (self._droppable and size > 1)):
                self._try_out(recorder, read_off, check)
            self._drop(recorder.dropped, check)
            found = self._backward(recorder, read_off, check)
        conclusive = check is None or check.finish()
        if check is not None and conclusive:
            self._verified |= recorder.patterns
            if size > 1:
                self._layouts = recorder.placement.learned | self._layouts
        if check is not None and not conclusive and size > 1:
            check.refuse_guesses([name for name in recorder.placement.ambiguous if name not in self._layouts])
        # From now on, but after a batch of which no score is finite.
        if size > 1 and (check is None or conclusive or bool(check.finite.any())):
            self._droppable = set()
        if check is not None and check.is_trial:
            return []
        alone = partial(self._alone, batch, size)
        embeddings = None if self._pooling is None else self._pooling.pool(caught, size, mask, alone)
        each = []
        for reading, (own, reduced, factors) in zip(self._readings, found, strict=True):
            moved = {key: jvp(self._model, self._task, batch) for key, jvp in reading.jvps.items()}
            for key, reduction in reading.reductions.items():
                if isinstance(reduction, TokenDot) and mask is not None:
                    reduced[key] = reduced[key].masked_fill(~mask.to(reduced[key].device), torch.nan)
            each.append(self._signals(own, size, reduced | moved, factors, embeddings))
        return each

    def _alone(self, batch: Any, size: int) -> Outputs:
        """A forward pass of the batch's first sample."""
        return self._task.forward(self._model, take_samples(batch, size, [0]))

    def _backward(
        self, recorder: Recorder, outputs: Sequence[Outputs], check: Check | None
    ) -> list[tuple[Outputs, dict[str, Tensor], dict[str, Factors]]]:
        """A backward pass for each reading that needs one."""
        found: list[tuple[Outputs, dict[str, Tensor], dict[str, Factors]]] = []
        needed = self._differentiated
        if check is not None and check.is_trial:  # a reduction may count what it is given
            recorder.backward(outputs[needed[0]].losses, {_CHECK: check})
            return found
        for i, (reading, own) in enumerate(zip(self._readings, outputs, strict=True)):
            if i not in needed and not is_made(own, "losses"):
                found.append((own, {}, {}))
                continue
            check_losses(reading.task, own.losses, recorder.size)
            if i not in needed:
                found.append((own, {}, {}))
                continue
            reductions = dict(reading.reductions)
            if check is not None and i == needed[0]:
                reductions[_CHECK] = check
            reduced, factors = recorder.backward(own.losses, reductions, last=i == needed[-1])
            found.append((own, {key: v for key, v in reduced.items() if key != _CHECK}, factors if i == 0 else {}))
        return found

    def _try_out(self, recorder: Recorder, outputs: Sequence[Outputs], check: Check) -> None:
        """Check the gradients before any reduction sees one, where something can be done about a wrong one.

        Raises:
            _Misread: the inputs of layers with wrong gradients may have another layout.
        """
        for name in recorder.dropped:
            check.gradients.pop(name, None)
        recorder.backward(outputs[self._differentiated[0]].losses, {_CHECK: check}, last=False)
        wrong, taps = check.complaints(), {tap.layer: tap for tap in recorder.taps}
        untried = {}
        for name, (taken, *others) in recorder.placement.ambiguous.items():
            self._tried.setdefault(name, set()).add(taken)
            untried[name] = [layout for layout in others if layout not in self._tried[name]]
        doubted = {
            name: layouts
            for name, layouts in untried.items()
            if layouts and not wrong.keys().isdisjoint(taps[name].parameters.values())
        }
        if check.is_loose:  # a wrong layout may pass by chance: layers of which the same is known go together
            alike = [layouts for layouts in doubted.values() if "shared" not in layouts]
            doubted |= {name: layouts for name, layouts in untried.items() if layouts in alike}
        layers = {name: layouts[0] for name, layouts in doubted.items()}
        if layers:
            raise _Misread(layers, check)
        if recorder.size > 1 and self._droppable.issuperset(wrong):
            recorder.drop(wrong)

    def _reread(self, batch: Any, size: int, misread: _Misread, is_trial: bool) -> list[Signals]:
        """Take other layouts of the layers' inputs. If none is right, the first error stands."""
        before, first = self._layouts, misread.check
        found: list[Signals] | _Misread | Behind = misread
        try:
            while isinstance(found, _Misread):  # every layer that is in it has one layout less to try
                self._layouts = self._layouts | found.layers
                found = self._try(batch, size, self._another_check(batch, is_trial))
            assert not isinstance(found, Behind)  # that does not depend on layouts
            return found
        except Exception as error:
            self._layouts = before
            if isinstance(error, RuntimeError) and not is_out_of_memory(error):
                first.finish()
            raise

    def _follow(self, batch: Any, size: int, behind: Behind, is_trial: bool) -> list[Signals]:
        """Take the layers' parameters for bare ones. If that is not right either, they are refused as they were."""
        before = self._taps, self.parameters, dict(self.left_out)
        self._taps = [replace(tap, rule=None) if tap.layer in behind.layers else tap for tap in self._taps]
        try:
            return self._solve(batch, size, self._another_check(batch, is_trial))
        except Exception as error:
            self._taps, self.parameters, self.left_out = before
            if not isinstance(error, RuntimeError) or is_out_of_memory(error):
                raise
        self._may_follow = False
        return self._solve(batch, size, self._another_check(batch, is_trial))

    def _another_check(self, batch: Any, is_trial: bool) -> Check:
        return replace(self._prepare_check(batch), is_trial=is_trial)

    def _drop(self, dropped: Mapping[str, str], check: Check | None) -> None:
        if not dropped:
            return
        self.left_out |= dropped
        self.parameters = [name for name in self.parameters if name not in dropped]
        self._taps = [tap for tap in (tap.without(dropped) for tap in self._taps) if tap.parameters]
        for name in dropped if check is not None else ():
            check.gradients.pop(name, None)  # type: ignore[union-attr]

    def _signals(
        self,
        outputs: Outputs,
        size: int,
        reduced: Mapping[str, Tensor],
        factors: Mapping[str, Factors],
        embeddings: Tensor | None,
    ) -> Signals:
        return Signals(
            losses=later(outputs, "losses", Tensor.detach),
            logits=self._kept_logits(outputs),
            labels=outputs.labels,
            rows=outputs.rows,
            factors=factors,
            embeddings=embeddings,
            reduced=reduced,
            output_layer=outputs.output_layer if self._logits else None,
            row_losses=later(outputs, "row_losses", lambda rows: None if rows is None else rows.detach()),
            prediction=outputs.prediction.detach() if self._logits and outputs.prediction is not None else None,
            target=outputs.target,
            size=size,
            left_out=frozenset(self.left_out),
        )

    def _kept_logits(self, outputs: Outputs) -> Any:
        if not self._logits:
            return None
        if outputs.output_layer is not None:
            return outputs.output_layer.logits  # made when read
        return None if outputs.logits is None else outputs.logits.detach()


def _no_signals(reading: Reading) -> Signals:
    """Of a batch without samples: no logits, whose width nobody knows, and no factors."""
    none, reduced = reading.nothing()
    return Signals(none, None, none.long(), reduced=reduced, row_losses=none)


class _Unverified(Exception):
    """A layer ran in a way that has not been checked yet."""


class _Misread(Exception):
    """The check fails of layers whose inputs may have another layout, ``layers``."""

    def __init__(self, layers: dict[str, Layout], check: Check) -> None:
        self.layers, self.check = layers, check
