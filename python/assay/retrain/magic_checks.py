"""What would make a run's derivative meaningless or impossible, tried out on one batch before hours are spent."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from assay.retrain.magic_training import Diverged, Training

_DROPOUT = (nn.modules.dropout._DropoutNd,)
_BATCH_NORM = (nn.modules.batchnorm._BatchNorm,)

# Second derivatives from differences of gradients, as shares of their length: how near two step widths must come to
# each other to be believed, and how far from them is wrong.
_AGREEMENT, _WRONG = 0.1, 0.3

# Operations whose gradient jumps: differences see the jumps, the derivative does not, and rightly.
_KINKS = re.compile(
    "Relu|Threshold|Hard|Abs|Clamp|(?<!Soft)Max|Min|Amax|Amin|Topk|Sort|Median|Index|Gather|Where|Frac|Round|Remainder"
)


@dataclass(frozen=True)
class Checked:
    """Seconds of the first step: forwards with its gradient, and what a target adds; and what could not be decided."""

    forward: float
    backward: float
    doubts: tuple[str, ...] = ()


def check(training: Training) -> Checked:
    """Refuse a run that has no derivative, or whose derivative torch would get wrong.

    Raises:
        ValueError: dropout without a seed, batch normalisation by the batch's own statistics, losses that are random,
            that are not the given model's or that change its buffers, losses whose second derivative is missing or
            wrong.
    """
    _check_modules(training)
    device, weights = training.start.device, training.weights()  # a weight of 0 would hide its sample
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        forward = _check_repeats(training, weights)
        theta = training.start
        direction = torch.randn(len(theta), generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(theta)
        try:
            exact = training.curvature(theta, 0, weights, direction)
        except RuntimeError as error:
            raise ValueError(
                f"losses: the first step's gradient cannot be differentiated ({_line(error)}); "
                "write what has no second derivative in plain torch, or use an eager attention"
            ) from error
        begun = time.perf_counter()
        training.curvature(theta, 0, weights, direction)  # the first time is no measure
        backward = max(time.perf_counter() - begun - forward, 0.0)
        return Checked(forward, backward, tuple(_check_curvature(training, weights, direction, exact)))


def _check_repeats(training: Training, weights: Tensor) -> float:
    """That the first gradient can be made again (the state may not tell: a schedule can begin at 0) -> the seconds that
    it takes."""
    buffers, theta = {name: b.clone() for name, b in training.model.named_buffers()}, training.start
    try:
        first = training.gradient(theta, 0, weights)
        begun = time.perf_counter()
        again = training.gradient(theta, 0, weights)
        seconds = time.perf_counter() - begun
        changed = [n for n, b in training.model.named_buffers() if not torch.equal(b, buffers[n])]
    except RuntimeError as error:
        raise ValueError(f"losses: the first step has no gradient ({_line(error)})") from error
    finally:
        with torch.no_grad():
            for name, buffer in training.model.named_buffers():
                buffer.copy_(buffers[name])
    if changed:
        raise ValueError(
            f"model: a forward pass changes its buffers ({', '.join(changed[:3])}), so that steps cannot be replayed; "
            "put those modules into eval mode"
        )
    if not bool(first.isfinite().all()):
        raise ValueError("losses: the first step's losses are finite, and their gradient is not")
    if not torch.equal(first, again):
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
        if isinstance(module, _BATCH_NORM) and (module.training or module.running_mean is None):
            norms.append(name or "the model")
    if norms:
        raise ValueError(
            f"model: batch normalisation in train mode, or without running statistics ({', '.join(norms[:3])}): a "
            "sample of weight 0 would still change its batch's; put these modules into eval mode, with "
            "track_running_stats, or normalise by sample (LayerNorm)"
        )
    if drops and training.dropout_seed is None:
        raise ValueError(
            f"model: dropout in train mode ({', '.join(drops[:3])}): the derivative would be of one draw of masks that "
            "nobody can repeat; call model.eval(), or give dropout_seed, which makes the masks part of the run"
        )


def _check_curvature(training: Training, weights: Tensor, direction: Tensor, exact: Tensor) -> list[str]:
    """That gradients have the derivative Hu that torch takes of them: against (g(θ + εu) − g(θ − εu)) / 2ε -> what
    could not be decided. A custom function may hide what it does; ``detach`` cuts off what the gradient depends on.

    Kinks (ReLU) make differences of all widths differ, which says nothing against Hu: only differences that agree do.
    """
    theta = training.start
    with _calls(training.model) as calls:
        loss = training.weighted_loss(theta, 0, weights)
        graph = _Graph.of(loss)
        calls.clear()
        torch.autograd.grad(loss, [leaf for leaf in graph.leaves if leaf.requires_grad], allow_unused=True)
    if calls:
        raise ValueError(
            f"model: {calls[0] or 'it'} runs again during the backward pass (gradient checkpointing), when a step's "
            "parameters are no longer in it; switch that off: model.gradient_checkpointing_disable()"
        )
    if not graph.reaches(theta):
        raise ValueError(
            "losses: they do not depend on the model's trained parameters; are they of another model than the one "
            "that they are given?"
        )
    narrow = " and ".join(sorted(str(kind) for kind in graph.half))
    found = [f"part of the losses is computed in {narrow}, where derivatives lose their digits"] if narrow else []
    functions = ", ".join(graph.functions)
    off = _difference(training, weights, direction, exact)
    if off is None and functions:
        found.append(f"whether the gradient of {functions} has a right derivative could not be seen, for kinks")
    elif off is not None and functions and off:
        raise ValueError(
            f"losses: {functions} has a gradient whose own derivative is wrong: {off}; its backward must be made of "
            "differentiable operations"
        )
    elif off and not graph.kinked:
        raise ValueError(
            f"losses: the derivative of their gradient is wrong: {off}; something that the gradient depends on is cut "
            "off from it (detach, no_grad, a straight-through estimator)"
        )
    elif off:
        found.append(
            f"second derivatives are {off}: for kinks alone, or something that the gradient depends on is cut off from "
            "it (detach, no_grad, a straight-through estimator)"
        )
    return found


@contextlib.contextmanager
def _calls(model: nn.Module) -> Iterator[list[str]]:
    """The names of the modules that are called."""
    found: list[str] = []

    def hook(name: str) -> Callable[..., None]:
        return lambda *_: found.append(name)

    hooks = [module.register_forward_pre_hook(hook(name)) for name, module in model.named_modules()]
    try:
        yield found
    finally:
        for one in hooks:
            one.remove()


def _difference(training: Training, weights: Tensor, direction: Tensor, exact: Tensor) -> str | None:
    """How far Hu is from differences of gradients, "" for not at all, None where differences do not agree."""
    theta, wide = training.start, None
    unit = float(theta.norm() / direction.norm()) or 1.0
    for width in (1e-2, 1e-3, 1e-4):
        try:
            ends = [training.gradient(theta + sign * width * unit * direction, 0, weights) for sign in (1, -1)]
        except Diverged:
            return None
        narrow, noise = (ends[0] - ends[1]) / (2 * width * unit), 1e-4 * float(ends[0].norm()) / unit
        length = float(narrow.norm())
        apart = float("inf") if wide is None else float((wide - narrow).norm())
        if apart <= _AGREEMENT * length + noise:
            off = float((narrow - exact).norm())
            wrong = off > _WRONG * length + 3 * apart + noise
            return f"{off:.3g} away from differences of gradients, {length:.3g} long" if wrong else ""
        wide = narrow
    return None


@dataclass(frozen=True)
class _Graph:
    """What made a loss.

    Attributes:
        functions: names of custom functions that do not say that they are ``differentiable_twice``.
        kinked: whether an operation's gradient jumps.
        half: types of 16 bits that occur.
        leaves: what it was made of.
    """

    functions: list[str]
    kinked: bool
    half: set[torch.dtype]
    leaves: list[Tensor]

    @classmethod
    def of(cls, loss: Tensor) -> _Graph:
        nodes: set[Any] = set()
        waiting = [loss.grad_fn]
        while waiting:
            node = waiting.pop()
            if node is not None and node not in nodes:
                nodes.add(node)
                waiting += [following for following, _ in node.next_functions]
        custom = {node for node in nodes if hasattr(node, "_forward_cls")}
        functions = {
            node.name().removesuffix("Backward")
            for node in custom
            if not getattr(node._forward_cls, "differentiable_twice", False)
        }
        kinds = {metadata.dtype for node in nodes for metadata in getattr(node, "_input_metadata", ())}
        return cls(
            sorted(functions),
            any(_KINKS.search(node.name()) for node in nodes - custom),
            kinds & {torch.float16, torch.bfloat16},
            [node.variable for node in nodes if hasattr(node, "variable")],
        )

    def reaches(self, theta: Tensor) -> bool:
        """Whether a leaf is ``theta``, whose memory a step's own leaf shares."""
        return any(leaf.data_ptr() == theta.data_ptr() for leaf in self.leaves)


def _line(error: Exception) -> str:
    return str(error).splitlines()[0][:200]
