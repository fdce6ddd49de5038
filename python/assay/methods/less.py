"""LESS: selecting influential data for targeted instruction tuning, 2402.04333."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from assay.methods.checks import check_one_of
from assay.methods.influence import Influence, Kernel
from assay.methods.targets import Targets
from assay.ops import Kronecker, Sketch
from assay.probe import AdamState, Dense, Feature, PerSampleGradient, Projected
from assay.tasks import Task
from assay.tasks.base import wide

# Gradients are multiplied out (Adam divides elementwise) at most this many numbers at a time.
_ELEMENTS = 1 << 26


class LESS(Influence):
    """Σ_k η_k cos(Γ_k(i), ∇ℓ_k(t)): the Adam step on a sample against the gradient on the target. Keep high.

    Γ is the step that Adam would make with the sample's gradient alone, from checkpoint k's moments (equation 3). Both
    sides are projected and then normalised. The mean over a target's samples, the maximum over targets (sub-tasks).
    Warm up on a random few per cent of the data first, best with LoRA: the step has to be multiplied out.

    Args:
        models: the warm-up's checkpoints.
        task: its loss is differentiated.
        targets: batches by sub-task.
        optimizers: one ``AdamState`` per checkpoint; None: plain gradients on both sides.
        weights: the learning rates η of the checkpoints' epochs.
        sketch: of the whole gradient; the paper has 8,192 dimensions.
        eps: ``"inside"`` reproduces the paper's code, which puts ε into the root.
        layers, name, skip_unsupported: as in ``Influence``.

    Raises:
        ValueError: an optimiser's state lacks a parameter, or has one of another shape.
    """

    uses_pool: ClassVar[bool] = False

    def __init__(
        self,
        models: Sequence[nn.Module],
        task: Task,
        targets: Targets,
        *,
        optimizers: Sequence[AdamState] | None,
        weights: Sequence[float] | None = None,
        sketch: Sketch | None = None,
        eps: Literal["outside", "inside"] = "outside",
        layers: str | Sequence[str] | None = None,
        name: str = "less",
        skip_unsupported: bool = False,
    ) -> None:
        super().__init__(
            models,
            task,
            targets,
            Kernel(normalize=True, across="max"),
            sketch or Kronecker(64, 64),
            together=True,
            layers=layers,
            weights=weights,
            name=name,
            skip_unsupported=skip_unsupported,
        )
        check_one_of("eps", eps, ("outside", "inside"))
        self.optimizers, self.eps = None if optimizers is None else list(optimizers), eps
        if self.optimizers is not None and len(self.optimizers) != len(self.models):
            raise ValueError(
                f"{name}: expected one optimiser state per checkpoint, {len(self.models)}, got {len(self.optimizers)}"
            )
        for model, state in zip(self.models, self.optimizers or (), strict=False):
            state.check(model, self.parameters)

    def feature(self, k: int, *, target: bool) -> Feature:
        if target or self.optimizers is None:
            return super().feature(k, target=target)
        return AdamSketched(self.shapes, self.sketch_of(k), True, state=self.optimizers[k], eps=self.eps)


@dataclass(frozen=True)
class StepsSketched(Projected, ABC):
    """``Sketched`` of what an optimiser makes of the gradient instead."""

    @abstractmethod
    def steps(self, parameter: str, gradients: Tensor) -> Tensor:
        """(B, *shape) -> the same, of each sample's gradient."""

    def __call__(self, parameter: str, gradient: PerSampleGradient) -> Tensor:
        samples = max(1, _ELEMENTS // math.prod(self.shapes[parameter]))
        return torch.cat([self._sketched(parameter, part.dense()) for part in gradient.split(samples)])

    def _sketched(self, parameter: str, gradients: Tensor) -> Tensor:
        made = self.steps(parameter, gradients)
        if self.keeps(parameter):
            return made.reshape(len(made), -1)
        return Dense(made).sketch(self.sketch.named(parameter), self.shapes[parameter])


@dataclass(frozen=True, kw_only=True)
class AdamSketched(StepsSketched):
    """Of the Adam step: no multiple of it is that of the gradient's multiple."""

    state: AdamState
    eps: Literal["outside", "inside"]

    def steps(self, parameter: str, gradients: Tensor) -> Tensor:
        return self.state.step(parameter, gradients, self.eps)

    def at_zero(self, parameter: str) -> Tensor:
        """(sketch.dim,): a parameter without a gradient is moved by the moments all the same."""
        moment = self.state.first[parameter]
        return self._sketched(parameter, wide(torch.zeros_like(moment))[None])[0]
