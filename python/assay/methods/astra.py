"""ASTRA: influence with the whole Gauss–Newton matrix, by descent that EK-FAC preconditions, 2507.14740."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from assay.methods.base import Column
from assay.methods.checks import check_at_least
from assay.methods.ekfac_cg import EKFACCG, System
from assay.methods.gauss_newton import GaussNewton
from assay.methods.krylov import Vector, add, dot
from assay.methods.targets import Targets
from assay.tasks import Task


class ASTRA(EKFACCG):
    """⟨∇ℓ_target, (G + λI)⁻¹ ∇ℓ_i⟩, what training on sample i takes off the target's loss: keep high.

    x ← x − α P⁻¹[(G_B + λ)x − ∇ℓ_target] with P EK-FAC's matrix, damped, from x = P⁻¹∇ℓ_target (section 4 of the
    paper). G_B is of one of the batches given to ``fit``, drawn in proportion to its samples with a loss. ``EKFACCG``
    solves the same equation over all of them, to more digits in fewer products and without a step size; this one is for
    pools of which an iteration should see a part only.

    A step size is too large where EK-FAC takes a direction's curvature for much smaller than a batch's is. Then the
    iteration runs away, which is refused: over all batches the residual must not be larger than where it began, or than
    that of x = 0.

    Columns: ``astra``, and one per target if there are several.

    Args:
        model, task, targets, damping, rate_sum: as in ``EKFACCG``.
        steps: each costs a product with one batch.
        step_size: α, 0.01 in the paper.
        seed: of the draws.
        layers, name, skip_unsupported: as in ``Influence``.
    """

    counted: ClassVar[str] = "steps"

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        targets: Targets,
        *,
        damping: float | None = None,
        rate_sum: float | None = None,
        steps: int = 200,
        step_size: float = 0.01,
        seed: int = 0,
        layers: str | Sequence[str] | None = None,
        name: str = "astra",
        skip_unsupported: bool = False,
    ) -> None:
        super().__init__(
            model,
            task,
            targets,
            damping=damping,
            rate_sum=rate_sum,
            layers=layers,
            name=name,
            skip_unsupported=skip_unsupported,
        )
        check_at_least("steps", steps, 1)
        if not 0 < step_size <= 1:
            raise ValueError(f"step_size: expected a number above 0 and at most 1, got {step_size}")
        self.steps, self.step_size, self.seed = steps, step_size, seed

    @property
    def columns(self) -> Sequence[Column]:
        return self.targets.columns("Gauss-Newton influence (ASTRA)")

    def _solved(self, system: System, pool: Sequence[Any]) -> tuple[list[dict[str, Tensor]], float, int]:
        x = system.preconditioned(system.wanted)
        start = max(1.0, system.residual(_rest(system, x, system.product)))
        sizes = torch.tensor([system.product.counts[n] for n in range(len(pool))], dtype=torch.float64)
        drawn = torch.multinomial(sizes, self.steps, True, generator=torch.Generator().manual_seed(self.seed))
        for step, number in enumerate(drawn.tolist(), 1):
            own = GaussNewton(self.model, self.task, list(x[0]), [system.product.batches[number]])
            moves = system.preconditioned(_rest(system, x, own))
            x = [add(each, move, self.step_size) for each, move in zip(x, moves, strict=True)]
            if not all(map(partial(_may_be_a_solution, system.damping), x, system.wanted)):
                raise ValueError(self._diverged(step, "x is longer than any solution can be"))
        residual = system.residual(_rest(system, x, system.product))
        if not residual <= start:
            found = f"the residual is {residual:.3g} of the gradient, expected at most {start:.3g}, from where it began"
            raise ValueError(self._diverged(self.steps, found))
        return x, residual, self.steps

    def _diverged(self, steps: int, found: str) -> str:
        return (
            f"diverged: after {steps} steps of step_size {self.step_size:g} {found}; take a smaller step_size, a "
            "larger damping, or EKFACCG, which has no step size"
        )


def _rest(system: System, x: Sequence[dict[str, Tensor]], product: GaussNewton) -> list[dict[str, Tensor]]:
    """∇ℓ_target − (G + λ)x."""
    return [add(g, own, -1.0) for g, own in zip(system.wanted, system.applied(x, product), strict=True)]


def _may_be_a_solution(damping: float, x: dict[str, Tensor], g: Vector) -> bool:
    """‖(G + λ)⁻¹g‖ ≤ ‖g‖/λ; an iteration may go beyond for a while."""
    return dot(x, x) <= (10 / damping) ** 2 * dot(g, g)
