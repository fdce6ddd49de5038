"""Influence with the whole Gauss–Newton matrix: conjugate gradients that EK-FAC preconditions, after 2507.14740."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from assay.methods.base import Column
from assay.methods.checks import check_at_least
from assay.methods.ekfac import EKFAC, Basis
from assay.methods.gauss_newton import GaussNewton
from assay.methods.targets import Targets
from assay.tasks import Task
from assay.tasks.base import wide

Vector = Mapping[str, Tensor]

_log = logging.getLogger("assay")

# Of the residual, relative to the gradient: more digits change no rank, and what is not solved.
_ENOUGH, _FAR = 1e-3, 0.5

_SIGNS = 8


class EKFACCG(EKFAC):
    """⟨∇ℓ_target, (G + λI)⁻¹ ∇ℓ_i⟩, what training on sample i takes off the target's loss: keep high.

    G = E JᵀSJ over the samples given to ``fit``, whole: neither split by layer nor factored, with S the Hessian of the
    loss in the logits, no labels drawn. The solution is found by conjugate gradients that EK-FAC preconditions, so that
    the first is along its own (2507.14740 descends on random batches instead; a fixed sample needs no step size and
    fewer products). What is left of the residual is in the metadata.

    λ is larger than EK-FAC's: directions of little curvature are where training has not gone, and an exact solve gives
    them all their weight. On digits an exact solve with 0.1 is worse than EK-FAC with 0.1; 1 to 3 are best.

    ``fit`` goes through its samples as EK-FAC's does, once more for G's trace and once per iteration, at about four
    backward passes and three more per target. Logits are made, also where losses are fused. A batch with a sample of
    which no derivative is finite is left out of G.

    Columns: ``ekfac_cg``, and one per target if there are several.

    Args:
        model: trained, θ.
        task: its loss is differentiated; of logits or predictions.
        targets: batches by name.
        damping: λ in units of G's mean eigenvalue (which eight products with random signs tell), above 0.
        iterations: at most; fewer where the residual is below 1e-3 of the gradient.
        layers, name, skip_unsupported: as in ``Influence``.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        targets: Targets,
        *,
        damping: float = 2.0,
        iterations: int = 20,
        layers: str | Sequence[str] | None = None,
        name: str = "ekfac_cg",
        skip_unsupported: bool = False,
    ) -> None:
        super().__init__(
            model, task, targets, damping=damping, layers=layers, name=name, skip_unsupported=skip_unsupported
        )
        self.targets.required()
        if not damping > 0:
            raise ValueError(f"damping: expected a number above 0, got {damping}")
        check_at_least("iterations", iterations, 1)
        self.iterations = iterations
        self._facts: dict[str, str] = {}

    @property
    def columns(self) -> Sequence[Column]:
        return self.targets.columns("Gauss-Newton influence")

    def metadata(self) -> dict[str, str]:
        return super().metadata() | {"damping": f"{self.damping} mean eigenvalues", **self._facts}

    def _solve(
        self, bases: Mapping[str, Basis], means: Sequence[float], gradients: Mapping[str, Vector], pool: Sequence[Any]
    ) -> dict[str, dict[str, Tensor]]:
        wanted = self._wanted(bases, gradients)
        product = GaussNewton(self.model, self.task, list(wanted[0]), pool)
        size = sum(basis.values.numel() for basis in bases.values() if basis.values is not None)
        try:
            trace = _trace(product, wanted[0])
            if not trace > 0:
                raise ValueError("the pool's curvature is 0, so that there is nothing to damp in units of")
            damping = self.damping * trace / size
            _scale(bases, trace, damping)
            for name, gradient in wanted[0].items():
                if bases[name].values is None:
                    bases[name].values = torch.full_like(gradient, damping)
            solved, residual, made = _conjugate_gradients(product, damping, bases, wanted, self.iterations)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error
        self._facts = {"iterations": str(made), "residual": f"{residual:.2g}", "left_out": str(len(product.left_out))}
        if residual > _FAR:
            self._facts["warning"] = "far from solved; give more iterations or a larger damping"
            _log.warning(
                "%s: the residual is %.2g after %d iterations: %s", self.name, residual, made, self._facts["warning"]
            )
        return dict(zip(gradients, solved, strict=True))

    def _wanted(self, bases: Mapping[str, Basis], gradients: Mapping[str, Vector]) -> list[dict[str, Tensor]]:
        """Each target's gradient in every parameter that the pool or a target uses. The matrix is whole: x is not 0
        where only a target's gradient is. Where the pool's is, the matrix is, and x = g/λ."""
        used = {name for gradient in gradients.values() for name in gradient}
        used |= {name for name, basis in bases.items() if basis.values is not None}
        zeros = {name: wide(torch.zeros_like(p)) for name, p in self.model.named_parameters() if name in used}
        return [{name: gradient.get(name, zero) for name, zero in zeros.items()} for gradient in gradients.values()]


