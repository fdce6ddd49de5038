"""Whether a run changes with its weights as derivatives say: metasmoothness, 2503.13751, and what they miss."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from assay.retrain.magic_checks import check
from assay.retrain.magic_training import Diverged, Training, running

SMOOTH = 0.95
"""Below, a derivative in the weights says little of what removing samples does."""

MISSED = 0.15
"""Above, scores miss too much of what the perturbed runs do."""

WIDTH = 0.1
"""As much as dropping one sample in a hundred: both move the weights by a tenth, root mean square."""


def metasmoothness(
    training: Training,
    weights: ArrayLike | Tensor | None = None,
    *,
    directions: int = 2,
    width: float = WIDTH,
    seed: int = 0,
    trained: Tensor | None = None,
) -> Tensor:
    """Empirical metasmoothness of a run in random directions of its samples' weights, definition 2 of 2503.13751.

    For v ~ N(0, 1)^N the run is made with weights w, w + hv and w + 2hv, giving parameters θ₀, θ₁ and θ₂; with
    d = θ₂ − θ₀, Ŝ = Σ_j |d_j| / ‖d‖₁ · sign(θ₁ − θ₀)_j · sign(θ₂ − θ₁)_j: whether parameters that move go on moving the
    same way. 1 is smooth, 0 is chance. It costs two runs per direction, and one for θ₀.

    Args:
        training: the run.
        weights: w, (N,); None: ones.
        directions: how many v.
        width: h.
        seed: of the directions.
        trained: θ₀, (P,), where it is known.

    Returns:
        (directions,) float64; NaN where a perturbed run diverges, or no weight changes anything.

    Raises:
        ValueError: no directions, a width of 0; whatever the run refuses.
    """
    if not isinstance(directions, int) or directions < 1:
        raise ValueError(f"directions: expected an integer of at least 1, got {directions!r}")
    if not 0 < width < float("inf"):
        raise ValueError(f"width: expected a finite number above 0, got {width}")
    given = training.weights(weights)
    with running():
        if trained is None:
            check(training)
        start = _trained(training, given) if trained is None else trained
        runs = perturbed_runs(training, given, directions, width, seed)
        found = [alignment(start, *ends) if ends else float("nan") for ends in runs]
    return torch.tensor(found, dtype=torch.float64)


def perturbed_runs(
    training: Training, weights: Tensor, directions: int, width: float, seed: int
) -> Iterator[tuple[Tensor, Tensor] | None]:
    """For each direction v the parameters (P,) that weights w + hv and w + 2hv give; None where a run diverges."""
    for direction in drawn(training.size, directions, seed):
        step = width * direction.to(weights)
        try:
            yield _trained(training, weights + step), _trained(training, weights + 2 * step)
        except Diverged:
            yield None


def drawn(size: int, directions: int, seed: int) -> Tensor:
    """(directions, N) float64, each v ~ N(0, 1)^N."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(directions)])


def missed(changes: Tensor, in_weights: Tensor, width: float, seed: int) -> float:
    """‖D − h V ∂L/∂w‖ / ‖D‖, the share of what small changes of all weights do to the targets that derivatives miss.

    D = ½ (4 ΔL(hv) − ΔL(2hv)) is the change at hv without its second order, in which v and −v agree: what is left is
    that the derivative is not that of the run at hv, as where it has kinks.

    Args:
        changes: (directions, 2, targets) float64, ΔL(hv) and ΔL(2hv): of each target's loss, from weights w on.
        in_weights: (targets, N) float64.

    Returns:
        NaN where a run diverged, nothing changed, or nothing was measured.
    """
    first_order = (4 * changes[:, 0] - changes[:, 1]) / 2
    told = width * drawn(in_weights.shape[1], len(changes), seed) @ in_weights.T if len(changes) else first_order
    return float((first_order - told).norm() / first_order.norm())


def _trained(training: Training, weights: Tensor) -> Tensor:
    state = training.initial()
    for step in range(training.steps):
        state = training.advance(state, step, weights)
    return state[0]


def alignment(start: Tensor, near: Tensor, far: Tensor) -> float:
    """Ŝ of the parameters (P,) that weights w, w + hv and w + 2hv give."""
    start, near, far = start.double(), near.double(), far.double()
    moved = (far - start).abs()
    return float((moved / moved.sum() * (near - start).sign() * (far - near).sign()).sum())
