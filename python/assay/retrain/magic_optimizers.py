"""The optimisers of ``torch.optim`` as functions of their state, so that a step can be differentiated."""

from __future__ import annotations

import glob
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn

from assay.retrain.samples import short

State = tuple[Tensor, ...]
"""(P,) each: the trained parameters end to end, then the optimiser's moments."""


@dataclass(frozen=True)
class SGD:
    """``torch.optim.SGD``: g ← g + λθ, m ← μm + (1 − dampening)g (m = g at the first step), θ ← θ − ηm.

    Args:
        lr: η, one for all steps or one per step: the schedule.
        momentum: μ.
        dampening, nesterov: as in torch; Nesterov's θ ← θ − η(g + μm).
        weight_decay: λ.
        decoupled_weight_decay: θ ← (1 − ηλ)θ before the step instead, which torch's SGD has not.
        undecayed: globs of the names of parameters without decay: ``["*.bias", "*norm*"]``.

    Raises:
        ValueError: a number that is not finite or outside its range.
    """

    lr: float | Sequence[float]
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    decoupled_weight_decay: bool = False
    undecayed: Sequence[str] = ()

    def __post_init__(self) -> None:
        _check(self)
        _between("momentum", self.momentum, 0, math.inf)
        _between("dampening", self.dampening, 0, math.inf)
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise ValueError("nesterov: expected a momentum, and no dampening")

    @property
    def moments(self) -> int:
        """How many numbers it keeps per parameter."""
        return int(self.momentum != 0)

    def step(self, state: State, gradient: Tensor, number: int, lr: float, decayed: Tensor | None) -> State:
        """The state after step ``number`` (from 0) with ``gradient`` (P,); ``decayed`` (P,) bool, None for all."""
        theta, gradient = _decay(self, state[0], gradient, lr, decayed)
        if not self.moments:
            return (theta.add(gradient, alpha=-lr),)
        moment = state[1].mul(self.momentum).add(gradient, alpha=1 - self.dampening) if number else gradient.clone()
        direction = gradient.add(moment, alpha=self.momentum) if self.nesterov else moment
        return theta.add(direction, alpha=-lr), moment


@dataclass(frozen=True)
class Adam:
    """``torch.optim.Adam``, and AdamW with ``decoupled_weight_decay``: θ ← θ − η m̂ / (√(v̂ + ε_root) + ε).

    With ``eps_root=0`` it is torch's. There √v has no derivative at v = 0; since v = 0 only where every gradient was 0,
    so that m = 0 too, the path through v adds nothing, and nothing is what it adds here (autograd makes NaN of it).

    Args:
        lr: η, one for all steps or one per step: the schedule.
        betas, eps: β₁ and β₂, ε.
        eps_root: ε_root, inside the root: what makes the step smooth where gradients vanish; 1e-12 changes no training.
        weight_decay: λ, added to the gradient.
        decoupled_weight_decay: θ ← (1 − ηλ)θ before the step instead: AdamW.
        undecayed: globs of the names of parameters without decay: ``["*.bias", "*norm*"]``.

    Raises:
        ValueError: a number that is not finite or outside its range.
    """

    lr: float | Sequence[float]
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    eps_root: float = 1e-12
    weight_decay: float = 0.0
    decoupled_weight_decay: bool = False
    undecayed: Sequence[str] = ()

    def __post_init__(self) -> None:
        _check(self)
        if not isinstance(self.betas, (tuple, list)) or len(self.betas) != 2:
            raise ValueError(f"betas: expected two numbers from 0 to below 1, got {short(self.betas)}")
        for beta in self.betas:
            _between("betas", beta, 0, 1)
        _between("eps", self.eps, 0, math.inf)
        _between("eps_root", self.eps_root, 0, math.inf)
        if self.eps == 0 and self.eps_root == 0:
            raise ValueError("eps and eps_root are both 0: a parameter without gradient would become 0/0")

    @property
    def moments(self) -> Literal[2]:
        """How many numbers it keeps per parameter."""
        return 2

    def step(self, state: State, gradient: Tensor, number: int, lr: float, decayed: Tensor | None) -> State:
        """The state after step ``number`` (from 0) with ``gradient`` (P,); ``decayed`` (P,) bool, None for all."""
        theta, gradient = _decay(self, state[0], gradient, lr, decayed)
        one, two = self.betas
        first = torch.lerp(state[1], gradient, 1 - one)
        second = state[2].mul(two).addcmul(gradient, gradient, value=1 - two)
        corrections = 1 - one ** (number + 1), 1 - two ** (number + 1)
        if self.eps_root:
            root = (second / corrections[1] + self.eps_root).sqrt()
        else:
            root = _root(second) / corrections[1] ** 0.5
        return theta.addcdiv(first, root.add(self.eps), value=-lr / corrections[0]), first, second


Optimizer = SGD | Adam


