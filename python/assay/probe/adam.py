"""The state of an Adam optimiser, read safely: what an Adam step would make of a gradient."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from assay._json import dumps
from assay._lazy import require

_FIRST, _SECOND = "exp_avg", "exp_avg_sq"

# What transformers' Trainer does not decay: by its present rule, and by the one of its older versions.
_NOT_DECAYED = (r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)", r"bias")


@dataclass(frozen=True)
class AdamState:
    """Adam's moments by parameter name, and its constants.

    Attributes:
        first, second: m and v, shaped as the parameters.
        betas, eps: as in ``torch.optim.Adam``.
        steps: how many it has made, where that is known. ``step`` corrects no bias, so that it does not matter there.

    Raises:
        ValueError: betas outside [0, 1), or a negative eps.
    """

    first: Mapping[str, Tensor]
    second: Mapping[str, Tensor]
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    steps: int | None = None

    def __post_init__(self) -> None:
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: expected two numbers in [0, 1), got {self.betas}")
        if not 0 <= self.eps < math.inf:
            raise ValueError(f"eps: expected a number of at least 0, got {self.eps}")

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer, model: nn.Module) -> AdamState:
        """A copy of what a live optimiser over ``model``'s parameters has.

        Raises:
            ValueError: its groups differ in betas or eps, or its steps are not plain Adam's.
        """
        names = {id(p): name for name, p in model.named_parameters()}
        states = {
            names[id(p)]: {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in state.items()}
            for p, state in optimizer.state.items()
            if id(p) in names
        }
        return cls._from_states(states, optimizer.param_groups, {}, type(optimizer).__name__)

    @classmethod
    def load(
        cls,
        path: str | Path,
        names: Sequence[str] | None = None,
        *,
        model: nn.Module | None = None,
        betas: Sequence[float] | None = None,
        eps: float | None = None,
    ) -> AdamState:
        """From a file: safetensors with ``<parameter>.exp_avg`` and ``<parameter>.exp_avg_sq``, and ``betas`` and
        ``eps`` in its metadata, as ``save`` writes it; or an optimiser's ``state_dict`` saved by torch (read with
        ``weights_only=True``: nothing in it is run), such as the ``optimizer.pt`` of transformers' Trainer.

        Args:
            names: the parameters in the order of the optimiser's groups. A ``state_dict`` knows its parameters by
                number only, unless the optimiser was made from ``named_parameters()``.
            model: whose parameters they are: names then follow from its parameters' order, in two groups from the way
                in which the Trainer makes them (the decayed ones first), and shapes must agree.
            betas, eps: the optimiser's constants, where the file does not have them.

        Raises:
            ValueError: a file that cannot be read or holds no Adam moments, parameters without names, or constants that
                neither the file nor the caller knows, or on which they differ.
        """
        path, given = Path(path), {"betas": betas, "eps": eps}
        if path.suffix == ".safetensors":
            return cls._from_safetensors(path, given)
        saved = _read(path, lambda: torch.load(path, map_location="cpu", weights_only=True))
        saved = saved.get("optimizer", saved) if isinstance(saved, dict) else saved
        if not isinstance(saved, dict) or not {"state", "param_groups"} <= saved.keys():
            raise ValueError(f"{path}: expected an optimiser's state_dict with 'state' and 'param_groups'")
        groups = saved["param_groups"]
        numbers = [number for group in groups for number in group["params"]]
        if names is None:
            names = [name for group in groups for name in group.get("param_names", ())]
            if len(names) != len(numbers):
                names = _names_of(model, saved, path)
        if len(names) != len(numbers):
            raise ValueError(f"{path}: expected {len(numbers)} names, one per parameter, got {len(names)}")
        states = {name: saved["state"].get(number, {}) for name, number in zip(names, numbers, strict=True)}
        return cls._from_states(states, groups, given, str(path))

    def save(self, path: str | Path) -> None:
        """Write a safetensors file that ``load`` reads back as it is."""
        moments = ((_FIRST, self.first), (_SECOND, self.second))
        tensors = {f"{n}.{kind}": t.contiguous() for kind, by_name in moments for n, t in by_name.items()}
        facts = {"betas": self.betas, "eps": self.eps, "steps": self.steps}
        metadata = {key: dumps(value) for key, value in facts.items() if value is not None}
        require("safetensors.torch", "cli").save_file(tensors, path, metadata)

    @classmethod
    def _from_safetensors(cls, path: Path, given: Mapping[str, Any]) -> AdamState:
        safe_open = require("safetensors", "cli").safe_open

        def read() -> tuple[dict[str, Tensor], dict[str, Any]]:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                facts = file.metadata() or {}
            return tensors, {key: json.loads(facts[key]) for key in ("betas", "eps", "steps") if key in facts}

        tensors, facts = _read(path, read)
        first, second = (
            {name.removesuffix(f".{kind}"): t for name, t in tensors.items() if name.endswith(f".{kind}")}
            for kind in (_FIRST, _SECOND)
        )
        return cls._checked(first, second, facts, given, str(path))

    @classmethod
    def _from_states(
        cls,
        states: Mapping[str, Mapping[str, Any]],
        groups: Sequence[Mapping[str, Any]],
        given: Mapping[str, Any],
        source: str,
    ) -> AdamState:
        for flag in ("amsgrad", "maximize"):
            if any(group.get(flag) for group in groups):
                raise ValueError(f"{source}: has {flag}=True, whose steps are not those that are computed here")
        if other := next((kind for group in groups if (kind := other_kind(group)) is not None), None):
            raise ValueError(
                f"{source}: is {other}'s by its settings, whose steps are not Adam's; expected torch.optim.Adam, "
                "AdamW or one with their steps"
            )
        facts: dict[str, Any] = {}
        for key in ("betas", "eps"):
            values = {repr(value): value for group in groups if (value := group.get(key)) is not None}
            if len(values) > 1:
                raise ValueError(f"{source}: its groups differ in {key}: {', '.join(values)}; expected one for all")
            facts[key] = next(iter(values.values()), None)
        steps = {int(state["step"]) for state in states.values() if "step" in state}
        facts["steps"] = steps.pop() if len(steps) == 1 else None
        first, second = ({n: s[kind] for n, s in states.items() if kind in s} for kind in (_FIRST, _SECOND))
        return cls._checked(first, second, facts, given, source)

    @classmethod
    def _checked(
        cls,
        first: Mapping[str, Tensor],
        second: Mapping[str, Tensor],
        facts: Mapping[str, Any],
        given: Mapping[str, Any],
        source: str,
    ) -> AdamState:
        if not first or first.keys() != second.keys():
            raise ValueError(f"{source}: holds no Adam moments (exp_avg and exp_avg_sq by parameter)")
        constants = {key: _constant(key, facts.get(key), given.get(key), source) for key in ("betas", "eps")}
        try:
            return cls(first, second, tuple(constants["betas"]), float(constants["eps"]), facts.get("steps"))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{source}: {error}") from error

    def check(self, model: nn.Module, parameters: Collection[str]) -> None:
        """Raise ValueError unless there are moments of the right shape for every one of the model's ``parameters``."""
        known = dict(model.named_parameters(remove_duplicate=False))
        chosen = {id(known[name]): name for name in parameters}
        for alias, p in known.items():
            name = chosen.get(id(p), alias)
            if alias != name and alias in self.first and name in self.first:
                raise ValueError(
                    f"the optimiser's state has moments of both {name!r} and {alias!r}, which are one tensor in the "
                    "model; expected the state of a model with tied weights"
                )
        for name in parameters:
            shape = tuple(known[name].shape)
            for kind, moments in ((_FIRST, self.first), (_SECOND, self.second)):
                if name not in moments:
                    raise ValueError(f"the optimiser's state has no {kind} for parameter {name!r}")
                if tuple(moments[name].shape) != shape:
                    raise ValueError(
                        f"{kind} of parameter {name!r}: expected shape {shape}, got {tuple(moments[name].shape)}"
                    )

    def scale(self, name: str, like: Tensor) -> Tensor:
        """1 / (√v̂ + ε), of ``like``'s type: what Adam multiplies gradients with; v̂ = v / (1 − β₂^steps), or v where the
        steps are not known."""
        correction = 1 - self.betas[1] ** self.steps if self.steps else 1.0
        return ((self.second[name].to(like) / correction).sqrt() + self.eps).reciprocal()

    def step(self, name: str, gradients: Tensor, eps: Literal["outside", "inside"] = "outside") -> Tensor:
        """(B, *shape) gradients -> the direction of the Adam step each of them would make, without bias correction.

        (β₁m + (1−β₁)g) / (√(β₂v + (1−β₂)g²) + ε), equation 3 of LESS (2402.04333); ``"inside"`` puts ε in the root, as
        the paper's code does: another direction where gradients are small.
        """
        one, two = self.betas
        m, v = (x[name].to(gradients) for x in (self.first, self.second))
        moment = (1 - one) * gradients + one * m
        square = (1 - two) * gradients.square() + two * v
        return moment / (square.sqrt() + self.eps if eps == "outside" else (square + self.eps).sqrt())


