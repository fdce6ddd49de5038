"""What would make a run's derivative meaningless or impossible, tried out on one batch before hours are spent."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from assay.retrain.magic_training import Training

_DROPOUT = (nn.modules.dropout._DropoutNd,)
_BATCH_NORM = (nn.modules.batchnorm._BatchNorm,)

# Second derivatives from differences of gradients, as shares of their length: how near two step widths must come to
# each other to be believed, and how far from them is wrong.
_AGREEMENT, _WRONG = 0.1, 0.3


@dataclass(frozen=True)
class Checked:
    """Seconds of the first step: forwards with its gradient, and what a target adds; and what could not be decided."""

    forward: float
    backward: float
    doubts: tuple[str, ...] = ()


def check(training: Training, weights: Tensor) -> Checked:
    """Refuse a run that has no derivative, or whose derivative torch would get wrong.

    Raises:
        ValueError: dropout without a seed, batch normalisation in train mode, losses that are random or that change the
            model's buffers, losses whose second derivative is missing or wrong.
    """
    _check_modules(training)
    device = training.start.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        forward = _check_repeats(training, weights)
        theta = training.start
        direction = torch.randn(len(theta), generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(theta)
        try:
            exact = training.curvature(theta, 0, weights, direction)
        except RuntimeError as error:
            raise ValueError(
                f"losses: the first step's gradient cannot be differentiated ({str(error).splitlines()[0][:200]}); "
                "write what has no second derivative in plain torch, or use an eager attention"
            ) from error
        begun = time.perf_counter()
        training.curvature(theta, 0, weights, direction)  # the first time is no measure
        backward = max(time.perf_counter() - begun - forward, 0.0)
        return Checked(forward, backward, tuple(_check_functions(training, weights, direction, exact)))


def _check_repeats(training: Training, weights: Tensor) -> float:
    """That the first step can be made again -> the seconds that it takes."""
    buffers, state = {name: b.clone() for name, b in training.model.named_buffers()}, training.initial()
    try:
        after = training.advance(state, 0, weights)
        begun = time.perf_counter()
        again = training.advance(state, 0, weights)
        seconds = time.perf_counter() - begun
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
    return seconds


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


def _check_functions(training: Training, weights: Tensor, direction: Tensor, exact: Tensor) -> list[str]:
    """That the gradients of custom autograd functions have the derivative Hu that torch takes of them: against
    (g(θ + εu) − g(θ − εu)) / 2ε -> what could not be decided.

    Kinks (ReLU) make differences of all widths differ, which says nothing against Hu: only differences that agree do.
    """
    theta = training.start
    functions = _custom_functions(training.weighted_loss(theta, 0, weights))
    if not functions:
        return []
    unit = float(theta.norm() / direction.norm()) or 1.0
    found = []
    for width in (1e-2, 1e-3, 1e-4):
        ends = [training.gradient(theta + sign * width * unit * direction, 0, weights) for sign in (1, -1)]
        found.append((ends[0] - ends[1]) / (2 * width * unit))
    noise = 1e-4 * float(ends[0].norm()) / unit
    for wide, narrow in itertools.pairwise(found):
        length, apart = float(narrow.norm()), float((wide - narrow).norm())
        if apart > _AGREEMENT * length + noise:
            continue
        off = float((narrow - exact).norm())
        if off > _WRONG * length + 3 * apart + noise:
            raise ValueError(
                f"losses: {', '.join(functions)} has a gradient whose own derivative is wrong: {off:.3g} away from "
                f"differences of gradients, {length:.3g} long; its backward must be made of differentiable operations"
            )
        return []
    return [f"whether the gradient of {', '.join(functions)} has a right derivative could not be seen, for kinks"]


def _custom_functions(loss: Tensor) -> list[str]:
    """The names of the Python functions in a graph that do not say that they are ``differentiable_twice``."""
    seen: set[Any] = set()
    waiting, found = [loss.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        function = getattr(node, "_forward_cls", None)
        if function is not None and not getattr(function, "differentiable_twice", False):
            found.add(node.name().removesuffix("Backward"))
        waiting += [following for following, _ in node.next_functions]
    return sorted(found)
