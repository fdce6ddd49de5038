"""EK-FAC's curvature: every matrix of a model, and the bias beside it, in the eigenbasis of its factors' moments."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from assay.methods.parts import State
from assay.methods.sums import Sums, add_to
from assay.probe import Outer, PerSampleGradient
from assay.tasks.base import wide

# Per-sample gradients are rotated at most this many numbers at a time.
_ELEMENTS = 1 << 24
# A longer side than this is not factored: its eigenvectors take a gigabyte and minutes.
_SIDE = 1 << 14


@dataclass(frozen=True)
class Joint:
    """A bias that is one more column of its weight's matrix (axis 1), or one more row of it (0)."""

    bias: str
    axis: int

    def widened(self, factors: Outer) -> Outer:
        """The factors of the whole matrix: an input that is always 1 is what a bias is multiplied with."""
        if self.axis:
            return Outer(factors.left, pad(factors.right, (0, 1), value=1.0))
        return Outer(pad(factors.left, (0, 1), value=1.0), factors.right)

    def joined(self, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.cat([weight.reshape(len(weight), -1), bias.unsqueeze(self.axis)], self.axis)

    def parted(self, whole: Tensor) -> tuple[Tensor, Tensor]:
        last = whole.shape[self.axis] - 1
        return whole.narrow(self.axis, 0, last), whole.select(self.axis, last)


@dataclass
class Basis:
    """The eigenbasis of one matrix' curvature; identity where ``left`` and ``right`` are None."""

    left: Tensor | None
    right: Tensor | None
    values: Tensor | None = None  # sums of squares, then Λ, then Λ + λ
    joint: Joint | None = None

    def rotate(self, gradient: Tensor) -> Tensor:
        """(B, *shape) or *shape -> the same in the eigenbasis."""
        if self.left is None or self.right is None:
            return gradient
        return self.left.T @ gradient @ self.right

    def rotated(self, gradient: PerSampleGradient) -> Iterable[Tensor]:
        """Per-sample gradients, a joint bias' too, in the eigenbasis, some samples at a time."""
        samples = max(1, _ELEMENTS // gradient.shape.numel())
        for part in gradient.split(samples):
            if self.left is None or self.right is None:
                yield part.dense()
            elif (factors := factored(part)) is not None:
                whole = factors if self.joint is None else self.joint.widened(factors)
                yield (whole.left.to(self.left) @ self.left).mT @ (whole.right.to(self.right) @ self.right)
            elif self.joint is None:
                yield self.rotate(part.dense().reshape(-1, len(self.left), len(self.right)))
            else:
                raise ValueError(
                    f"{self.joint.bias} and its weight are used in another way than in the samples that the curvature "
                    "is of: several times where it was once; give fit() such samples too"
                )

    def average(self, count: int) -> float:
        """Sums of squares over ``count`` samples become Λ -> its mean, 0 if the parameter is never used."""
        if self.values is None:
            return 0.0
        self.values = self.values / max(count, 1)
        return float(self.values.mean())

    def damp(self, damping: float) -> None:
        """Λ becomes Λ + λ."""
        if self.values is None:
            return
        self.values = self.values + damping
        # Without damping, where no sample has a gradient: such a coordinate has no influence either.
        self.values[self.values == 0] = torch.inf

    def apply(self, function: Callable[[Tensor], Tensor], gradient: Tensor) -> Tensor:
        """function(H) gradient, for a function of the eigenvalues, which are known."""
        assert self.values is not None
        rotated = self.rotate(gradient.to(self.values).reshape(self.values.shape)) * function(self.values)
        if self.left is not None and self.right is not None:
            rotated = self.left @ rotated @ self.right.T
        return rotated.reshape(gradient.shape).to(gradient)


class Bases(dict[str, Basis]):
    """By parameter; a bias that is joint with its weight has none of its own."""

    def apply(self, function: Callable[[Tensor], Tensor], vector: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """function(H) of a vector, by parameter, for a function of the eigenvalues; H is 0 where a parameter is never
        used. What the vector lacks of a matrix is 0."""
        found: dict[str, Tensor] = {}
        for name, basis in self.items():
            own = vector.get(name)
            if basis.joint is not None:
                found |= self._of_joint(function, name, basis.joint, vector)
            elif own is not None and basis.values is None:
                found[name] = own * function(torch.zeros_like(own))
            elif own is not None:
                found[name] = basis.apply(function, own)
        return found

    def precondition(self, vector: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """H⁻¹ of a vector; 0 where a parameter is never used."""
        return self.apply(_inverse, vector)

    def used(self) -> set[str]:
        """The parameters in which the pool has a gradient."""
        own = {name: basis for name, basis in self.items() if basis.values is not None}
        return own.keys() | {basis.joint.bias for basis in own.values() if basis.joint is not None}

    def _of_joint(
        self, function: Callable[[Tensor], Tensor], name: str, joint: Joint, vector: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        weight, bias = vector.get(name), vector.get(joint.bias)
        if weight is None:
            if bias is not None:
                raise ValueError(f"the target's loss depends on {joint.bias} but not on {name}, unlike the pool's")
            return {}
        basis = self[name]
        bias = weight.new_zeros(weight.reshape(len(weight), -1).shape[1 - joint.axis]) if bias is None else bias
        whole = joint.joined(weight, bias)
        known = basis.values is not None
        whole = basis.apply(function, whole) if known else whole * function(torch.zeros_like(whole))
        first, second = joint.parted(whole)
        return {name: first.reshape(weight.shape), joint.bias: second}


def _inverse(values: Tensor) -> Tensor:
    """1 / values; 0 of 0, which is of what is never used."""
    return torch.where(values == 0, 0.0, values.reciprocal())


@dataclass
class Moments(Sums):
    """Adds up the second moments of both factors, over positions that have a gradient; or, ``together``, those of each
    sample's whole gradient, from either side.

    A layer's bias, if its gradient is the sum of one of the weight's factors over positions, is taken as a column or a
    row of the weight's matrix, as in 1503.05671 and kronfluence. It is found out in the first batch that has both.
    """

    together: bool = False
    left: dict[str, Tensor] = field(default_factory=dict)
    right: dict[str, Tensor] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    other: set[str] = field(default_factory=set)
    joints: dict[str, Joint | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        siblings = {name: name.removesuffix("weight") + "bias" for name in self.parameters if name.endswith("weight")}
        self._biases = {weight: bias for weight, bias in siblings.items() if bias in self._places}
        self._weights = {bias: weight for weight, bias in self._biases.items()}
        # Of the batch at hand, until both are there: a weight's factors and which samples they are of.
        self._factors: dict[str, tuple[Outer, Tensor]] = {}
        self._gradients: dict[str, Tensor] = {}

    def add(self, parameter: str, gradient: PerSampleGradient) -> Tensor:
        factors = factored(gradient)
        if factors is None:
            self.other.add(parameter)
            if (weight := self._weights.get(parameter)) is not None and weight not in self.joints:
                self._gradients[weight] = gradient.dense()
                self._decide(weight)
            return torch.ones(gradient.samples, dtype=torch.bool)
        both = [wide(side) for side in (factors.left, factors.right)]
        energies = [side.square().flatten(1).sum(1) for side in both]  # bounds of the moments, which must be finite
        finite = (energies[0] * energies[1]).isfinite()
        fine = Outer(both[0][finite], both[1][finite])
        if parameter not in self._biases or parameter in self.joints:
            self._add(parameter, fine)
            return finite
        self._settle(parameter)  # of an earlier batch: its bias never came
        if parameter in self.joints:
            self._add(parameter, fine)
        else:
            self._factors[parameter] = (fine, finite)
            self._decide(parameter)
        return finite

    def fresh(self) -> Moments:
        return Moments(self.parameters, together=self.together)

    def state(self) -> State:
        for name in list(self._factors):
            self._settle(name)
        joints = {name: asdict(joint) for name, joint in self.joints.items() if joint is not None}
        other = sorted(self.other)
        return {"left": self.left, "right": self.right, "dtypes": self.dtypes, "other": other, "joints": joints}

    def join(self, state: State) -> None:
        self.other.update(state["other"])
        for name, left in state["left"].items():
            joint = Joint(**state["joints"][name]) if name in state["joints"] else None
            if name in self.left and self.joints[name] != joint:
                self.other.add(name)  # together with its bias in some samples, and not in others: no basis is of all
                continue
            add_to(self.left, {name: left})
            add_to(self.right, {name: state["right"][name]})
            self.joints[name], self.dtypes[name] = joint, state["dtypes"][name]

    def bases(self) -> Bases:
        for name in list(self._factors):
            self._settle(name)
        found = Bases()
        for name in self.parameters:
            if name not in self.left or name in self.other:
                found[name] = Basis(None, None)
                continue
            left, right = (torch.linalg.eigh(moments[name]).eigenvectors for moments in (self.left, self.right))
            found[name] = Basis(left.to(self.dtypes[name]), right.to(self.dtypes[name]), joint=self.joints.get(name))
        for joint in [basis.joint for basis in found.values() if basis.joint is not None]:
            del found[joint.bias]
        return found

    def _settle(self, weight: str) -> None:
        """A weight that waits for its bias has none."""
        if (waiting := self._factors.pop(weight, None)) is not None:
            self.joints[weight] = None
            self._add(weight, waiting[0])

    def _decide(self, weight: str) -> None:
        """Whether the bias is a part of the matrix, once both of a batch are there."""
        if weight not in self._factors or weight not in self._gradients:
            return
        (fine, finite), gradient = self._factors.pop(weight), self._gradients.pop(weight)
        bias = wide(gradient)
        if len(bias) == len(finite) and not bias.any() and not fine.left.any():
            return  # a batch without gradient tells nothing, and adds nothing
        near = max(1e-4, 4 * torch.finfo(gradient.dtype).eps)
        self.joints[weight] = None
        for axis, side in ((0, fine.right), (1, fine.left)):
            total, size = side.sum(1), side.abs().sum(1)
            own = bias[finite] if len(bias) == len(finite) else bias
            if total.shape == own.shape and bool(((total - own).abs() <= near * size).all()):
                self.joints[weight] = Joint(self._biases[weight], axis)
        self._add(weight, fine)

    def _add(self, parameter: str, fine: Outer) -> None:
        joint = self.joints.get(parameter)
        whole = fine if joint is None else joint.widened(fine)
        made = (_of_gradients if self.together else _of_positions)(whole.left, whole.right)
        for sums, moment in zip((self.left, self.right), made, strict=True):
            add_to(sums, {parameter: moment.double()})
        self.dtypes[parameter] = fine.left.dtype


def _of_positions(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Σ over samples and positions of the outer products of (B, T, O) rows, and of (B, T, I) ones."""
    left, right = left.flatten(0, 1), right.flatten(0, 1)
    has_gradient = (left != 0).any(1) & (right != 0).any(1)
    left, right = left[has_gradient], right[has_gradient]
    return left.T @ left, right.T @ right


def _of_gradients(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Σ_b M_b M_bᵀ and Σ_b M_bᵀ M_b with M_b = Σ_t left_tᵀ right_t, never more than ``_ELEMENTS`` numbers at a time."""
    positions, sizes = left.shape[1], (left.shape[2], right.shape[2])
    sums = (left.new_zeros(sizes[0], sizes[0]), left.new_zeros(sizes[1], sizes[1]))
    by_position = positions**2 <= sizes[0] * sizes[1]
    samples = max(1, _ELEMENTS // (positions**2 if by_position else sizes[0] * sizes[1]))
    for a, b in zip(torch.split(left, samples), torch.split(right, samples), strict=True):
        if by_position:  # M Mᵀ = aᵀ (b bᵀ) a
            sums[0].addmm_(a.flatten(0, 1).T, (b @ b.mT @ a).flatten(0, 1))
            sums[1].addmm_(b.flatten(0, 1).T, (a @ a.mT @ b).flatten(0, 1))
        else:
            whole = a.mT @ b
            rows, columns = whole.flatten(0, 1), whole.mT.flatten(0, 1)
            sums[0].addmm_(columns.T, columns)
            sums[1].addmm_(rows.T, rows)
    return sums


@dataclass
class Eigenvalues(Sums):
    """Adds up Λ; what it joins, in place in the bases."""

    bases: Mapping[str, Basis]
    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, parameter: str, gradient: PerSampleGradient) -> Tensor:
        if (basis := self.bases.get(parameter)) is None:  # a bias that is in its weight's matrix
            return gradient.dense().isfinite().reshape(gradient.samples, -1).all(1)
        masks = []
        for rotated in basis.rotated(gradient):
            squares = rotated.square()
            finite = squares.isfinite().reshape(len(squares), -1).all(1)  # a scalar has no second dimension
            add_to(self.sums, {parameter: squares[finite].sum(0)})
            masks.append(finite)
        return torch.cat(masks)

    @property
    def given(self) -> State:
        return {name: [basis.left, basis.right] for name, basis in self.bases.items()}

    def fresh(self) -> Eigenvalues:
        return Eigenvalues(self.parameters, self.bases)

    def state(self) -> State:
        return self.sums

    def join(self, state: State) -> None:
        for name, total in state.items():
            basis = self.bases[name]
            basis.values = total if basis.values is None else basis.values + total


def factored(gradient: PerSampleGradient) -> Outer | None:
    """The outer products of a matrix whose sides can have eigenvectors."""
    shape = gradient.shape
    if not shape or max(shape[0], shape.numel() // shape[0]) > _SIDE:
        return None
    return gradient.outer()