# Settings that Adam and SGD have not, of those who keep their state and make other steps of it.
_OTHERS = {
    **{"momentum_decay": "NAdam", "schedule_decay": "NAdam"},
    **{"trust_coeff": "LARS", "trust_coefficient": "LARS"},  # before trust_clip, which it may have as well
    **{"grad_averaging": "LAMB", "trust_clip": "LAMB", "wd_ratio": "AdamP"},
}


def other_kind(group: Mapping[str, Any]) -> str | None:
    """The optimiser that a group of parameters is of by its settings, where it only looks like Adam."""
    named = next((kind for setting, kind in _OTHERS.items() if setting in group), None)
    is_radam = "decoupled_weight_decay" in group and "amsgrad" not in group
    return named or ("RAdam" if is_radam else None)


def _read(path: Path, read: Any) -> Any:
    """What ``read`` gives; a file that it cannot make sense of is a ValueError that names it."""
    try:
        return read()
    except OSError:
        raise
    except Exception as error:  # of whatever class the library that reads it may choose
        lines = str(error).splitlines() or [type(error).__name__]
        raise ValueError(f"{path}: cannot be read as an optimiser's state: {lines[0]}") from error


def _constant(key: str, saved: Any, given: Any, source: str) -> Any:
    if saved is None and given is None:
        raise ValueError(
            f"{source}: does not say the optimiser's {key}; pass {key}=, or write the file with AdamState.save"
        )
    alike = [list(value) if isinstance(value, (tuple, list)) else value for value in (saved, given)]
    if None not in alike and alike[0] != alike[1]:
        raise ValueError(f"{source}: says {key} {saved}, but {key}={given} was given; expected the same, or no {key}=")
    return given if saved is None else saved