def _trace(product: GaussNewton, like: Vector) -> float:
    """The trace of G, from products with random signs (Hutchinson)."""
    generator = torch.Generator().manual_seed(0)
    signs = [
        {name: (2 * torch.randint(2, g.shape, generator=generator) - 1).to(g) for name, g in like.items()}
        for _ in range(_SIGNS)
    ]
    return sum(_dot(v, own) for v, own in zip(signs, product(signs), strict=True)) / _SIGNS


def _scale(bases: Mapping[str, Basis], trace: float, damping: float) -> None:
    """Λ becomes as large as G, damped. Of a mean over T tokens with labels drawn for each it is T times smaller."""
    own = sum(float(basis.values.double().sum()) for basis in bases.values() if basis.values is not None)
    for basis in bases.values():
        if basis.values is not None and own > 0:
            basis.values = basis.values * (trace / own)
        basis.damp(damping)


def _conjugate_gradients(
    product: GaussNewton, damping: float, bases: Mapping[str, Basis], wanted: Sequence[Vector], iterations: int
) -> tuple[list[dict[str, Tensor]], float, int]:
    """x of (G + λ)x = g for each g, first along EK-FAC's; the largest relative residual, and the iterations made."""

    def applied(vectors: Sequence[Vector]) -> list[dict[str, Tensor]]:
        return [_add(own, vector, damping) for own, vector in zip(product(vectors), vectors, strict=True)]

    def preconditioned(vectors: Sequence[Vector]) -> list[dict[str, Tensor]]:
        return [{name: bases[name].precondition(v) for name, v in vector.items()} for vector in vectors]

    x = [{name: torch.zeros_like(v) for name, v in g.items()} for g in wanted]
    rest = [dict(g) for g in wanted]
    ahead = preconditioned(rest)
    along, height, made = ahead, [_dot(r, z) for r, z in zip(rest, ahead, strict=True)], 0
    while made < iterations and _residual(rest, wanted) > _ENOUGH:
        moved = applied(along)
        for k, (p, q) in enumerate(zip(along, moved, strict=True)):
            bend = _dot(p, q)
            width = height[k] / bend if bend > 0 else 0.0  # 0/0: this one is solved
            x[k], rest[k] = _add(x[k], p, width), _add(rest[k], q, -width)
        ahead, before = preconditioned(rest), height
        height = [_dot(r, z) for r, z in zip(rest, ahead, strict=True)]
        shares = [new / old if old > 0 else 0.0 for new, old in zip(height, before, strict=True)]
        along = [_add(z, p, share) for z, p, share in zip(ahead, along, shares, strict=True)]
        made += 1
    return x, _residual(rest, wanted), made


def _add(a: Vector, b: Vector, times: float) -> dict[str, Tensor]:
    return {name: v.add(b[name], alpha=times) for name, v in a.items()}


def _dot(a: Vector, b: Vector) -> float:
    return float(torch.stack([(v.double() * b[name].double()).sum() for name, v in a.items()]).sum())


def _residual(rest: Sequence[Vector], wanted: Sequence[Vector]) -> float:
    return max((_dot(r, r) / norm) ** 0.5 if (norm := _dot(g, g)) else 0.0 for r, g in zip(rest, wanted, strict=True))
