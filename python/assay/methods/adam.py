"""The state of an Adam optimiser, read safely: what an Adam step would make of a gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from assay._lazy import require

_FIRST, _SECOND = "exp_avg", "exp_avg_sq"


@dataclass(frozen=True)
class AdamState:
    """Adam's moments by parameter name, and its constants.

    Attributes:
        first, second: m and v, shaped as the parameters.
        betas, eps: as in ``torch.optim.Adam``.
    """

    first: Mapping[str, Tensor]
    second: Mapping[str, Tensor]
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer, model: nn.Module) -> AdamState:
        """A copy of what a live optimiser over ``model``'s parameters has."""
        names = {id(p): name for name, p in model.named_parameters()}
        states = {names[id(p)]: s for p, s in optimizer.state.items() if id(p) in names and _FIRST in s}
        group = optimizer.param_groups[0]
        return cls(
            {n: s[_FIRST].detach().clone() for n, s in states.items()},
            {n: s[_SECOND].detach().clone() for n, s in states.items()},
            tuple(group["betas"]),
            group["eps"],
        )

    @classmethod
    def load(cls, path: str | Path, names: Sequence[str] | None = None) -> AdamState:
        """From a file: safetensors with ``<parameter>.exp_avg`` and ``<parameter>.exp_avg_sq``, or an optimiser's
        ``state_dict`` saved by torch (read with ``weights_only=True``: nothing in it is run).

        Args:
            names: the parameters in the order of the optimiser's groups. A ``state_dict`` knows its parameters by
                number only, unless the optimiser was made from ``named_parameters()``.

        Raises:
            ValueError: the file holds no Adam moments, or their parameters' names are not known.
        """
        path = Path(path)
        if path.suffix == ".safetensors":
            tensors = require("safetensors.torch", "cli").load_file(path)
            first = {n.removesuffix(f".{_FIRST}"): t for n, t in tensors.items() if n.endswith(f".{_FIRST}")}
            second = {n.removesuffix(f".{_SECOND}"): t for n, t in tensors.items() if n.endswith(f".{_SECOND}")}
            return cls(first, second)._checked(path)
        saved = torch.load(path, map_location="cpu", weights_only=True)
        saved = saved.get("optimizer", saved) if isinstance(saved, dict) else saved
        if not isinstance(saved, dict) or not {"state", "param_groups"} <= saved.keys():
            raise ValueError(f"{path}: expected an optimiser's state_dict with 'state' and 'param_groups'")
        return cls._from_state_dict(saved, names, path)

    @classmethod
    def _from_state_dict(cls, saved: Mapping[str, Any], names: Sequence[str] | None, path: Path) -> AdamState:
        groups = saved["param_groups"]
        numbers = [number for group in groups for number in group["params"]]
        if names is None:
            names = [name for group in groups for name in group.get("param_names", ())]
            if len(names) != len(numbers):
                raise ValueError(
                    f"{path}: its {len(numbers)} parameters have numbers but no names; pass names=, in the order of "
                    "the optimiser's groups (transformers' Trainer has the decayed ones first)"
                )
        if len(names) != len(numbers):
            raise ValueError(f"{path}: expected {len(numbers)} names, one per parameter, got {len(names)}")
        states = {name: saved["state"].get(number, {}) for name, number in zip(names, numbers, strict=True)}
        first = {n: s[_FIRST] for n, s in states.items() if _FIRST in s}
        second = {n: s[_SECOND] for n, s in states.items() if _SECOND in s}
        betas = tuple(groups[0].get("betas", (0.9, 0.999)))
        return cls(first, second, betas, groups[0].get("eps", 1e-8))._checked(path)

    def _checked(self, path: Path) -> AdamState:
        if not self.first or self.first.keys() != self.second.keys():
            raise ValueError(f"{path}: holds no Adam moments (exp_avg and exp_avg_sq by parameter)")
        return self

    def check(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Raise ValueError unless there are moments of the right shape for every parameter."""
        for name, shape in shapes.items():
            for kind, moments in ((_FIRST, self.first), (_SECOND, self.second)):
                if name not in moments:
                    raise ValueError(f"the optimiser's state has no {kind} for parameter {name!r}")
                if tuple(moments[name].shape) != tuple(shape):
                    found = tuple(moments[name].shape)
                    raise ValueError(f"{kind} of parameter {name!r}: expected shape {tuple(shape)}, got {found}")

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
