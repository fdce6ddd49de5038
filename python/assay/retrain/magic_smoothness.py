"""Metasmoothness: whether a run changes with its samples' weights as its derivative says, 2503.13751."""

from __future__ import annotations

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from assay.retrain.magic_checks import check
from assay.retrain.magic_training import Diverged, Training, running

SMOOTH = 0.95
"""Below, a derivative in the weights says little of what removing samples does."""

WIDTH = 0.1


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
    generator, found = torch.Generator().manual_seed(seed), []
    with running():
        if trained is None:
            check(training)
        start = _trained(training, given) if trained is None else trained
        for _ in range(directions):
            direction = torch.randn(training.size, generator=generator, dtype=torch.float64).to(given)
            try:
                ends = [_trained(training, given + times * width * direction) for times in (1, 2)]
            except Diverged:
                found.append(float("nan"))
                continue
            found.append(_alignment(start.double(), *(end.double() for end in ends)))
    return torch.tensor(found, dtype=torch.float64)


def _trained(training: Training, weights: Tensor) -> Tensor:
    state = training.initial()
    for step in range(training.steps):
        state = training.advance(state, step, weights)
    return state[0]


def _alignment(start: Tensor, near: Tensor, far: Tensor) -> float:
    moved = (far - start).abs()
    return float((moved / moved.sum() * (near - start).sign() * (far - near).sign()).sum())
