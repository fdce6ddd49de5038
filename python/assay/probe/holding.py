"""Per-sample gradients that wait until their samples' weights are known, and their way into ``.grad``."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from assay.probe.gradient import PerSampleGradient


@dataclass
class Held:
    """A reduction that keeps the per-sample gradients themselves, as factors, and gives zeros."""

    parameters: Collection[str]
    like: Tensor  # (B,)
    gradients: dict[str, PerSampleGradient] = field(default_factory=dict)
    degree: ClassVar[int] = 1  # they are held as they come

    def __call__(self, parameter: str, gradient: PerSampleGradient) -> Tensor:
        self.gradients[parameter] = gradient
        return torch.zeros_like(self.like)  # where the losses are: no copy to a GPU has to be waited for


def add_weighted(gradients: Sequence[tuple[nn.Parameter, PerSampleGradient]], factors: Tensor) -> None:
    """Add Σ_b factors_b · gradient of sample b to parameters' ``.grad``, with all hooks that a backward pass runs.

    Each sum is made when autograd asks for it, and ``.grad`` takes it without a copy, for nobody else holds it.
    """
    with torch.enable_grad():
        nodes = [_Summed.apply(parameter, gradient, factors) for parameter, gradient in gradients]  # type: ignore[no-untyped-call]
    if nodes:
        torch.autograd.backward(nodes)


class _Summed(torch.autograd.Function):
    """A constant, to whose gradient in a parameter the weighted sum is put."""

    @staticmethod
    def forward(ctx: Any, parameter: nn.Parameter, gradient: PerSampleGradient, factors: Tensor) -> Tensor:
        ctx.make, ctx.place = partial(gradient.weighted, factors), (parameter.device, parameter.dtype)
        return parameter.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return ctx.make().to(*ctx.place), None, None
