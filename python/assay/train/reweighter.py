"""Scores of the batch that is being trained on, turned into its weights in the same step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
import torch.distributed as dist
from torch import Tensor, nn

from assay.methods.base import Column, Method, Need
from assay.probe import Jvp, Signals, tapped_parameters
from assay.probe.holding import Held, Summed
from assay.probe.packing import Packing
from assay.probe.training import BatchSize, TrainingTaps
from assay.probe.wrappers import check_can_be_tapped
from assay.tasks.base import base_task
from assay.train.checks import check_bits, check_given, check_losses, check_settings, names_of
from assay.train.journal import Journal
from assay.train.weights import Mode, best_share, gathered, softmax_weights


class Reweighter:
    """Trains on what a method says is worth it, with one backward pass. Two lines of a training loop change::

        reweighter = assay.train.Reweighter(model, method, layers="head")      # once
        ...
        losses = F.cross_entropy(model(x), y, reduction="none")                # one loss per sample
        reweighter.backward(losses, ids)                                       # was: losses.mean().backward()

    The method's scores come from the trainer's own forward and backward pass; the weights from the scores, over the
    global batch where training is distributed; and the ``.grad`` of the reweighted parameters is
    (1/B) Σ_b w_b ∇ℓ_b, from the same factors, where Σ_b w_b = B. All other parameters get the plain mean. With weight
    1 for every sample, that is ``losses.mean().backward()``.

    Online Grad-Mimic is 2501.06708, stage 1, with ``GradMimic``; its paper reweights one layer.

    Args:
        model: the model that is trained, itself rather than a wrapper (``DistributedDataParallel(model)`` is made of it
            afterwards). It must be called once per ``backward``, and not be compiled.
        method: whose first column, or ``by``, is what weights are made of. Its model is ``model``.
        mode: ``"reweight"``: w = B softmax(score / temperature). ``"filter"``: w = B / n for the share ``keep`` with
            the best scores, n samples, and 0 for the others. ``"observe"``: scores alone, every gradient is the plain
            mean; see ``exact``.
        temperature: in units of the score.
        layers: glob or globs of the layers whose gradient is reweighted; None: every supported layer. Their inputs and
            output gradients are kept until the backward pass is over, also where a checkpoint would let go of inputs.
        warmup_steps: that many first calls of ``backward`` train plainly and score nothing.
        keep: of mode ``"filter"``, in (0, 1].
        by: the column that the weights come from; a column that is kept low counts with its sign turned.
        every: score every so many calls; those between train plainly.
        exact: of mode ``"observe"``. True: every bit of the gradients is autograd's, and scores take products of their
            own. False: a scored parameter's gradient is the sum of the samples' own, which are made for the scores
            anyway; it differs from autograd's by the layer's rounding (1e-6 in float32; 1e-2 where autograd adds up in
            bfloat16, as a bias's under autocast), and long sequences' weights cost a product less. Recurrent layers,
            which run step by step while they are scored, are observed with False alone.
        batch_size: (args, kwargs) of the model's forward -> the number of samples; None: the first dimension of the
            first tensor.
        recompute: no output gradients are kept but those of what all samples share, and the graph is; a second
            backward pass, with weighted losses, gives the reweighted gradients.
        verify: compare the per-sample gradients with autograd's in the first step, and whenever layers meet their
            inputs in a new way.
        skip_unsupported: leave the layers out that cannot be tapped exactly, instead of raising.
        process_group: over which a batch is global; None: the default group.

    Attributes:
        weights: (B,) float32 of the last call; None before.
        step: how often ``backward`` was called.

    Raises:
        ValueError: a mode, column or number that there is not; a method of another model, or one that wants what a
            trainer does not give.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        mode: Mode = "reweight",
        temperature: float = 0.5,
        layers: str | Sequence[str] | None = None,
        warmup_steps: int = 0,
        keep: float | None = None,
        *,
        by: str | None = None,
        every: int = 1,
        exact: bool = True,
        batch_size: BatchSize | None = None,
        recompute: bool = False,
        verify: bool = True,
        skip_unsupported: bool = False,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        check_settings(mode, temperature, warmup_steps, keep, every, exact=exact, recompute=recompute)
        check_can_be_tapped(model)
        self.model, self.method, self.mode = model, method, mode
        self.temperature, self.keep, self.warmup_steps, self.every = temperature, keep, warmup_steps, every
        self.recompute = recompute
        self._group, self._layers, self._skips = process_group, layers, skip_unsupported
        method.refresh()
        self._needs = method.needs()
        self._own = _own_role(model, method, self._needs)
        self._reductions = {key: r for key, r in self._needs[self._own].reductions.items() if not isinstance(r, Jvp)}
        self._by = _column(method, by)
        self._trainable = _trainable(model)
        scored = {name for reduction in self._reductions.values() for name in reduction.parameters}
        if mode == "observe" and exact:
            check_bits(model, scored)
        chosen = tapped_parameters(model, layers, skip_unsupported) if mode != "observe" else () if exact else scored
        self._parameters = [name for name, _ in model.named_parameters() if name in chosen]
        names = [name for name, _ in model.named_parameters() if name in scored.union(chosen)]
        self._taps = TrainingTaps(model, names, batch_size=batch_size, verify=verify)
        self._journal = Journal(method.columns)
        self._with_ids: bool | None = None
        self.weights: Tensor | None = None
        self.step = 0
        self._arm()

    def backward(
        self,
        losses: Tensor,
        ids: Sequence[Any] | Tensor | None = None,
        *,
        scale: float | Tensor = 1.0,
        logits: Tensor | None = None,
        labels: Tensor | None = None,
        reference_losses: Tensor | None = None,
    ) -> None:
        """In place of ``(scale * losses).mean().backward()``.

        Args:
            losses: (B,), one per sample, as they are: not divided by accumulation steps, not multiplied by a loss
                scale. ``scale`` does that. Where gradients overflow because of a scale above 1, the step is a plain
                one, whose gradients a ``GradScaler`` finds not to be finite, and the table has no rows of it.
            ids: B names of the samples, strings or integers, in every call or in none.
            scale: what the trainer multiplies losses with before it backpropagates, a number or (B,): one over the
                accumulation steps, ``scaler.scale(losses.new_ones(()))``, a sample's share of the batch's tokens. Where
                processes have batches of different sizes, a number is of the mean over the global batch; (B,) say what
                each sample counts, and are taken as they are.
            logits, labels: (B, C) and (B,), of a method that asks for logits.
            reference_losses: (B,), of a method that compares with a reference's.

        Raises:
            RuntimeError: losses that are not one finite number per sample of the last forward pass; a layer that did
                not run, or whose gradients cannot be told apart by sample; scores that make no weights.
            ValueError: ids that are missing, repeated, neither strings nor integers, or not one per sample; logits,
                labels or reference losses that are not.
        """
        recorded = self._taps.recorded()
        size = check_losses(losses)
        check_given(size, logits=logits, labels=labels, reference_losses=reference_losses)
        names = self._names(ids, losses)
        given = torch.as_tensor(scale, dtype=losses.dtype, device=losses.device)
        scales = given.expand(size) / size
        self.step += 1
        if not self._taps.is_on:
            torch.autograd.backward(losses, scales)
        else:
            if not recorded:
                raise RuntimeError(
                    "the model did not run forward, with gradients and by its own __call__, since the last backward(): "
                    "expected losses of a forward pass of the model that the Reweighter was given"
                )
            self._check_parameters()
            self._step(losses, scales, names, _Given(logits, labels, reference_losses, given.shape == losses.shape))
        self._arm()

    @contextmanager
    def packed(self, seq_idx: Tensor | Packing) -> Iterator[None]:
        """Forward passes in this context are of packed rows, in which many samples lie end to end::

            with reweighter.packed(seq_idx):
                logits = model(input_ids, position_ids=position_ids).logits        # (R, T, V)
            losses = assay.train.sample_means(token_losses, labels != -100, seq_idx)
            reweighter.backward(losses, ids)

        The samples must not see each other: with position ids that start anew at every sample, models of transformers
        keep them apart. ``verify`` finds a model that does not, whatever is tapped. Layers that run on each position by
        itself (linear, embedding, norm, a mixture's experts) can be tapped, and bare parameters that meet every
        position; convolutions over positions are refused.

        Args:
            seq_idx: (R, T) int64, the sample of each position, from 0 on; −1 where a position is nobody's.

        Raises:
            ValueError: it is not, or one of the samples 0 … B − 1 has no position.
        """
        packing = seq_idx if isinstance(seq_idx, Packing) else Packing.of(seq_idx)
        before, self._taps.packing = self._taps.packing, packing
        try:
            yield
        finally:
            self._taps.packing = before

    @property
    def is_due(self) -> bool:
        """Whether the next ``backward`` scores; within a forward pass, that pass' own."""
        return self._taps.is_on

    @property
    def compares(self) -> bool:
        """Whether the method takes ``reference_losses``."""
        return "reference" in self._needs and self._own != "reference"

    @property
    def tapped(self) -> list[str]:
        """Names of the parameters whose gradients are scored or reweighted."""
        return list(self._taps.parameters)

    def table(self) -> pa.Table:
        """What was scored: ``id``, ``step`` (of the call, from 1), a column per score, ``weight``.

        It grows by a row per sample and scored step, in the host's memory and in ``state_dict``.
        """
        return self._journal.table()

    def state_dict(self) -> dict[str, Any]:
        """The calls so far and the table, for a checkpoint of the trainer's."""
        return {"step": self.step, **self._journal.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step = int(state["step"])
        self._journal.load_state_dict(state)
        self._with_ids = self._journal.has_ids
        self._arm()

    def detach(self) -> None:
        """Take the hooks off the model."""
        self._taps.detach()

    # ---- a step

    def _arm(self) -> None:
        """Decide whether the next forward pass is recorded."""
        since = self.step - self.warmup_steps
        self._taps.is_on = since >= 0 and since % self.every == 0

    def _check_parameters(self) -> None:
        """RuntimeError where a parameter that has been unfrozen belongs to the reweighted ones."""
        if self.mode == "observe" or _trainable(self.model) == self._trainable:
            return
        now = tapped_parameters(self.model, self._layers, self._skips)
        if added := [name for name in now if name not in self._parameters]:
            raise RuntimeError(
                f"parameter {added[0]!r} has been unfrozen since the Reweighter was made, and would be trained without "
                "weights; detach() it and make another"
            )

    def _step(self, losses: Tensor, scales: Tensor, names: Sequence[str] | None, given: _Given) -> None:
        self.method.refresh()
        held = (Summed if self.mode == "observe" else Held)(self._parameters, losses.detach())
        reduced = self._taps.backward(losses, scales, self._reductions, held, recompute=self.recompute)
        own = Signals(losses.detach().float(), given.logits, given.labels, reduced=reduced, size=len(losses))
        others = {role: Signals(given.losses_of(role, losses), size=len(losses)) for role in self._needs}
        with torch.no_grad():
            scores = self.method.score({**others, self._own: own})
            overflowed = _overflowed(reduced, losses)
            weights = self._weigh(scores[self._by.name].to(losses.device), overflowed, scales)
            factors = weights.local if given.by_sample else weights.local * weights.correction
            self._add(losses, scales, factors, held)
            if weights.are_void and bool(overflowed.any()) and self._all_finite():
                raise RuntimeError(f"the gradients of step {self.step} are finite, and scores made of them are not")
        self.weights = weights.local.float()
        if not weights.are_void:
            self._journal.add(names, self.step, {**_known(scores), "weight": self.weights})

    def _weigh(self, scores: Tensor, overflowed: Tensor, scales: Tensor) -> _Weights:
        columns = torch.stack([scores.double(), overflowed.double()], 1)
        everyone, own = gathered(columns, self._group)
        overflow, everyone = everyone[:, 1].any(), everyone[:, 0] * (-1 if self._by.keep == "low" else 1)
        overflow, unknown, infinite = torch.stack([overflow, everyone.isnan().all(), everyone.isinf().any()]).tolist()
        void = unknown or infinite
        if void and not (overflow and float(scales.max()) * len(scales) > 1):
            raise RuntimeError(
                f"score {self._by.name!r} is {'infinite for a sample' if infinite else 'NaN for all'} "
                f"of the batch in step {self.step}: no weights can be made of it"
            )
        if self.mode == "observe" or void:
            weights = torch.ones_like(everyone)
        elif self.mode == "filter":
            assert self.keep is not None
            weights = best_share(everyone, self.keep)
        else:
            weights = softmax_weights(everyone, self.temperature)
        ranks = dist.get_world_size(self._group) if len(everyone) > len(scores) else 1
        return _Weights(weights[own], len(scores) * ranks / len(everyone), void)

    def _all_finite(self) -> bool:
        return all(p.grad is None or bool(p.grad.isfinite().all()) for p in self.model.parameters())

    def _add(self, losses: Tensor, scales: Tensor, factors: Tensor, held: Held | Summed) -> None:
        """The gradients of the parameters that autograd's pass left out."""
        self._taps.add(held, factors)
        rest = [name for name in self._parameters if name not in held.parameters]
        if self.recompute and rest:
            self._taps.weighted_pass(losses, scales * factors.to(scales), rest)

    def _names(self, ids: Sequence[Any] | Tensor | None, losses: Tensor) -> list[str] | None:
        if self._with_ids is None:
            self._with_ids = ids is not None
        if ids is None and self._with_ids:
            raise ValueError(
                f"ids: none came in step {self.step + 1}, and earlier steps had them; expected {len(losses)}"
            )
        if ids is None:
            return None
        names = names_of(ids)
        if len(names) != losses.numel():
            raise ValueError(f"ids: expected one per sample, {losses.numel()}, found {len(names)}")
        if repeated := [name for name, count in Counter(names).items() if count > 1]:
            raise ValueError(
                f"ids: {repeated[0]!r} is in the batch of step {self.step + 1} more than once, expected once: drop the "
                "last batch rather than fill it up (drop_last=True; Accelerate's even_batches=False)"
            )
        return names


@dataclass(frozen=True)
class _Given:
    """What the caller of ``backward`` gave beside the losses."""

    logits: Tensor | None
    labels: Tensor | None
    reference_losses: Tensor | None
    by_sample: bool  # the scale is, and says what each counts

    def losses_of(self, role: str, like: Tensor) -> Tensor:
        if role == "reference" and self.reference_losses is not None:
            return self.reference_losses.detach().to(like.device, torch.float32)
        return torch.full_like(like, torch.nan, dtype=torch.float32, requires_grad=False)


@dataclass(frozen=True)
class _Weights:
    """This rank's weights, and what makes the mean over ranks of different sizes that over all samples.

    ``are_void``: a loss scale has overflowed, so that they are all 1, and the trainer's scaler will skip the step.
    """

    local: Tensor
    correction: float
    are_void: bool


def _overflowed(reduced: Mapping[str, Tensor], losses: Tensor) -> Tensor:
    """(B,) bool: the samples of which something that was made of their gradients is not finite."""
    found = torch.zeros(len(losses), dtype=torch.bool, device=losses.device)
    for values in reduced.values():
        found |= ~values.isfinite().reshape(len(values), -1).all(1)
    return found


def _trainable(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def _known(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those that the trainer could give the signals of: a reference's loss may not be among them."""
    return {name: values for name, values in scores.items() if values.ndim == 1 and not bool(values.isnan().all())}


def _own_role(model: nn.Module, method: Method, needs: Mapping[str, Need]) -> str:
    """The role of the model that is trained."""
    own = [role for role, need in needs.items() if need.model is model]
    if len(own) != 1:
        kinds = ", ".join(f"{role}: {type(need.model).__name__}" for role, need in needs.items())
        raise ValueError(
            f"Reweighter: {method.name}: expected a method that looks at the model in training once, found {len(own)} "
            f"of its models to be it ({kinds}); make the method of the same object as model"
        )
    need = needs[own[0]]
    for what, asked in (("embeddings", need.embeddings), ("raw columns", need.raw), ("another view", need.view)):
        if asked:
            raise ValueError(f"Reweighter: {method.name} asks for {what}, which a trainer does not give; score offline")
    if need.task is not None and base_task(need.task) is not need.task:
        raise ValueError(
            f"Reweighter: {method.name} is made of the gradients of {type(need.task).__name__}, and a trainer has "
            "those of its own losses; score offline"
        )
    if forward := [key for key, reduction in need.reductions.items() if isinstance(reduction, Jvp)]:
        raise ValueError(
            f"Reweighter: {method.name}: {forward[0]!r} takes further forward passes, which a trainer does not make"
        )
    return own[0]


def _column(method: Method, by: str | None) -> Column:
    columns = {column.name: column for column in method.columns if column.width == 1}
    if by is not None and by not in columns:
        raise ValueError(f"Reweighter: by: {method.name} gives no score {by!r}; it gives {', '.join(columns)}")
    return columns[by] if by is not None else next(iter(columns.values()))