def optimizer_of(
    optimizer: torch.optim.Optimizer, model: nn.Module, lr: float | Sequence[float] | None = None
) -> Optimizer:
    """An optimiser of torch over a model's parameters, as ``Training`` takes it. Its state is not looked at.

    Args:
        optimizer: ``torch.optim.SGD``, ``Adam`` or ``AdamW``; its groups may differ in having weight decay or not.
        model: the model.
        lr: the rate, or one per step: the scheduler's; None: the groups'.

    Raises:
        ValueError: another optimiser, amsgrad, maximize or rates that are tensors; groups that differ in anything else;
            a parameter that is not the model's, or one of the model's trained ones that it has not.
    """
    kind = type(optimizer)
    if kind not in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW):
        raise ValueError(f"optimizer: expected torch.optim.SGD, Adam or AdamW, got {kind.__name__}")
    names = {id(p): name for name, p in model.named_parameters()}
    decays: dict[str, float] = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            if id(p) not in names:
                raise ValueError(f"optimizer: has a parameter of shape {tuple(p.shape)} that is not the model's")
            if p.requires_grad:
                decays[names[id(p)]] = group["weight_decay"]
    if missing := [name for name, p in model.named_parameters() if p.requires_grad and name not in decays]:
        raise ValueError(f"optimizer: lacks parameters of the model that require gradients: {short(missing)}")
    if not decays:
        raise ValueError("optimizer: none of its parameters requires a gradient")
    found = {key: _agreed(optimizer, key) for key in _OF_TORCH[kind is torch.optim.SGD]}
    for flag in ("amsgrad", "maximize"):
        if found.pop(flag, False):
            raise ValueError(f"optimizer: has {flag}=True, which is not there")
    found["lr"] = _agreed(optimizer, "lr") if lr is None else lr
    found["weight_decay"] = max(decays.values())
    found["undecayed"] = [glob.escape(name) for name, decay in decays.items() if not decay and max(decays.values())]
    if others := set(decays.values()) - {0, found["weight_decay"]}:
        raise ValueError(f"optimizer: expected groups of one weight decay, or none, got {others} too")
    if kind is torch.optim.SGD:
        return SGD(**found)
    return Adam(**found, eps_root=0.0, decoupled_weight_decay=_agreed(optimizer, "decoupled_weight_decay"))


_OF_TORCH = {True: ("momentum", "dampening", "nesterov", "maximize"), False: ("betas", "eps", "amsgrad", "maximize")}


def _agreed(optimizer: torch.optim.Optimizer, key: str) -> Any:
    values = {repr(group[key]): group[key] for group in optimizer.param_groups}
    if len(values) > 1:
        raise ValueError(f"optimizer: its groups differ in {key}: {', '.join(values)}; expected one for all")
    return next(iter(values.values()))


def rates(optimizer: Optimizer, steps: int) -> list[float]:
    """η of every step.

    Raises:
        ValueError: a schedule of another length.
    """
    if isinstance(optimizer.lr, (int, float)):
        return [float(optimizer.lr)] * steps
    if len(optimizer.lr) != steps:
        raise ValueError(f"lr: expected one rate, or one for each of the {steps} steps, got {len(optimizer.lr)}")
    return [float(rate) for rate in optimizer.lr]


def decayed_parameters(optimizer: Optimizer, sizes: dict[str, int]) -> Tensor | None:
    """(P,) bool, the parameters with decay; None for all of them.

    Raises:
        ValueError: a glob that names no parameter.
    """
    for pattern in optimizer.undecayed:
        if not any(fnmatchcase(name, pattern) for name in sizes):
            raise ValueError(f"undecayed: {pattern!r} names none of the trained parameters: {short(list(sizes))}")
    if not optimizer.undecayed:
        return None
    return torch.cat(
        [
            torch.full((size,), not any(fnmatchcase(name, g) for g in optimizer.undecayed))
            for name, size in sizes.items()
        ]
    )


def clipped(gradient: Tensor, most: float | None) -> Tensor:
    """The gradient scaled to a norm of at most ``most``, as ``torch.nn.utils.clip_grad_norm_`` does."""
    if most is None:
        return gradient
    return gradient * torch.clamp(most / (torch.linalg.vector_norm(gradient) + 1e-6), max=1.0)


def _decay(
    optimizer: Optimizer, theta: Tensor, gradient: Tensor, lr: float, decayed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Parameters and gradient after weight decay."""
    if not optimizer.weight_decay:
        return theta, gradient
    if optimizer.decoupled_weight_decay:
        smaller = theta.mul(1 - lr * optimizer.weight_decay)
        return (smaller if decayed is None else torch.where(decayed, smaller, theta)), gradient
    larger = gradient.add(theta, alpha=optimizer.weight_decay)
    return theta, (larger if decayed is None else torch.where(decayed, larger, gradient))


def _root(square: Tensor) -> Tensor:
    """√, with derivative 0 at 0."""
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, 1.0).sqrt(), 0.0)


def _check(optimizer: Optimizer) -> None:
    if hasattr(optimizer.lr, "tolist"):  # of an array or a tensor
        object.__setattr__(optimizer, "lr", optimizer.lr.tolist())
    lr: Any = optimizer.lr
    if isinstance(lr, (str, bytes, bool)) or not isinstance(lr, (int, float, Sequence)):
        raise ValueError(f"lr: expected a number, or a sequence with one per step, got {short(lr)}")
    for rate in [lr] if isinstance(lr, (int, float)) else lr:
        _between("lr", rate, 0, math.inf)
    _between("weight_decay", optimizer.weight_decay, 0, math.inf)
    if isinstance(optimizer.undecayed, str):
        raise ValueError(f"undecayed: expected a sequence of globs, got the text {optimizer.undecayed!r}")


def _between(name: str, value: Any, least: float, below: float) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not least <= value < below:
        what = "a finite number of at least 0" if below == math.inf else f"a number from {least:g} to below {below:g}"
        raise ValueError(f"{name}: expected {what}, got {short(value)}")
