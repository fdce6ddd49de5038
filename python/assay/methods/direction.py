"""The direction from a model to a better reference, in their parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor, nn

from assay.methods.checks import difference
from assay.probe.terms import sum_of

# Squares that are added up in float32.
_ROW = 256


@dataclass(frozen=True)
class Direction:
    """v = θ_ref − θ by parameter, in float32, and its squared length in every trainable parameter."""

    steps: Mapping[str, Tensor]
    squares: Mapping[str, float]

    @property
    def norm(self) -> float:
        """‖v‖."""
        return math.sqrt(self._square)

    @property
    def share(self) -> float:
        """Of ‖v‖² over all trainable parameters."""
        return self._square / math.fsum(self.squares.values())

    @property
    def _square(self) -> float:
        return math.fsum(self.squares[name] for name in self.steps)

    def without(self, names: Collection[str]) -> Direction:
        """In the other parameters alone."""
        return replace(self, steps={name: step for name, step in self.steps.items() if name not in names})


def check_reference(model: nn.Module, reference: nn.Module, parameters: Sequence[str]) -> None:
    """ValueError unless the reference has the model's trainable parameters, and differs in one of ``parameters``."""
    if other := difference(model, reference, _trainable(model)):
        raise ValueError(
            f"reference: expected parameter {other.parameter} {other.expected} as in the model, found {other.actual}; "
            "mimic scores need a reference of the same architecture"
        )
    ours, theirs = _trainable(model), dict(reference.named_parameters(remove_duplicate=False))
    if all(_equal(ours[name], theirs[name]) for name in parameters):
        raise ValueError("reference: equals the model in every chosen layer, so that there is no direction to it")


def direction_towards(model: nn.Module, reference: nn.Module, parameters: Sequence[str]) -> Direction:
    """The direction from a model to a reference that ``check_reference`` has nothing against.

    Raises ValueError if it has no length, or none that is a number.
    """
    ours, theirs = _trainable(model), dict(reference.named_parameters(remove_duplicate=False))
    steps, squares = {}, {}
    with torch.no_grad():
        for name, p in ours.items():
            step = _step(p, theirs[name])
            squares[name] = float(step.double().square().sum())
            if name in parameters:
                steps[name] = step
    direction = Direction({name: steps[name] for name in parameters}, squares)
    if not direction.norm > 0:
        raise ValueError(f"reference: the direction to it has length {direction.norm}, which says nothing")
    return direction


class Moving(Mapping[str, Tensor]):
    """v = θ_ref − θ of models that are being trained: a parameter's is made when it is read, and not kept.

    Args:
        model, reference: which ``check_reference`` has nothing against. The reference may lie on another device, or be
            of another precision.
        parameters: those of the direction.
    """

    def __init__(self, model: nn.Module, reference: nn.Module, parameters: Sequence[str]) -> None:
        self._model, self._reference = model, reference
        self._names = dict.fromkeys(parameters)
        self._squares: dict[str, Tensor] = {}  # of what was read since the norm was last asked for

    def __contains__(self, name: object) -> bool:
        return name in self._names  # a Mapping looks by reading, which would make it

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        with torch.no_grad():
            ours = self._model.get_parameter(name)  # as it is now: loading a state may put another in its place
            step = _step(ours, self._reference.get_parameter(name))
            self._squares[name] = square_of_length(step)
            return step

    def by_rows(self, parameter: str) -> Callable[[slice], Tensor]:
        """A parameter's by some rows, as ``probe.reductions.MadeByRows`` has it."""
        ours, theirs = (model.get_parameter(parameter).detach() for model in (self._model, self._reference))
        square = self._squares[parameter] = torch.zeros((), dtype=torch.float64, device=ours.device)

        def made(rows: slice) -> Tensor:
            step = _step(ours[rows], theirs[rows])
            square.add_(square_of_length(step))  # its own: another reader goes through all rows, too
            return step

        return made

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def norm(self, without: Collection[str] = ()) -> float:
        """‖v‖ as the weights are now, over all parameters but some."""
        for name in self._names:
            if name not in self._squares:
                self[name]
        squares, self._squares = self._squares, {}
        each = [squares[name] for name in self._names if name not in without]
        return root_of_sum(each)


def square_of_length(step: Tensor) -> Tensor:
    """‖step‖² of a float32 tensor, () float64: float32 within rows of 256 numbers, double beyond, and no copy of it."""
    flat = step.flatten()
    whole = len(flat) - len(flat) % _ROW
    lengths = [torch.linalg.vector_norm(part, dim=-1) for part in (flat[:whole].view(-1, _ROW), flat[whole:])]
    return sum_of([length.double().square().sum() for length in lengths])


def root_of_sum(squares: Sequence[Tensor]) -> float:
    """The length of a vector, of the squares of its parts' lengths, () each; a device is waited for once."""
    return math.sqrt(float(torch.stack([x.to(squares[0].device) for x in squares]).sum())) if squares else 0.0


def _step(ours: Tensor, theirs: Tensor) -> Tensor:
    """θ_ref − θ in float32; of float64 models what is left of the difference of all their digits."""
    ours, theirs = (torch.view_as_real(p) if p.is_complex() else p for p in (ours, theirs))
    kind = reduce(torch.promote_types, (ours.dtype, theirs.dtype, torch.float32))
    return (theirs.to(ours.device, kind) - ours.to(kind)).float()


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _equal(one: Tensor, other: Tensor) -> bool:
    if (one.dtype, one.device) != (other.dtype, other.device):
        one, other = one.float(), other.to(one.device, torch.float32)
    return torch.equal(one, other)