def _names_of(model: nn.Module | None, saved: Mapping[str, Any], path: Path) -> list[str]:
    """The names of a state_dict's numbered parameters, from the model's order and shapes."""
    groups = saved["param_groups"]
    if model is None:
        raise ValueError(
            f"{path}: its {sum(len(g['params']) for g in groups)} parameters have numbers but no names; pass model=, "
            "or names=, in the order of the optimiser's groups (transformers' Trainer has the decayed ones first)"
        )
    differences, fitting = [], []
    for candidate in _groupings(model, len(groups)):
        difference = _difference(candidate, model, saved)
        if difference is not None:
            differences.append(difference)
        elif candidate not in fitting:
            fitting.append(candidate)
    if len(fitting) == 1:
        return [name for group in fitting[0] for name in group]
    reason = differences[0] if not fitting else "they fit more than one order of the model's parameters"
    raise ValueError(
        f"{path}: its parameters have numbers but no names, and {type(model).__name__}'s do not tell them: {reason}; "
        "pass names=, or write the file with AdamState.save"
    )


def _groupings(model: nn.Module, count: int) -> list[list[list[str]]]:
    """The groups, ``count`` of them, in which an optimiser may have got the model's parameters; the likeliest first."""
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    if count == 1:
        return [[trainable], [[name for name, _ in model.named_parameters()]]]
    groupings = []
    for pattern, kinds in zip(_NOT_DECAYED, (r"^LayerNorm$", r"(Layer|RMS)Norm$"), strict=True):
        norms = [f"{n}." for n, m in model.named_modules() if any(re.search(kinds, c.__name__) for c in type(m).mro())]
        plain = {n for n in trainable if re.search(pattern, n.lower()) or n.startswith(tuple(norms))}
        groupings.append([[n for n in trainable if n not in plain], [n for n in trainable if n in plain]])
    return groupings


def _difference(candidate: Sequence[Sequence[str]], model: nn.Module, saved: Mapping[str, Any]) -> str | None:
    """What speaks against these being the names of the state_dict's parameters."""
    numbers = [group["params"] for group in saved["param_groups"]]
    sizes, expected = [len(group) for group in numbers], [len(group) for group in candidate]
    if sizes != expected:
        return f"the file has groups of {sizes} parameters, the model (as transformers' Trainer groups them) {expected}"
    known = dict(model.named_parameters())
    for names, group in zip(candidate, numbers, strict=True):
        for name, number in zip(names, group, strict=True):
            moments = saved["state"].get(number, {}).get(_FIRST)
            if moments is not None and moments.shape != known[name].shape:
                shapes = f"{tuple(moments.shape)} in the file, {tuple(known[name].shape)} in the model"
                return f"parameter {number}, by its place {name!r}, has shape {shapes}"
    return None
