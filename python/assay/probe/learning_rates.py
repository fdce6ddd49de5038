"""How far an optimiser moves each weight per unit of gradient: its learning rate times its diagonal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from assay.probe.adam import other_kind


class LearningRates:
    """An optimiser's learning rates by weight, as they are when they are read.

    Of SGD the groups' ``lr``. Of Adam and what has its state (``exp_avg_sq``, ``step``; ``betas`` and ``eps``)
    lr / (√(v / (1 − β₂^t)) + ε), with v the largest so far under ``amsgrad``; of RMSprop lr / (√v + ε), v less the
    squared mean where it is ``centered``; of Adagrad lr / ((1 + (t − 1) · lr_decay) (√Σg² + ε)).

    Args:
        optimizer: steps of it are made of the gradients as they are: no ``maximize``.
        model, parameters: by name, all of them the optimiser's.

    Raises:
        ValueError: a parameter that the optimiser has not, or an optimiser whose steps are made otherwise.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module, parameters: Sequence[str]) -> None:
        self._optimizer, self._model, self._parameters = optimizer, model, list(parameters)
        groups = self._groups()
        for name in self._parameters:
            group = groups.get(id(model.get_parameter(name)))
            if group is None:
                raise ValueError(
                    f"optimizer: does not train {name!r}, a parameter that is scored; expected all of them"
                )
            if group.get("maximize"):
                raise ValueError("optimizer: maximize=True climbs; expected an optimiser that descends")
            if _kind(group) is None:
                raise ValueError(
                    f"optimizer: {type(optimizer).__name__} scales gradients in a way that is not known here; expected "
                    "SGD, RMSprop, Adagrad or one with Adam's settings, or none"
                )

    @property
    def are_known(self) -> bool:
        """Whether the optimiser has what they are made of: before its first step, only SGD has."""
        groups = self._groups()
        for parameter in map(self._model.get_parameter, self._parameters):
            if _kind(groups[id(parameter)]) != "sgd" and not int(self._state(parameter).get("step", 0)):
                return False
        return True

    def by_parameter(self) -> dict[str, Tensor | float]:
        """The rates, of the parameter's shape in float32, or one for all of it.

        Raises:
            ValueError: the optimiser has made no step yet, or has a state of another kind.
        """
        groups = self._groups()
        found = {}
        for name in self._parameters:
            parameter = self._model.get_parameter(name)
            found[name] = self._rate(name, groups[id(parameter)], self._state(parameter))
        return found

    def _groups(self) -> dict[int, Mapping[str, Any]]:
        return {id(p): group for group in self._optimizer.param_groups for p in group["params"]}

    def _state(self, parameter: Tensor) -> Mapping[str, Any]:
        state: Mapping[str, Any] = self._optimizer.state.get(parameter, {})
        return state

    def _rate(self, name: str, group: Mapping[str, Any], state: Mapping[str, Any]) -> Tensor | float:
        kind, rate = _kind(group), float(group["lr"])
        if kind == "sgd":
            return rate
        steps = int(state.get("step", 0))
        if steps == 0:
            raise ValueError(
                f"optimizer: {type(self._optimizer).__name__} has made no step with {name!r} yet, and scales gradients "
                "by earlier ones; expected a step before the first score (warmup_steps=1 of a Reweighter)"
            )
        square = self._square(name, kind, group, state)
        if kind == "adam":
            square = square / (1 - float(group["betas"][1]) ** steps)
        if kind == "adagrad":
            rate /= 1 + (steps - 1) * float(group["lr_decay"])
        return rate / (square.sqrt() + float(group["eps"]))

    def _square(self, name: str, kind: str | None, group: Mapping[str, Any], state: Mapping[str, Any]) -> Tensor:
        key = {"adam": "exp_avg_sq", "rmsprop": "square_avg", "adagrad": "sum"}[str(kind)]
        if group.get("amsgrad"):
            key = "max_exp_avg_sq"
        square = state.get(key)
        shape = tuple(self._model.get_parameter(name).shape)
        if not isinstance(square, Tensor) or tuple(square.shape) != shape or not square.is_floating_point():
            raise ValueError(
                f"optimizer: {type(self._optimizer).__name__} keeps no {key} of {name!r} in shape {shape}; expected "
                "the state of torch's own optimiser of that kind"
            )
        square = square.detach().float()
        return square - state["grad_avg"].detach().float().square() if group.get("centered") else square


def _kind(group: Mapping[str, Any]) -> str | None:
    """By its settings, so that a wrapper of the optimiser is taken for what it wraps."""
    if other_kind(group) is not None:
        return None
    if {"betas", "eps"} <= group.keys() and isinstance(group["eps"], float | int):
        return "adam"
    if {"alpha", "centered"} <= group.keys():
        return "rmsprop"
    if "lr_decay" in group:
        return "adagrad"
    return "sgd" if {"momentum", "dampening"} <= group.keys() else None
