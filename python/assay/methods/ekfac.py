"""Influence functions with the eigenvalue-corrected Kronecker factorisation, 2308.03296."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from assay.methods.base import Column, Method, Need
from assay.methods.checks import check_at_least, check_one_of
from assay.methods.eigenbases import Bases, Eigenvalues, Moments
from assay.methods.parts import kept
from assay.methods.second_moments import damping_units
from assay.methods.sums import Folded, Sums, fold, samples_left_out
from assay.methods.targets import Targets, TargetSet
from assay.probe import Dot, PerSampleGradient, Reduction, Signals, tapped_parameters
from assay.tasks import Task
from assay.tasks.base import Relabels

if TYPE_CHECKING:
    from typing_extensions import Self


class EKFAC(Method):
    """⟨∇ℓ_target, H⁻¹ ∇ℓ_i⟩, what training on sample i takes off the target's loss: keep high; and self-influence.

    H is approximated layer by layer as Q_G Q_A diag(Λ) (Q_G Q_A)ᵀ + λI: Q_A and Q_G are the eigenvectors of the second
    moments of a layer's inputs and output gradients, Λ = E[(Q_Gᵀ g Q_A)²] (equation 20 of the paper). A convolution is
    a matrix over its unfolded windows; a layer's bias is one more column of its weight's matrix, as in kronfluence.
    Norms, grouped convolutions, whatever else is no sum of outer products, and matrices with a side beyond 16,384
    (vocabularies) have the diagonal E[g²]. Samples whose gradient is not finite are left out of every mean. Moments and
    eigenvectors of a float64 model are float64, of any other float32.

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
        damping: λ in units of each matrix' mean Λ (see ``second_moments.damping_units``); 0.1 in the paper.
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
        if self_influence and len(self.targets) > 1 and "self" in self.targets.batches:
            raise ValueError(f"{name}: target 'self' would have self-influence's column, {name}_self; rename it")
        check_at_least("damping", damping, 0)
        check_one_of("basis", basis, ("kfac", "shampoo"))
        if true_fisher and not isinstance(task, Relabels):
            raise ValueError(
                f"{name}: {type(task).__name__} has no distribution of labels to draw from; expected Classification, "
                "TokenClassification or CausalLM, or EKFAC with the data's own labels, true_fisher=False"
            )
        self.basis = basis
        self.damping, self.absolute_damping, self.true_fisher = damping, absolute_damping, true_fisher
        self.layers, self.skip_unsupported = layers, skip_unsupported
        self.parameters = tapped_parameters(model, layers, skip_unsupported=skip_unsupported)
        self.left_out: dict[str, str] = {}  # parameters that could not be tapped after all
        self._of_pool, self._of_targets = Folded(), Folded()  # samples that fit() went through
        self._bases = Bases()
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
        batches, moments = kept(pool), Moments(self.parameters, together=self.basis == "shampoo")
        drawn = 0 if self.true_fisher else None
        self._run(moments, batches, drawn)
        bases = moments.bases()
        eigenvalues = Eigenvalues(self.parameters, bases)
        folded = self._run(eigenvalues, batches, drawn)
        folded.check(f"{self.name}: the pool that fit() was given", self.parameters)
        means = [basis.average(folded.count(name)) for name, basis in bases.items()]
        gradients, of_targets = self.targets.gradients(self._run, self.parameters)
        self._directions = self._solve(bases, means, gradients, batches)
        self._bases, self.left_out = bases, folded.left_out | of_targets.left_out
        self._of_pool, self._of_targets = folded, of_targets
        return self

    def _solve(
        self,
        bases: Bases,
        means: Sequence[float],
        gradients: Mapping[str, Mapping[str, Tensor]],
        pool: Iterable[Any],
    ) -> dict[str, dict[str, Tensor]]:
        """H⁻¹ of the targets' gradients, by target and parameter; ``bases``, of mean Λ ``means``, become damped."""
        units = [1.0] * len(means) if self.absolute_damping else damping_units(bases, means)
        for basis, unit in zip(bases.values(), units, strict=True):
            basis.damp(self.damping * unit)
        return {target: bases.precondition(gradient) for target, gradient in gradients.items()}

    def _run(self, sums: Sums, batches: Iterable[Any], drawn: int | None = None) -> Folded:
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
        kronecker = sum(1 + (b.joint is not None) for b in self._bases.values() if b.left is not None)
        return {
            "targets": str(self.targets),
            "damping": f"{self.damping}" + (" absolute" if self.absolute_damping else ""),
            "fisher": "labels drawn from the model" if self.true_fisher else "the data's labels",
            "factored_parameters": f"{kronecker} of {len(self.parameters)}",
            "left_out": samples_left_out(self._of_pool),
            "targets_left_out": samples_left_out(self._of_targets),
        }


@dataclass(frozen=True)
class _SelfInfluence:
    """gᵀ H⁻¹ g (B,)."""

    bases: Bases

    @property
    def parameters(self) -> Collection[str]:
        return self.bases.keys()

    def __call__(self, parameter: str, gradient: PerSampleGradient) -> Tensor:
        basis = self.bases[parameter]
        if basis.values is None:
            return torch.zeros(gradient.samples)
        values = basis.values
        return torch.cat([(r.square() / values).reshape(len(r), -1).sum(1) for r in basis.rotated(gradient)])
