"""Datamodel matching: a trained model is tuned to the outputs that it would have without some samples, 2410.23232."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from assay.probe.quiet import undisturbed
from assay.retrain import samples
from assay.retrain.checks import Floats, Rows, finite, numbers, positive, rows_of, whole
from assay.tasks.base import call, logits_of, to_device, wide

_log = logging.getLogger("assay")

Outputs = Callable[[nn.Module, Any], Tensor]
"""(model, inputs of T samples) -> (T, ...) outputs with their graph."""


@dataclass(frozen=True)
class Forgotten:
    """A model that was tuned to predicted outputs.

    Attributes:
        model: a copy of the one that was given, tuned, in the modes in which that one was.
        wanted: (T, ...) the predicted outputs f̂.
        before, after: mean over the T inputs of ‖f_x − f̂_x‖², of the model that was given and of the tuned one.
    """

    model: nn.Module
    wanted: Floats
    before: float
    after: float


def outputs_without(outputs: npt.ArrayLike, effects: npt.ArrayLike, removed: npt.ArrayLike) -> Floats:
    """f̂_x = f_x − Σ_{i∈F} β_i[x]: what the outputs would be of a model that was trained without the samples F.

    Args:
        outputs: (T, ...) of the model that was trained on all N samples.
        effects: β, (N, T, ...): what training on sample i adds to each output; a datamodel's ``scores``, say.
        removed: F, row numbers or a mask (N,).

    Raises:
        ValueError: shapes that do not match, rows that are none, outputs or effects of removed samples that are not
            finite.
    """
    own = finite(outputs, "outputs")
    return own - _effect(effects, removed, own.shape)


def forget(
    model: nn.Module,
    inputs: Any,
    effects: npt.ArrayLike,
    removed: npt.ArrayLike,
    *,
    outputs: Outputs | None = None,
    steps: int = 500,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> Forgotten:
    """Tune a copy of ``model`` to the outputs that it would have without the removed samples.

    Adam on the mean of ‖f_x(θ) − f̂_x‖² over batches of the inputs, at a rate that falls to 0, in eval mode: dropout is
    off, running statistics stay.

    Args:
        model: trained on all N samples. It is not changed.
        inputs: of the T samples at which outputs are matched: those to be removed, and many of those that stay. A
            tensor, array, list, or mapping of such.
        effects: (N, T, ...), as in ``outputs_without``, on these inputs.
        removed: row numbers of the N, or a mask (N,).
        outputs: what is matched; None: the logits (T, C) that the model returns.
        steps, batch_size, learning_rate: of the tuning.
        seed: of the batches' order.

    Raises:
        TypeError, ValueError: what ``outputs_without`` refuses; nothing to train; outputs that are not T; a tuning that
            diverges.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    whole("steps", steps, 1)
    whole("batch_size", batch_size, 1)
    whole("seed", seed, 0)
    positive("learning_rate", learning_rate)
    x = samples.inputs(inputs)
    run = outputs or _logits
    tuned = copy.deepcopy(model)
    own = _all_outputs(run, tuned, x, batch_size)
    wanted = own.numpy() - _effect(effects, removed, tuple(own.shape))
    target = torch.from_numpy(wanted)
    _tune(tuned, run, x, target, _batches(len(target), steps, batch_size, seed), learning_rate)
    before = _distance(own, target)
    after = _distance(_all_outputs(run, tuned, x, batch_size), target)
    if before and not after < before:
        _log.warning(
            "forget: tuning brought the outputs no nearer to those that are wanted (%.3g, before %.3g); take more "
            "steps or a smaller learning_rate",
            after,
            before,
        )
    return Forgotten(tuned, wanted, before, after)


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """z_y − log Σ_{c≠y} exp z_c, the log odds of the label: (..., N, C) and (N,) -> (..., N), float32 or wider."""
    if logits.ndim < 2 or labels.shape != logits.shape[-2:-1]:
        raise ValueError(
            f"expected logits (..., N, C) and labels (N,), got {tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    logits, classes = wide(logits), logits.shape[-1]
    if labels.is_floating_point() or bool(((labels < 0) | (labels >= classes)).any()):
        raise ValueError(f"labels: expected integers 0..{classes - 1}, got {samples.short(labels.tolist())}")
    own = nn.functional.one_hot(labels.long(), classes).bool().expand_as(logits)
    rest = logits.masked_fill(own, -torch.inf).logsumexp(-1)
    return logits[own].reshape(rest.shape) - rest


def klom(
    unlearned: npt.ArrayLike,
    oracles: npt.ArrayLike,
    *,
    bins: int = 20,
    clip: float = 100.0,
    floor: float = 1e-5,
) -> Floats:
    """KL of margins, (T,): per input, KL(unlearned ‖ oracles) between histograms of two sets of models' margins.

    Both are clipped to ±``clip`` and counted in ``bins`` of equal width from the smallest to the largest value of
    either; the largest is in the last bin. ``floor`` is added to every share before these are scaled to sum to 1. It
    takes models, not samples: with few, two sets of oracles are already apart (see the method's page).

    Args:
        unlearned: (M, T) margins of M models that are said to have forgotten; ``margins`` makes them.
        oracles: (K, T) of K models that were trained without.

    Raises:
        ValueError: shapes that do not match, fewer than two models, a margin that is NaN.
    """
    both = [numbers(unlearned, "unlearned"), numbers(oracles, "oracles")]
    if any(m.ndim != 2 or len(m) < 2 for m in both) or both[0].shape[1] != both[1].shape[1]:
        raise ValueError(
            f"expected margins (models, T) of two models or more each, got {both[0].shape} and {both[1].shape}"
        )
    for name, values in zip(("unlearned", "oracles"), both, strict=True):
        if np.isnan(values).any():
            raise ValueError(f"{name}: {int(np.isnan(values).sum())} of {values.size} margins are NaN")
    whole("bins", bins, 2)
    positive("clip", clip)
    positive("floor", floor)
    ours, theirs = (np.clip(values, -clip, clip) for values in both)
    found = np.empty(ours.shape[1])
    for t, (a, b) in enumerate(zip(ours.T, theirs.T, strict=True)):
        low, high = min(a.min(), b.min()), max(a.max(), b.max())
        p, q = (_shares(values, bins, low, high, floor) for values in (a, b))
        found[t] = (p * np.log(p / q)).sum()
    return found


def _shares(values: Floats, bins: int, low: float, high: float, floor: float) -> Floats:
    # Not np.histogram, which refuses a range of fewer numbers than bins.
    own = np.minimum((values - low) / (high - low if high > low else 1.0) * bins, bins - 1).astype(np.int64)
    shares = np.bincount(own, minlength=bins) / len(values) + floor
    return np.asarray(shares / shares.sum(), dtype=np.float64)


def _effect(effects: npt.ArrayLike, removed: npt.ArrayLike, shape: tuple[int, ...]) -> Floats:
    """Σ_{i∈F} β_i, of the outputs' shape."""
    known = np.shape(effects)
    if known[1:] != shape or len(known) < 2:
        raise ValueError(f"effects: expected what each of N samples adds to outputs {shape}, (N, ...), got {known}")
    rows = rows_of(removed, known[0], "removed")
    beta = numbers(
        effects[torch.from_numpy(rows)] if isinstance(effects, Tensor) else np.asanyarray(effects)[rows], "effects"
    )
    if not np.isfinite(beta).all():
        row = rows[int(np.flatnonzero(~np.isfinite(beta).all(tuple(range(1, beta.ndim))))[0])]
        raise ValueError(
            f"effects: those of removed sample {row} are not finite: nothing is known of it (a datamodel has NaN for a "
            "sample that was in all of its subsets or in none)"
        )
    return np.asarray(beta.sum(0), dtype=np.float64)


def _logits(model: nn.Module, inputs: Any) -> Tensor:
    return logits_of(call(model, inputs))


def _run(run: Outputs, model: nn.Module, x: Any, rows: Rows) -> Tensor:
    """Outputs at some of the inputs, on the model's device."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    found = run(model, to_device(_tensors(samples.take(x, rows)), device))
    if not isinstance(found, Tensor) or found.ndim < 1 or len(found) != len(rows):
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"outputs: expected one row for each of {len(rows)} inputs, got {shape}")
    return found


def _tensors(x: Any) -> Any:
    if isinstance(x, dict):
        return {name: _tensors(column) for name, column in x.items()}
    return torch.as_tensor(x) if isinstance(x, np.ndarray) and x.dtype.kind in "biuf" else x


def _all_outputs(run: Outputs, model: nn.Module, x: Any, batch_size: int) -> Tensor:
    """(T, ...) float64 on the host, in eval mode."""
    count = samples.count(x)
    if not count:
        raise ValueError("inputs: expected some, got none")
    with undisturbed(model), torch.no_grad():
        parts = [_run(run, model, x, rows) for rows in np.array_split(np.arange(count), -(-count // batch_size))]
    found = torch.cat(parts).double().cpu()
    if not bool(found.isfinite().all()):
        raise ValueError("outputs: the model's are not finite")
    return found


def _batches(count: int, steps: int, size: int, seed: int) -> list[Rows]:
    """Row numbers by step: a new order for each time through."""
    rng, found, order = np.random.default_rng(seed), [], np.empty(0, np.int64)
    for _ in range(steps):
        if len(order) < min(size, count):
            order = rng.permutation(count)
        found.append(order[:size])
        order = order[size:]
    return found


def _tune(model: nn.Module, run: Outputs, x: Any, target: Tensor, batches: list[Rows], learning_rate: float) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("model: has no parameter that requires a gradient; nothing to tune")
    modes = [(module, module.training) for module in model.modules()]
    optimizer = torch.optim.Adam(trained, learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(batches))
    for module, _ in modes:
        module.training = False
    with torch.enable_grad():
        for step, rows in enumerate(batches):
            optimizer.zero_grad()
            found = wide(_run(run, model, x, rows))
            loss = (found - target[torch.from_numpy(rows)].to(found)).square().sum() / len(rows)
            if not bool(loss.isfinite()):
                raise ValueError(f"forget: the tuning diverged at step {step}; take a smaller learning_rate")
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    optimizer.zero_grad()
    for module, mode in modes:
        module.training = mode


def _distance(outputs: Tensor, target: Tensor) -> float:
    return float((outputs - target).square().sum() / len(target))
