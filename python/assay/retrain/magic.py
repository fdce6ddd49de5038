"""MAGIC: the exact derivative of a target's loss in every sample's weight, through the whole run, 2504.16430."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from assay.retrain.magic_checks import check
from assay.retrain.magic_folder import Folder, Progress, facts
from assay.retrain.magic_optimizers import Adam
from assay.retrain.magic_plan import Plan
from assay.retrain.magic_replay import InMemory, Replay
from assay.retrain.magic_smoothness import MISSED, SMOOTH, WIDTH, alignment, missed, perturbed_runs
from assay.retrain.magic_training import Diverged, Losses, Training, running
from assay.tasks import Task

Targets = Mapping[str, Sequence[Any]]
"""By the target's name, batches as ``losses`` takes them."""

_LOOKED_AT = 16  # batches, of which each resumption takes the losses

_log = logging.getLogger("assay")


@dataclass(frozen=True, eq=False)
class Magic:
    """What every sample of one run did to the targets.

    Attributes:
        scores: (N, targets) float64, −∂L/∂w_i: what a sample takes off the target's loss per unit of its weight, in the
            loss' units; removing the samples R raises the loss by about Σ_{i∈R} scores_i. Keep high. NaN for a sample
            that is in no batch: nothing is known of it.
        targets: their names, in the order of the columns.
        losses: (targets,) float64, their mean losses after the run.
        metasmoothness: (directions,) float64; below 0.95 the scores say little of removals, see ``metasmoothness``.
        missed: of what changing all weights by 0.1 N(0, 1) does to the targets' losses, to first order, by the
            metasmoothness' runs: the share that the scores do not tell, over directions and targets; NaN: not measured.
        parameters: the trained ones, by name.
        warnings: what speaks against the scores, in words.
        plan: what was predicted.
    """

    scores: Tensor
    targets: tuple[str, ...]
    losses: Tensor
    metasmoothness: Tensor
    missed: float
    parameters: dict[str, Tensor]
    warnings: tuple[str, ...]
    plan: Plan


