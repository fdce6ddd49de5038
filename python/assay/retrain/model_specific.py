"""Model-specific subsampling: grow a training set by what should lower the model's validation loss, 2010.10218."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from assay.methods.gauss_newton import GaussNewton
from assay.probe import Dot, Probe, tapped_parameters
from assay.probe.summed import summed_gradient
from assay.retrain import samples
from assay.retrain.checks import Floats, Rows, fraction, positive, whole
from assay.tasks import Task
from assay.tasks.base import wide

_log = logging.getLogger("assay")

Train = Callable[[Rows, int], nn.Module]
"""(rows of the training samples, seed) -> a model trained on them: mean loss + λ/2 ‖θ‖²."""

_ENOUGH = 1e-6  # of the residual, relative to the gradient


@dataclass(frozen=True)
class Subsample:
    """A training set that was grown in rounds.

    Attributes:
        rows: (size,) row numbers, in the order in which they were taken.
        sizes: (rounds + 1,) how many there were when the models were trained.
        losses: (rounds,) each round's mean validation loss, of the model trained on its first ``sizes`` rows.
        predicted: (rounds,) by how much the samples T taken next should lower it, all at once and to first order:
            ∇L_valᵀ H_S⁻¹ Σ_{z∈T} ∇ℓ(z) / (|S| + |T|). Far too much where T is not small beside S: see the
            method's page.
        residuals: (rounds,) of the inverse–vector product, relative: 1 where nothing is solved.
        explored: (rounds,) how many of the samples taken next were drawn at random.
    """

    rows: Rows
    sizes: Rows
    losses: Floats
    predicted: Floats
    residuals: Floats
    explored: Rows


def subsample(
    train: Train,
    data: Sequence[Any],
    validation: Sequence[Any],
    task: Task,
    size: int,
    *,
    penalty: float,
    first: int | None = None,
    rounds: int = 5,
    explore: float = 0.1,
    iterations: int = 100,
    batch_size: int = 256,
    seed: int = 0,
) -> Subsample:
    """Choose ``size`` of N samples for the model that is to be trained on them.

    Starts from ``first`` samples at random. Each round trains on what there is, S, and scores every other sample z by
    the predicted drop in validation loss Δ(z) = ∇L_valᵀ H_S⁻¹ ∇ℓ(z) / (|S| + 1); the best are taken, and each with
    probability ``explore`` is a random one instead.

    Args:
        train: called once a round, with the seed raised by one each time.
        data: columns of N samples, of which ``task`` takes a batch: (x, y), say.
        validation: the same columns of other samples, to which the model is to be good.
        task: its loss is differentiated, of logits or predictions.
        size: how many samples to choose.
        penalty: λ of the training, above 0; of another training, a damping of its curvature (see the method's page).
        first: None: a fifth of ``size``.
        rounds: after the first samples.
        explore: ε, against fitting the validation samples.
        iterations: of conjugate gradients, at most.
        batch_size: of scoring.
        seed: of the draws, and of the first training.

    Raises:
        ValueError: columns of different lengths, sizes that do not fit, settings out of range; fewer samples with a
            score than a round has to take.
    """
    columns, others = ([samples.inputs(column) for column in given] for given in (data, validation))
    count = _length(columns, "data")
    held_out = _batches(others, np.arange(_length(others, "validation")), batch_size)
    first = _first(count, size, first, rounds)
    whole("seed", seed, 0)
    if not 0 <= fraction("explore", explore) <= 1:
        raise ValueError(f"explore: expected a number from 0 to 1, got {explore}")
    rng = np.random.default_rng(seed)
    rows = rng.permutation(count)[:first]
    sizes, facts = [first], []
    for number, part in enumerate(np.array_split(np.arange(size - first), rounds)):
        model = train(rows.copy(), seed + number)
        rest = np.setdiff1d(np.arange(count), rows)
        slopes, known, loss, residual = _slopes(
            model,
            task,
            _batches(columns, rows, batch_size),
            held_out,
            _batches(columns, rest, batch_size),
            penalty,
            iterations,
        )
        taken, drawn = _take(slopes, len(part), explore, rng)
        facts.append((loss, float(slopes[taken].sum()) / (known + len(taken)), residual, drawn))
        rows = np.concatenate([rows, rest[taken]])
        sizes.append(len(rows))
    losses, predicted, residuals, explored = (np.array(column) for column in zip(*facts, strict=True))
    return Subsample(rows, np.array(sizes), losses, predicted, residuals, explored)


def _first(count: int, size: int, first: int | None, rounds: int) -> int:
    """How many samples to start from, or what is wrong with the sizes."""
    whole("size", size, 2)
    whole("rounds", rounds, 1)
    first = max(1, size // 5) if first is None else whole("first", first, 1)
    if not first < size <= count or size - first < rounds:
        raise ValueError(
            f"expected first < size ≤ N, and a sample per round at least, got first={first}, size={size}, N={count}, "
            f"rounds={rounds}"
        )
    return first


def predicted_drops(
    model: nn.Module,
    task: Task,
    chosen: Sequence[Any],
    validation: Sequence[Any],
    candidates: Sequence[Any],
    *,
    penalty: float,
    iterations: int = 100,
) -> tuple[Floats, float, float]:
    """Δ(z) = ∇L_valᵀ H⁻¹ ∇ℓ(z) / (|S| + 1) for every candidate; keep high. First-order in 1/|S|.

    H is the mean Gauss–Newton matrix of S plus λI; one product with its inverse is made, by conjugate gradients. Of
    squared errors of a linear model it is the Hessian.

    Args:
        model: trained on S: mean loss + λ/2 ‖θ‖².
        task: its loss is differentiated, of logits or predictions.
        chosen, validation, candidates: batches, of S, of what the loss is to fall on, of what is scored.
        penalty: λ, above 0.
        iterations: at most.

    Returns:
        (candidates,) drops, NaN for a sample without a loss; the mean validation loss; what is left of the residual,
        relative. |S| counts samples with a loss; a batch of S whose curvature is not finite is left out, and warned of.

    Raises:
        TypeError, ValueError: no model; no samples, a validation loss or a gradient that is not finite.
    """
    slopes, number, loss, residual = _slopes(model, task, chosen, validation, candidates, penalty, iterations)
    return slopes / (number + 1), loss, residual


def _slopes(
    model: nn.Module,
    task: Task,
    chosen: Sequence[Any],
    validation: Sequence[Any],
    candidates: Sequence[Any],
    penalty: float,
    iterations: int,
) -> tuple[Floats, int, float, float]:
    """∇L_valᵀ H⁻¹ ∇ℓ(z) of every candidate, |S|, the validation loss and the residual."""
    positive("penalty", penalty)
    whole("iterations", iterations, 1)
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a trained torch.nn.Module, got {type(model).__name__}")
    for name, batches in (("chosen", chosen), ("candidates", candidates)):
        if not len(batches):
            raise ValueError(f"{name}: expected batches of samples, got none")
    names = list(tapped_parameters(model, None))
    gradient, loss = _validation_gradient(model, task, validation, names)
    curvature = GaussNewton(model, task, names, chosen)
    solved, residual = _solve(curvature, gradient, penalty, iterations)
    if curvature.left_out:
        _log.warning(
            "model-specific subsampling: the curvature of %d chosen samples is not finite; they are left out of it",
            curvature.left_out,
        )
    probe = Probe(model, task, factors=(), reductions={"drop": Dot(solved)}, logits=False)
    found = []
    for batch in candidates:
        signals = probe(batch)
        found.append(signals.reduced["drop"].double().masked_fill(signals.losses.isnan(), torch.nan).cpu())
    return torch.cat(found).numpy(), curvature.samples, loss, residual


def _validation_gradient(
    model: nn.Module, task: Task, batches: Sequence[Any], names: Sequence[str]
) -> tuple[dict[str, Tensor], float]:
    """Of the mean validation loss, and that."""
    total: dict[str, Tensor] = {}
    losses, count = [], 0
    probe = Probe(model, task, factors=(), logits=False)
    for batch in batches:
        own, with_loss = summed_gradient(model, task, batch, names)
        total = {name: total[name] + g if total else wide(g) for name, g in own.items()}
        count += int(with_loss)
        losses.append(probe(batch).losses.double().nansum())
    if not count:
        raise ValueError("validation: expected samples with a loss, got none")
    gradient = {name: g / count for name, g in total.items()}
    loss = float(sum(losses)) / count
    if not math.isfinite(loss) or not all(bool(g.isfinite().all()) for g in gradient.values()):
        raise ValueError(f"validation: the loss ({loss:.3g}) or its gradient is not finite")
    return gradient, loss


def _solve(
    curvature: GaussNewton, gradient: Mapping[str, Tensor], penalty: float, iterations: int
) -> tuple[dict[str, Tensor], float]:
    """x of (G + λI) x = g by conjugate gradients from 0, and ‖g − (G + λI) x‖ / ‖g‖."""

    def product(v: Mapping[str, Tensor]) -> dict[str, Tensor]:
        (found,) = curvature([v])
        return {name: p + penalty * v[name] for name, p in found.items()}

    length = _dot(gradient, gradient)
    x = {name: torch.zeros_like(g) for name, g in gradient.items()}
    rest, along, height = dict(gradient), dict(gradient), length
    for _ in range(iterations):
        if not height > _ENOUGH**2 * length:
            break
        moved = product(along)
        width = height / _dot(along, moved)
        x = {name: v + width * along[name] for name, v in x.items()}
        rest = {name: r - width * moved[name] for name, r in rest.items()}
        before, height = height, _dot(rest, rest)
        along = {name: r + height / before * along[name] for name, r in rest.items()}
    # Made anew: what the iteration takes for its residual goes on falling where rounding has stopped the real one.
    rest = {name: gradient[name] - p for name, p in product(x).items()}
    return x, math.sqrt(_dot(rest, rest) / length) if length else 0.0


def _dot(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    return math.fsum(float((v.double() * b[name].double()).sum()) for name, v in a.items())


def _take(scores: Floats, number: int, explore: float, rng: np.random.Generator) -> tuple[Rows, int]:
    """Places of the best, and behind them of random others; how many of these there are."""
    known = np.flatnonzero(~np.isnan(scores))
    if len(known) < number:
        raise ValueError(f"data: {len(known)} of {len(scores)} samples have a loss, of which a round takes {number}")
    drawn = int(rng.binomial(number, explore))
    order = known[np.argsort(-scores[known], kind="stable")]
    best, others = order[: number - drawn], order[number - drawn :]
    return np.concatenate([best, rng.choice(others, drawn, replace=False)]), drawn


def _length(columns: Sequence[Any], name: str) -> int:
    sizes = [samples.count(column) for column in columns]
    if not sizes or len(set(sizes)) != 1 or not sizes[0]:
        raise ValueError(f"{name}: expected columns of one length, and samples in them, got {sizes}")
    return sizes[0]


def _batches(columns: Sequence[Any], rows: Rows, size: int) -> list[tuple[Any, ...]]:
    """Batches of some rows, as tensors where they are numbers."""
    whole("batch_size", size, 1)
    parts = [rows[start : start + size] for start in range(0, len(rows), size)]
    return [tuple(_tensor(samples.take(column, part)) for column in columns) for part in parts]


def _tensor(column: Any) -> Any:
    if isinstance(column, dict):
        return {name: _tensor(own) for name, own in column.items()}
    return torch.as_tensor(column) if isinstance(column, np.ndarray) and column.dtype.kind in "biuf" else column
