"""The probe: a model and a batch in, signals out, and the model as it was."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from assay.probe.jvp import Jvp
from assay.probe.layers import Factors
from assay.probe.pooling import Pooling
from assay.probe.recording import Recorder, undisturbed
from assay.probe.reductions import Reduction
from assay.probe.selection import coverage, make_taps, tapped_parameters
from assay.probe.verify import prepare_check
from assay.tasks import OutputLayer, Outputs, Task
from assay.tasks.base import Lazy

_CHECK = "\0check"  # the key of the probe's own reduction: no user's key


@dataclass(frozen=True)
class Signals:
    """What a model gives off about a batch of B samples. Nothing here carries an autograd graph.

    Attributes:
        losses: (B,) float32.
        logits: (N, C), one row per position; None if the task has none or they were not asked for. With an
            ``output_layer`` they have not been made: reading them makes them.
        labels: (N,) int64, -100 where nothing is predicted; None if the task has none.
        rows: (N,) int64, the sample that owns each row; None when row i is sample i.
        factors: by layer name. A layer that the losses do not depend on has no entry: its gradient is zero.
        embeddings: (B, D) float32, pooled inputs of the layer that was named.
        reduced: by reduction, (B,) or (B, width) float32 (float64 from a float64 model).
        output_layer: what the logits of a fused language model are the product of, if they were asked for.
        row_losses: (B,) or (B, T): the cross entropies that the losses are made of, 0 where nothing is predicted; None
            if the task has none.
        raw: by name, the samples' own columns, each of B values; the probe gives none.
    """

    losses: Tensor
    logits: Tensor | None = Lazy()  # type: ignore[assignment]
    labels: Tensor | None = None
    rows: Tensor | None = None
    factors: Mapping[str, Factors] = field(default_factory=dict)
    embeddings: Tensor | None = None
    reduced: Mapping[str, Tensor] = field(default_factory=dict)
    output_layer: OutputLayer | None = None
    row_losses: Tensor | None = None
    raw: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def with_reduced(self, reduced: Mapping[str, Tensor], raw: Mapping[str, Sequence[Any]] | None = None) -> Signals:
        """The same signals with other reductions, and raw columns; logits that have not been made stay so."""
        other = copy.copy(self)
        object.__setattr__(other, "reduced", reduced)
        object.__setattr__(other, "raw", raw or {})
        return other


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
            task's mask.
        logits: whether the signals keep the logits.
        skip_unsupported: tap what can be tapped exactly instead of raising; ``coverage`` says how much that
            is.
        verify: on the first batch (and the first of two samples or more), compare the sum of the per-sample
            gradients with an ordinary backward pass. Relative tolerance 1e-3; 5e-2 with float16, bfloat16,
            autocast or TF32.

    Attributes:
        parameters: names of the tapped parameters, in the order of ``model.named_parameters()``.
        coverage: the share of the trainable parameters' elements that they hold.

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
        embeddings: str | None = None,
        logits: bool = True,
        skip_unsupported: bool = False,
        verify: bool = True,
    ) -> None:
        self._model, self._task, self._logits = model, task, logits
        self._reductions = {k: r for k, r in (reductions or {}).items() if not isinstance(r, Jvp)}
        self._jvps = {k: r for k, r in (reductions or {}).items() if isinstance(r, Jvp)}
        if factors is None and reductions:
            factors = ()
        kept = tapped_parameters(model, factors, skip_unsupported)
        wanted = dict.fromkeys(_wanted(kept, self._reductions))
        self._taps = make_taps(model, wanted)
        self._keep = [tap.layer for tap in self._taps if not set(kept).isdisjoint(tap.parameters.values())]
        self._pooling = None if embeddings is None else Pooling(model, embeddings)
        self.parameters = [name for name, _ in model.named_parameters() if name in wanted]
        self.coverage = coverage(model, self.parameters)
        # Size of the batch that was checked, up to 2: a batch of one cannot show that samples are told apart.
        self._verified = 0 if verify and self._taps else 2

    def __enter__(self) -> Probe:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to undo: the model is restored after every call."""

    def __call__(self, batch: Any) -> Signals:
        """The signals of one batch.

        Raises:
            RuntimeError: a layer cannot be tapped as the model calls it (the message names it), or the
                gradients fail the check.
        """
        with undisturbed(self._model), torch.inference_mode(False), torch.set_grad_enabled(bool(self._taps)):
            first = next(self._model.parameters(), None)
            batch = self._task.to(batch, torch.device("cpu") if first is None else first.device)
            size = self._task.size(batch)
            if size == 0:
                raise ValueError("the batch is empty; expected at least one sample")
            if self._verified >= min(size, 2):
                return self._run(batch, size, self._reductions)
            check = prepare_check(self._model, self._task, batch, self.parameters)
            signals = self._run(batch, size, {**self._reductions, _CHECK: check})
            if check.finish():
                self._verified = min(size, 2)
            return signals

    def _run(self, batch: Any, size: int, reductions: Mapping[str, Reduction]) -> Signals:
        recorder = Recorder(self._taps, size, reductions, self._keep)
        embeddings = None
        with recorder.attached():
            if self._pooling is None:
                outputs = self._task.forward(self._model, batch)
            else:
                with self._pooling.attached() as caught:
                    outputs = self._task.forward(self._model, batch)
                embeddings = self._pooling.pool(caught, size, self._task.mask(batch))
            if outputs.losses.shape != (size,):
                shape = tuple(outputs.losses.shape)
                raise ValueError(f"{type(self._task).__name__}: losses of shape {shape}; expected ({size},)")
            recorder.backward(outputs.losses)
        moved = {key: jvp(self._model, self._task, batch) for key, jvp in self._jvps.items()}
        return Signals(
            losses=outputs.losses.detach(),
            logits=self._kept_logits(outputs),
            labels=outputs.labels,
            rows=outputs.rows,
            factors=recorder.factors,
            embeddings=embeddings,
            reduced={key: value for key, value in (recorder.reduced | moved).items() if key != _CHECK},
            output_layer=outputs.output_layer if self._logits else None,
            row_losses=None if outputs.row_losses is None else outputs.row_losses.detach(),
        )

    def _kept_logits(self, outputs: Outputs) -> Any:
        if not self._logits:
            return None
        if outputs.output_layer is not None:
            return outputs.output_layer.logits  # made when read
        return None if outputs.logits is None else outputs.logits.detach()


def _wanted(kept: Sequence[str], reductions: Mapping[str, Reduction]) -> list[str]:
    """Every parameter that is to be tapped, once."""
    names = dict.fromkeys(kept)
    for key, reduction in reductions.items():
        if not reduction.parameters:
            raise ValueError(f"reduction {key!r} names no parameter, so that it would always be 0")
        names.update(dict.fromkeys(reduction.parameters))
    return list(names)
