"""What would make a run's derivative meaningless or impossible, tried out on one batch before hours are spent."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from assay.retrain.magic_training import Training

_DROPOUT = (nn.modules.dropout._DropoutNd,)
_BATCH_NORM = (nn.modules.batchnorm._BatchNorm,)

# Of a second derivative against differences of first ones, in the best of three step widths. Kinks (ReLU) cost
# some per cent; a gradient whose own derivative leaves something out is off by as much as there is.
_CURVATURE_TOLERANCE = 0.5


@dataclass(frozen=True)
class Pace:
    """Seconds that the first step took: forwards, and backwards for one target."""

    forward: float
    backward: float


def check(training: Training, weights: Tensor) -> Pace:
    """Refuse a run that has no derivative, or whose derivative torch would get wrong.

    Raises:
        ValueError: dropout without a seed, batch normalisation in train mode, losses that are random or that change the
            model's buffers, losses whose second derivative is missing or wrong.
    """
    _check_modules(training)
    buffers = {name: b.clone() for name, b in training.model.named_buffers()}
    state, begun = training.initial(), time.perf_counter()
    try:
        after = training.advance(state, 0, weights)
        forward = time.perf_counter() - begun
        again = training.advance(state, 0, weights)
        changed = [n for n, b in training.model.named_buffers() if not torch.equal(b, buffers[n])]
    finally:
        with torch.no_grad():
            for name, buffer in training.model.named_buffers():
                buffer.copy_(buffers[name])
    if changed:
        raise ValueError(
            f"model: a forward pass changes its buffers ({', '.join(changed[:3])}), so that steps cannot be replayed; "
            "put those modules into eval mode"
        )
    if not torch.equal(after[0], again[0]):
        raise ValueError(
            "the first step gives other numbers when it is made twice: something in the model or its losses is random "
            "(functional dropout?) or not deterministic; call model.eval(), or give dropout_seed, or see "
            "torch.use_deterministic_algorithms"
        )
    return Pace(forward, _check_curvature(training, state, weights))


def _check_modules(training: Training) -> None:
    drops, norms = [], []
    for name, module in training.model.named_modules():
        if module.training and isinstance(module, _DROPOUT) and module.p > 0:
            drops.append(name or "the model")
        if module.training and isinstance(module, _BATCH_NORM):
            norms.append(name or "the model")
    if norms:
        raise ValueError(
            f"model: batch normalisation in train mode ({', '.join(norms[:3])}): a sample of weight 0 would still "
            "change its batch's statistics; put these modules into eval mode, or normalise by sample (LayerNorm)"
        )
    if drops and training.dropout_seed is None:
        raise ValueError(
            f"model: dropout in train mode ({', '.join(drops[:3])}): the derivative would be of one draw of masks that "
            "nobody can repeat; call model.eval(), or give dropout_seed, which makes the masks part of the run"
        )


def _check_curvature(training: Training, state: tuple[Tensor, ...], weights: Tensor) -> float:
    """Hu against (g(θ + εu) − g(θ − εu)) / 2ε, u random -> seconds that Hu took."""
    theta = state[0]
    direction = torch.randn(len(theta), generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(theta)
    begun = time.perf_counter()
    try:
        exact = training.curvature(theta, 0, weights, direction)
    except RuntimeError as error:
        raise ValueError(
            f"losses: the first step's gradient cannot be differentiated in turn ({str(error).splitlines()[0][:200]}); "
            "write what has no second derivative in plain torch, or use an eager attention"
        ) from error
    seconds = time.perf_counter() - begun
    unit = float(theta.norm() / direction.norm()) or 1.0
    errors = []
    for width in (1e-2, 1e-3, 1e-4):
        ends = [training.gradient(theta + sign * width * unit * direction, 0, weights) for sign in (1, -1)]
        errors.append(float(((ends[0] - ends[1]) / (2 * width * unit) - exact).norm()))
    if not min(errors) <= _CURVATURE_TOLERANCE * float(exact.norm()) + 1e-4 * float(ends[0].norm()) / unit:
        raise ValueError(
            f"losses: second derivatives on the first batch are off by {min(errors):.3g} against differences of "
            f"gradients, beside a length of {float(exact.norm()):.3g}: a custom autograd.Function whose backward is "
            "not made of differentiable operations, or losses that are mostly kinks"
        )
    return seconds
