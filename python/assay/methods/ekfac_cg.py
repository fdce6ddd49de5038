"""Influence with the whole Gauss–Newton matrix: conjugate gradients that EK-FAC preconditions, after 2507.14740."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from assay.methods.base import Column
from assay.methods.checks import check_at_least
from assay.methods.eigenbases import Bases
from assay.methods.ekfac import EKFAC
from assay.methods.gauss_newton import GaussNewton, trace_of
from assay.methods.krylov import Vector, add, dot
from assay.methods.targets import Targets
from assay.tasks import Regression, Task
from assay.tasks.base import wide

_log = logging.getLogger("assay")

# Of the residual, relative to the gradient: more digits change no rank, and what is not solved.
_ENOUGH, _FAR = 1e-3, 0.5


class EKFACCG(EKFAC):
    """⟨∇ℓ_target, (G + λI)⁻¹ ∇ℓ_i⟩, what training on sample i takes off the target's loss: keep high.

    G = E JᵀSJ over the samples given to ``fit``, whole: neither split by layer nor factored, with S the Hessian of the
    loss in the logits, no labels drawn. The solution is found by conjugate gradients that EK-FAC preconditions, so that
    the first is along its own (2507.14740 descends on random batches instead; a fixed sample needs no step size and
    fewer products). What is left of the residual is in the metadata.

    λ is larger than EK-FAC's: directions of little curvature are where training has not gone, and an exact solve gives
    them all their weight. On digits an exact solve with 0.1 is worse than EK-FAC with 0.1; 1 to 3 are best.

    ``fit`` goes through its samples as EK-FAC's does, once more for G's trace and once per iteration, at about four
    backward passes and three more per target. Logits are made, also where losses are fused. A sample of which no
    derivative is finite is left out of G; ``left_out`` in the metadata counts them.

    Columns: ``ekfac_cg``, and one per target if there are several.

    Args:
        model: trained, θ.
        task: its loss is differentiated; of logits, or a regression's predictions (EK-FAC's moments are then those of
            the data's own labels).
        targets: batches by name.
        damping: λ in units of G's mean eigenvalue (which eight products with random signs tell), above 0; None: 2.
        rate_sum: of SGD, the training's learning rates over 1 − momentum, added up: λ is 1/``rate_sum`` instead, so
            that a direction counts about as far as SGD has gone along it (2507.14740; see ``SOURCE``). Not Adam's. A
            pool without curvature, which there is no unit of, is none to it: the solution is the gradient over λ.
        iterations: at most; fewer where the residual is below 1e-3 of the gradient.
        layers, name, skip_unsupported: as in ``Influence``.
    """

    counted: ClassVar[str] = "iterations"

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        targets: Targets,
        *,
        damping: float | None = None,
        rate_sum: float | None = None,
        iterations: int = 20,
        layers: str | Sequence[str] | None = None,
        name: str = "ekfac_cg",
        skip_unsupported: bool = False,
    ) -> None:
        if damping is not None and rate_sum is not None:
            raise ValueError(f"{name}: expected damping or rate_sum, of which λ is made, not both")
        units = 2.0 if damping is None else damping
        super().__init__(
            model,
            task,
            targets,
            damping=units,
            true_fisher=not isinstance(task, Regression),  # whose labels nobody draws
            layers=layers,
            name=name,
            skip_unsupported=skip_unsupported,
        )
        self.targets.required()
        for argument, value in (("damping", units), ("rate_sum", 1.0 if rate_sum is None else rate_sum)):
            if not 0 < value < math.inf:
                raise ValueError(f"{argument}: expected a finite number above 0, got {value}")
        check_at_least("iterations", iterations, 1)
        self.rate_sum, self.iterations = rate_sum, iterations
        self._facts: dict[str, str] = {}

    @property
    def columns(self) -> Sequence[Column]:
        return self.targets.columns("Gauss-Newton influence")

    def metadata(self) -> dict[str, str]:
        damping = f"{self.damping} mean eigenvalues" if self.rate_sum is None else f"1/{self.rate_sum:g}"
        return super().metadata() | {"damping": damping, **self._facts}

    def _solve(
        self, bases: Bases, means: Sequence[float], gradients: Mapping[str, Vector], pool: Iterable[Any]
    ) -> dict[str, dict[str, Tensor]]:
        batches = list(pool)
        wanted = self._wanted(bases, gradients)
        product = GaussNewton(self.model, self.task, list(wanted[0]), batches)
        size = sum(basis.values.numel() for basis in bases.values() if basis.values is not None)
        try:
            trace = trace_of(product, wanted[0])
            if self.rate_sum is None and not trace > 0:
                raise ValueError("the pool's curvature is 0, so that damping has no unit; give rate_sum")
            damping = self.damping * trace / size if self.rate_sum is None else 1 / self.rate_sum
            _scale(bases, trace, damping)
            for name, gradient in wanted[0].items():
                if name in bases and bases[name].values is None:
                    bases[name].values = torch.full_like(gradient, damping)
            solved, residual, made = self._solved(System(product, damping, bases, wanted), batches)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error
        self._facts = {self.counted: str(made), "residual": f"{residual:.2g}", "left_out": str(product.left_out)}
        if residual > _FAR:
            self._facts["warning"] = f"far from solved; give more {self.counted} or a larger damping"
            _log.warning(
                "%s: the residual is %.2g after %d %s: %s",
                self.name, residual, made, self.counted, self._facts["warning"],
            )  # fmt: skip
        return dict(zip(gradients, solved, strict=True))

    def _solved(self, system: System, pool: Sequence[Any]) -> tuple[list[dict[str, Tensor]], float, int]:
        """x by target; the largest relative residual; the iterations made."""
        return _conjugate_gradients(system, self.iterations)

    def _wanted(self, bases: Bases, gradients: Mapping[str, Vector]) -> list[dict[str, Tensor]]:
        """Each target's gradient in every parameter that the pool or a target uses. The matrix is whole: x is not 0
        where only a target's gradient is. Where the pool's is, the matrix is, and x = g/λ."""
        used = {name for gradient in gradients.values() for name in gradient}
        used |= bases.used()
        zeros = {name: wide(torch.zeros_like(p)) for name, p in self.model.named_parameters() if name in used}
        return [{name: gradient.get(name, zero) for name, zero in zeros.items()} for gradient in gradients.values()]


def _scale(bases: Bases, trace: float, damping: float) -> None:
    """Λ becomes as large as G, damped. Of a mean over T tokens with labels drawn for each it is T times smaller."""
    own = sum(float(basis.values.double().sum()) for basis in bases.values() if basis.values is not None)
    for basis in bases.values():
        if basis.values is not None and own > 0:
            basis.values = basis.values * (trace / own)
        basis.damp(damping)


@dataclass(frozen=True)
class System:
    """(G + λ)x = g for each g of ``wanted``, and EK-FAC's as near as it is, ``bases``, damped."""

    product: GaussNewton
    damping: float
    bases: Bases
    wanted: Sequence[Vector]

    def applied(self, vectors: Sequence[Vector], product: GaussNewton | None = None) -> list[dict[str, Tensor]]:
        """(G + λ) of each, G of other samples where another ``product`` is given."""
        made = (product or self.product)(vectors)
        return [add(own, vector, self.damping) for own, vector in zip(made, vectors, strict=True)]

    def preconditioned(self, vectors: Sequence[Vector]) -> list[dict[str, Tensor]]:
        return [self.bases.precondition(vector) for vector in vectors]

    def residual(self, rest: Sequence[Vector]) -> float:
        """The largest length of what is left, relative to its g."""
        pairs = zip(rest, self.wanted, strict=True)
        return max((dot(r, r) / norm) ** 0.5 if (norm := dot(g, g)) else 0.0 for r, g in pairs)


def _conjugate_gradients(system: System, iterations: int) -> tuple[list[dict[str, Tensor]], float, int]:
    """x for each g, first along EK-FAC's; the largest relative residual, and the iterations made."""
    x = [{name: torch.zeros_like(v) for name, v in g.items()} for g in system.wanted]
    rest = [dict(g) for g in system.wanted]
    ahead = system.preconditioned(rest)
    along, height, made = ahead, [dot(r, z) for r, z in zip(rest, ahead, strict=True)], 0
    while made < iterations and system.residual(rest) > _ENOUGH:
        moved = system.applied(along)
        for k, (p, q) in enumerate(zip(along, moved, strict=True)):
            bend = dot(p, q)
            width = height[k] / bend if bend > 0 else 0.0  # 0/0: this one is solved
            x[k], rest[k] = add(x[k], p, width), add(rest[k], q, -width)
        ahead, before = system.preconditioned(rest), height
        height = [dot(r, z) for r, z in zip(rest, ahead, strict=True)]
        shares = [new / old if old > 0 else 0.0 for new, old in zip(height, before, strict=True)]
        along = [add(z, p, share) for z, p, share in zip(ahead, along, shares, strict=True)]
        made += 1
    return x, system.residual(rest), made
