"""Influence functions with the eigenvalue-corrected Kronecker factorisation, 2308.03296."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from assay.methods.base import Column, Method, Need
from assay.methods.checks import check_at_least, check_one_of
from assay.methods.influence import damping_units
from assay.methods.sums import Folded, Sums, fold
from assay.methods.targets import Targets, TargetSet
from assay.probe import Dot, Outer, PerSampleGradient, Reduction, Signals, tapped_parameters
from assay.tasks import Task
from assay.tasks.base import wide

if TYPE_CHECKING:
    from typing_extensions import Self

# Per-sample gradients are rotated at most this many numbers at a time.
_ELEMENTS = 1 << 24
# A longer side than this is not factored: its eigenvectors take a gigabyte and minutes.
_SIDE = 1 << 14


class EKFAC(Method):
    """⟨∇ℓ_target, H⁻¹ ∇ℓ_i⟩, what training on sample i takes off the target's loss: keep high; and self-influence.

    H is approximated layer by layer as Q_G Q_A diag(Λ) (Q_G Q_A)ᵀ + λI: Q_A and Q_G are the eigenvectors of the second
    moments of a layer's inputs and output gradients, Λ = E[(Q_Gᵀ g Q_A)²] (equation 20 of the paper). A convolution is
    a matrix over its unfolded windows. Biases, grouped convolutions, whatever else is no sum of outer products, and
    matrices with a side beyond 16,384 (vocabularies) have the diagonal E[g²]. Samples whose gradient is not finite are
    left out of every mean. Moments and eigenvectors of a float64 model are float64, of any other float32.

    The second moments are over positions whose gradient is not 0. The paper's are over all tokens, kronfluence's over
    those of the attention mask. A position without gradient adds nothing to the curvature, and counting it in the
    inputs' moment alone would make scores depend on how far a batch is padded.

    ``fit`` must run first, over samples of the pool, twice. The target's gradient is preconditioned once, so that the
    pool costs one ``grad_dot`` per layer.

    Columns: ``ekfac`` (and one per target if there are several) with targets; ``ekfac_self`` = ∇ℓ_iᵀ H⁻¹ ∇ℓ_i on
    request: high marks samples that only they themselves can explain, wrong labels first of all.

    Args:
        model: trained, θ.
        task: its loss is differentiated.
        targets: batches by name; None: self-influence only.
        self_influence: give ``ekfac_self`` too.
        damping: λ in units of each parameter's mean Λ (see ``influence.damping_units``); 0.1 in the paper.
        absolute_damping: ``damping`` is λ itself, the same for all parameters (kronfluence's 1e-8, say).
        basis: ``"kfac"``; or ``"shampoo"`` for the eigenvectors of E[ggᵀ] and E[gᵀg] with g the matrix of a sample's
            gradient (EC-Shampoo: its positions count together). Λ is the same of either.
        true_fisher: take the second moments with labels drawn from the model (the Gauss-Newton matrix), as the paper
            does; False: with the data's own labels.
        layers, name, skip_unsupported: as in ``Influence``.
    """

    uses_pool: ClassVar[bool] = True
    gathers: ClassVar[int | None] = 0

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        targets: Targets | None = None,
        *,
        self_influence: bool = False,
        damping: float = 0.1,
        absolute_damping: bool = False,
        basis: Literal["kfac", "shampoo"] = "kfac",
        true_fisher: bool = True,
        layers: str | Sequence[str] | None = None,
        name: str = "ekfac",
        skip_unsupported: bool = False,
    ) -> None:
        self.name, self.model, self.task = name, model, task
        self.targets, self.self_influence = TargetSet(name, targets or {}), self_influence
        if not self.targets and not self_influence:
            raise ValueError(f"{name}: nothing to compute; give targets, or self_influence=True")
        check_at_least("damping", damping, 0)
        check_one_of("basis", basis, ("kfac", "shampoo"))
        self.basis = basis
        self.damping, self.absolute_damping, self.true_fisher = damping, absolute_damping, true_fisher
        self.layers, self.skip_unsupported = layers, skip_unsupported
        self.parameters = tapped_parameters(model, layers, skip_unsupported=skip_unsupported)
        self.left_out: dict[str, str] = {}  # parameters that could not be tapped after all
        self._bases: dict[str, Basis] = {}
        self._directions: Mapping[str, Mapping[str, Tensor]] = {}

    @property
    def columns(self) -> Sequence[Column]:
        columns = self.targets.columns("EK-FAC influence")
        if self.self_influence:
            columns.append(Column(f"{self.name}_self", "low", "EK-FAC self-influence; high marks wrong labels"))
        return columns

    def needs(self) -> Mapping[str, Need]:
        if not self._bases:
            raise RuntimeError(f"{self.name}: call fit() before scoring")
        reductions: dict[str, Reduction] = {t: Dot(direction) for t, direction in self._directions.items()}
        if self.self_influence:
            reductions["\0self"] = _SelfInfluence(self._bases)
        return {
            "model": Need(
                self.model,
                self.task,
                reductions=reductions,
                layers=self.layers,
                skip_unsupported=self.skip_unsupported,
            )
        }

    def fit(self, pool: Iterable[Any] = ()) -> Self:
        """Take the curvature from samples of the pool (gone through twice), then the targets' gradients.

        Raises:
            ValueError: a pool or a target without samples, or none of them with a loss and a finite gradient.
        """
        batches, moments = list(pool), Moments(self.parameters, together=self.basis == "shampoo")
        self._run(moments, batches, drawn=self.true_fisher)
        bases = moments.bases()
        eigenvalues = Eigenvalues(self.parameters, bases)
        folded = self._run(eigenvalues, batches, drawn=self.true_fisher)
        folded.check(f"{self.name}: the pool that fit() was given", self.parameters)
        means = [basis.average(folded.count(name)) for name, basis in bases.items()]
        gradients, left_out = self.targets.gradients(self._run, self.parameters)
        self._directions = self._solve(bases, means, gradients, batches)
        self._bases, self.left_out = bases, folded.left_out | left_out
        return self

    def _solve(
        self,
        bases: Mapping[str, Basis],
        means: Sequence[float],
        gradients: Mapping[str, Mapping[str, Tensor]],
        pool: Sequence[Any],
    ) -> dict[str, dict[str, Tensor]]:
        """H⁻¹ of the targets' gradients, by target and parameter; ``bases``, of mean Λ ``means``, become damped."""
        units = [1.0] * len(means) if self.absolute_damping else damping_units(bases, means)
        for basis, unit in zip(bases.values(), units, strict=True):
            basis.damp(self.damping * unit)
        return {
            target: {name: bases[name].precondition(g) for name, g in gradient.items()}
            for target, gradient in gradients.items()
        }

    def _run(self, sums: Sums, batches: Iterable[Any], drawn: bool = False) -> Folded:
        return fold(self.model, self.task, sums, batches, skip_unsupported=self.skip_unsupported, drawn=drawn)

    def score(self, signals: Mapping[str, Signals]) -> dict[str, Tensor]:
        reduced = signals["model"].reduced
        nothing = signals["model"].losses.isnan()  # nothing to predict, or nothing that can be
        scores: dict[str, Tensor] = {}
        if self.targets:
            scores = self.targets.scores(torch.stack([reduced[t] for t in self.targets.batches], 1))
        if self.self_influence:
            scores[f"{self.name}_self"] = reduced["\0self"]
        return {column: score.masked_fill(nothing, torch.nan) for column, score in scores.items()}

    def metadata(self) -> dict[str, str]:
        kronecker = sum(basis.left is not None for basis in self._bases.values())
        return {
            "targets": str(self.targets),
            "damping": f"{self.damping}" + (" absolute" if self.absolute_damping else ""),
            "fisher": "labels drawn from the model" if self.true_fisher else "the data's labels",
            "factored_parameters": f"{kronecker} of {len(self._bases)}",
        }


@dataclass
class Basis:
    """The eigenbasis of one parameter's curvature; identity where ``left`` and ``right`` are None."""

    left: Tensor | None
    right: Tensor | None
    values: Tensor | None = None  # sums of squares, then Λ, then Λ + λ

    def rotate(self, gradient: Tensor) -> Tensor:
        """(B, *shape) or *shape -> the same in the eigenbasis."""
        if self.left is None or self.right is None:
            return gradient
        return self.left.T @ gradient @ self.right

    def rotated(self, gradient: PerSampleGradient) -> Iterable[Tensor]:
        """Per-sample gradients in the eigenbasis, some samples at a time."""
        samples = max(1, _ELEMENTS // gradient.shape.numel())
        for part in gradient.split(samples):
            if self.left is None or self.right is None:
                yield part.dense()
            elif (factors := _factored(part)) is not None:
                yield (factors.left.to(self.left) @ self.left).mT @ (factors.right.to(self.right) @ self.right)
            else:
                yield self.rotate(part.dense().reshape(-1, len(self.left), len(self.right)))

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

    def precondition(self, gradient: Tensor) -> Tensor:
        """H⁻¹ gradient; 0 where the parameter is never used."""
        return torch.zeros_like(gradient) if self.values is None else self.apply(torch.reciprocal, gradient)

    def apply(self, function: Callable[[Tensor], Tensor], gradient: Tensor) -> Tensor:
        """function(H) gradient, for a function of the eigenvalues; H is 0 where the parameter is never used."""
        if self.values is None:
            return gradient * function(torch.zeros_like(gradient))
        rotated = self.rotate(gradient.to(self.values).reshape(self.values.shape)) * function(self.values)
        if self.left is not None and self.right is not None:
            rotated = self.left @ rotated @ self.right.T
        return rotated.reshape(gradient.shape).to(gradient)

    def diagonal(self, like: Tensor) -> Tensor:
        """H's diagonal in the parameter's own coordinates, of the shape of ``like``."""
        if self.values is None:
            return torch.zeros_like(like)
        if self.left is None or self.right is None:
            return self.values.reshape(like.shape).to(like)
        return (self.left.square() @ self.values @ self.right.square().T).reshape(like.shape).to(like)


@dataclass
class Moments(Sums):
    """Adds up the second moments of both factors, over positions that have a gradient; or, ``together``, those of each
    sample's whole gradient, from either side."""

    together: bool = False
    left: dict[str, Tensor] = field(default_factory=dict)
    right: dict[str, Tensor] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    other: set[str] = field(default_factory=set)

    def add(self, parameter: str, gradient: PerSampleGradient) -> Tensor:
        if (factors := _factored(gradient)) is None:
            self.other.add(parameter)
            return torch.ones(gradient.samples, dtype=torch.bool)
        both = [wide(side) for side in (factors.left, factors.right)]
        energies = [side.square().flatten(1).sum(1) for side in both]  # bounds of the moments, which must be finite
        finite = (energies[0] * energies[1]).isfinite()
        left, right = (side[finite] for side in both)
        made = _of_gradients(left, right) if self.together else _of_positions(left, right)
        for sums, moment in zip((self.left, self.right), made, strict=True):
            sums[parameter] = sums[parameter] + moment.double() if parameter in sums else moment.double()
        self.dtypes[parameter] = left.dtype
        return finite

    def bases(self) -> dict[str, Basis]:
        bases = {name: Basis(None, None) for name in self.parameters}
        for name in self.left.keys() - self.other:
            left, right = (torch.linalg.eigh(moments[name]).eigenvectors for moments in (self.left, self.right))
            bases[name] = Basis(left.to(self.dtypes[name]), right.to(self.dtypes[name]))
        return bases


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
    """Adds up Λ, in place in the bases."""

    bases: Mapping[str, Basis]

    def add(self, parameter: str, gradient: PerSampleGradient) -> Tensor:
        basis, masks = self.bases[parameter], []
        for rotated in basis.rotated(gradient):
            squares = rotated.square()
            finite = squares.isfinite().reshape(len(squares), -1).all(1)  # a scalar has no second dimension
            total = squares[finite].sum(0)
            basis.values = total if basis.values is None else basis.values + total
            masks.append(finite)
        return torch.cat(masks)


@dataclass(frozen=True)
class _SelfInfluence:
    """gᵀ H⁻¹ g (B,)."""

    bases: Mapping[str, Basis]

    @property
    def parameters(self) -> Collection[str]:
        return self.bases.keys()

    def __call__(self, parameter: str, gradient: PerSampleGradient) -> Tensor:
        basis = self.bases[parameter]
        if basis.values is None:
            return torch.zeros(gradient.samples)
        values = basis.values
        return torch.cat([(r.square() / values).reshape(len(r), -1).sum(1) for r in basis.rotated(gradient)])


def _factored(gradient: PerSampleGradient) -> Outer | None:
    """The outer products of a matrix whose sides can have eigenvectors."""
    shape = gradient.shape
    if not shape or max(shape[0], shape.numel() // shape[0]) > _SIDE:
        return None
    return gradient.outer()