def magic(
    training: Training,
    targets: Targets,
    *,
    weights: ArrayLike | Tensor | None = None,
    target_losses: Task | Losses | None = None,
    checkpoints: int | None = None,
    most_bytes: int | None = None,
    folder: str | os.PathLike[str] | None = None,
    save_every: int | None = None,
    directions: int = 2,
    seed: int = 0,
) -> Magic:
    """The derivative of each target's loss after training in the weight of every sample of the run, −∂L_q(θ_T)/∂w.

    Exact for this run, its start and its order: steps are pulled back one by one, from the last to the first
    (section 2 of 2503.13751), from states that are kept or replayed by the binomial schedule: REPLAY's trade of memory
    for time, with the fewest steps for its memory. The bits do not depend on the number of checkpoints.

    Before: the run is checked on its first batch (dropout, batch normalisation, randomness, second derivatives), its
    cost is logged, and its metasmoothness is measured; after, what the scores miss of the runs that this took. Only a
    smooth run's derivative tells what removals do.

    Args:
        training: the run.
        targets: batches by name; a target's loss is the mean over its samples, in eval mode.
        weights: w (N,), where the derivative is taken; None: ones.
        target_losses: another task or function for the targets (a margin, say); None: the training's.
        checkpoints: states kept at a time; None: about log₂ T.
        most_bytes: refuse a run whose states and derivatives would take more.
        folder: keeps checkpoints as files, so that a killed run goes on where it was; a finished one answers at once.
        save_every: with a folder: steps of the way back between two savings; None: a 20th of the run.
        directions: of the metasmoothness, each of which costs two runs; 0: not measured.
        seed: of these directions.

    Raises:
        ValueError, TypeError: no target, one without samples, or whose loss is not finite; what ``Training`` or the
            checks refuse; a run that would take more than ``most_bytes``; a folder of another run.
        Diverged: a sample's loss is not finite.
        RuntimeError: a replayed state, or a batch's or target's loss, came out otherwise than before.
    """
    if not isinstance(targets, Mapping):
        raise TypeError(f"targets: expected batches by name, got {type(targets).__name__}")
    if not targets or len({str(name) for name in targets}) < len(targets):
        raise ValueError(f"targets: expected one at least, of different names, got {list(targets)}")
    if not isinstance(directions, int) or directions < 0:
        raise ValueError(f"directions: expected an integer of at least 0, got {directions!r}")
    given, batches = training.weights(weights), {str(name): list(own) for name, own in targets.items()}
    plan = Plan.of(training, targets=len(batches), checkpoints=checkpoints, directions=directions)
    _check_bytes(plan, most_bytes, folder is not None)
    every = max(1, training.steps // 20) if save_every is None else save_every
    if not isinstance(every, int) or every < 1:
        raise ValueError(f"save_every: expected an integer of at least 1, or None, got {save_every!r}")
    with contextlib.ExitStack() as stack:
        stack.enter_context(running())
        checked = check(training)
        plan = plan.paced(checked)
        _log.info("magic: %s", plan)
        kept = None
        if folder is not None:
            settings = {"directions": directions, "seed": seed, "width": WIDTH, "target_losses": _name(target_losses)}
            kept = Folder(folder, facts(training, given, batches, settings))
            stack.enter_context(kept.held(training.start.device))
        run = _Run(training, given, plan, kept)
        progress = run.there(batches, target_losses or training.losses, directions, seed)
        run.back(progress, every)
    return _result(training, plan, progress, tuple(batches), checked.doubts, seed)


class _Run:
    """The way there, and the way back."""

    def __init__(self, training: Training, weights: Tensor, plan: Plan, folder: Folder | None) -> None:
        self._training, self._weights, self._folder = training, weights, folder
        last, most = training.steps - 1, _LOOKED_AT - 1
        self._looked_at = sorted({round(i * last / most) for i in range(_LOOKED_AT)}) if folder else []
        self._progress = folder.progress() if folder else None
        digests = torch.zeros(training.steps + 1, dtype=torch.int64)
        if self._progress is not None:
            digests = self._progress.digests
        elif folder is not None:
            known = folder.digests()
            digests[: len(known)] = known
        self._digests = digests
        self._replay = Replay(training.initial, self._advance, plan.checkpoints, folder or InMemory(), digests)
        still = next((step for step, rate in enumerate(training.rates) if rate), 0)  # a schedule may begin at 0
        self._replay.check_beginning(still + 1)

    def _advance(self, state: tuple[Tensor, ...], step: int) -> tuple[Tensor, ...]:
        return self._training.advance(state, step, self._weights)

    def there(self, targets: Mapping[str, list[Any]], losses: Task | Losses, directions: int, seed: int) -> Progress:
        """The trained model, its metasmoothness and its targets' gradients; or what was saved of a later point.

        Raises:
            RuntimeError: a target's loss, or of a folder's run a batch's, that comes out otherwise than before: no
                fingerprint knows what they compute.
        """
        found = self._progress or self._there(targets, losses, directions, seed)
        if self._progress is not None:
            self._compare_losses(found)
        name, batches = next(iter(targets.items()))
        again, _ = self._training.target_gradient(found.final, losses, batches)
        if again != float(found.losses[0]):
            raise RuntimeError(
                f"target {name!r}: its loss was {float(found.losses[0]):.7g} before, and is {again:.7g} now: it is "
                "random or not deterministic, or, where the run was resumed, another one (target_losses) or of another "
                "machine"
            )
        return found

    def _compare_losses(self, before: Progress) -> None:
        for step, known, found in zip(
            self._looked_at, before.told.tolist(), self._batch_losses(before.final), strict=True
        ):
            if known != found:
                raise RuntimeError(
                    f"step {step}: after the run its batch's mean loss was {known:.7g} before, and is {found:.7g} now: "
                    "where the run was resumed, its losses are other ones, or of another machine"
                )

    def _batch_losses(self, theta: Tensor) -> list[float]:
        """The mean losses of batches from all over the run, if it has a folder."""
        return [self._mean_loss(theta, step) for step in self._looked_at]

    def _mean_loss(self, theta: Tensor, step: int) -> float:
        """Of a step's batch; infinite where one is not finite."""
        try:
            return float(self._training.weighted_loss(theta, step, self._training.weights()).detach())
        except Diverged:
            return float("inf")

    def _there(self, targets: Mapping[str, list[Any]], losses: Task | Losses, directions: int, seed: int) -> Progress:
        training, final = self._training, self._replay.state(self._training.steps)
        adjoints, values = [], []
        for name, batches in targets.items():
            try:
                value, gradient = training.target_gradient(final[0], losses, batches)
            except ValueError as error:
                raise ValueError(f"target {name!r}: {error}") from error
            values.append(value)
            adjoints.append((gradient, *(torch.zeros_like(moment) for moment in final[1:])))
        smoothness, changes = self._perturbed(final[0], values, targets, losses, directions, seed)
        in_weights = torch.zeros(len(targets), training.size, dtype=torch.float64)
        progress = Progress(
            training.steps,
            adjoints,
            in_weights,
            torch.tensor(values, dtype=torch.float64),
            smoothness,
            changes,
            final[0].clone(),
            torch.tensor(self._batch_losses(final[0]), dtype=torch.float64),
            self._digests,
        )
        if self._folder is not None:
            self._folder.save(progress)
        return progress

    def _perturbed(
        self,
        final: Tensor,
        values: Sequence[float],
        targets: Mapping[str, list[Any]],
        losses: Task | Losses,
        directions: int,
        seed: int,
    ) -> tuple[Tensor, Tensor]:
        """The metasmoothness (directions,), and by how much its runs change the targets' losses
        (directions, 2, targets)."""
        smoothness = torch.full((directions,), torch.nan, dtype=torch.float64)
        changes = torch.full((directions, 2, len(values)), torch.nan, dtype=torch.float64)
        runs = perturbed_runs(self._training, self._weights, directions, WIDTH, seed) if directions else ()
        for d, ends in enumerate(runs):
            if ends is None:
                continue
            smoothness[d] = alignment(final, *ends)
            for e, end in enumerate(ends):
                for q, (value, batches) in enumerate(zip(values, targets.values(), strict=True)):
                    with contextlib.suppress(ValueError):  # a loss that is not finite
                        changes[d, e, q] = self._training.target_gradient(end, losses, batches)[0] - value
        return smoothness, changes

    def back(self, progress: Progress, every: int) -> None:
        """Down to the first step; ``progress`` changes in place."""
        since, after = 0, None  # the state after the step at hand, once one has been there
        while progress.step:
            step = progress.step - 1
            state = self._replay.state(step)
            inner = self._training.pull_back(state, step, self._weights, progress.adjoints, after)
            after = state
            if not bool(inner.isfinite().all()):
                raise ValueError(
                    f"step {step}: the derivative in the weights is not finite; is the run far from smooth?"
                )
            rows = torch.from_numpy(self._training.rows[step])
            progress.in_weights.index_add_(1, rows, inner.double().cpu())
            progress.step, since = step, since + 1
            if self._folder is not None and (since == every or not step):
                self._folder.save(progress)
                since = 0


def _result(
    training: Training, plan: Plan, progress: Progress, targets: tuple[str, ...], doubts: tuple[str, ...], seed: int
) -> Magic:
    seen = torch.zeros(training.size, dtype=torch.bool)
    for rows in training.rows:
        seen[torch.from_numpy(rows)] = True
    scores = torch.where(seen, -progress.in_weights, torch.nan).T.contiguous()
    parameters = {name: p.clone() for name, p in training.named(progress.final).items()}
    share = missed(progress.changes, progress.in_weights, WIDTH, seed)
    warnings = (*doubts, *_warnings(training, progress.smoothness, share))
    for warning in warnings:
        _log.warning("magic: %s", warning)
    return Magic(scores, targets, progress.losses, progress.smoothness, share, parameters, warnings, plan)


def _warnings(training: Training, smoothness: Tensor, share: float) -> list[str]:
    found = []
    if not len(smoothness):
        found.append("the metasmoothness was not measured (directions=0)")
    elif not float(smoothness.mean()) >= SMOOTH:  # NaN is none either
        found.append(
            f"the run's metasmoothness is {float(smoothness.mean()):.3f}, below {SMOOTH}: its derivative says little "
            "of what removing samples does; a lower rate, larger batches, smaller logits or smooth activations help"
        )
    if share > MISSED:
        found.append(
            f"the scores miss {share:.0%} of what small changes of all weights do to the targets, above {MISSED:.0%}: "
            "the run has kinks, or bends; Adam's step is a sign where gradients are far above √eps_root, so that a "
            "larger eps_root helps, and so do a lower rate, larger batches, smaller logits and smooth activations"
        )
    if isinstance(training.optimizer, Adam) and not training.optimizer.eps_root:
        found.append(
            "Adam with eps_root=0: its step is all but a sign where gradients are small, and its derivative there is "
            "as large as 1/eps; 1e-12 is smooth and changes no training"
        )
    return found


def _check_bytes(plan: Plan, most: int | None, on_disk: bool) -> None:
    needed = plan.working_bytes + (0 if on_disk else plan.checkpoint_bytes)
    if most is None or needed <= most:
        return
    room = (most - plan.working_bytes) // plan.state_bytes
    if room < 1:
        remedy = "ask for fewer targets at a time" if plan.backward_steps > plan.steps else "it needs that much"
    else:
        remedy = f"set checkpoints={room}, or a folder"
    raise ValueError(f"most_bytes: expected at least {needed:,} for {plan}, got {most:,}; {remedy}")


def _name(losses: Any) -> str:
    return repr(losses) if isinstance(losses, Task) else getattr(losses, "__qualname__", type(losses).__name__)
