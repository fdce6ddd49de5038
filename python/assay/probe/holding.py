"""Per-sample gradients on their way into ``.grad``: held until their samples' weights are known, or summed at once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from assay.probe.gradient import PerSampleGradient

Sums = dict[str, Callable[[], Tensor]]
"""What makes the sum of a parameter's gradients over samples, once, by its name."""


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

    def sums(self, factors: Tensor) -> Sums:
        """Σ_b factors_b · gradient of sample b."""
        return {name: partial(gradient.weighted, factors) for name, gradient in self.gradients.items()}


@dataclass
class Summed:
    """A reduction that adds the samples' gradients up as they come, and gives zeros."""

    parameters: Collection[str]
    like: Tensor  # (B,)
    totals: dict[str, Tensor] = field(default_factory=dict)
    degree: ClassVar[int] = 1

    def __call__(self, parameter: str, gradient: PerSampleGradient) -> Tensor:
        self.totals[parameter] = gradient.weighted(torch.ones_like(self.like))
        return torch.zeros_like(self.like)

    def by_rows(self, parameter: str, gradient: PerSampleGradient) -> Tensor:
        self.totals[parameter] = gradient.empty()
        return self.totals[parameter]

    def sums(self, factors: Tensor) -> Sums:
        """Σ_b gradient of sample b: all factors are 1."""
        return {name: partial(self.totals.pop, name) for name in self.totals}


def add_to_grad(sums: Sequence[tuple[nn.Parameter, Callable[[], Tensor]]]) -> None:
    """Add sums to parameters' ``.grad``, with all hooks that a backward pass runs.

    Each sum is made when autograd asks for it, and ``.grad`` takes it without a copy, for nobody else holds it.
    """
    with torch.enable_grad():
        nodes = [_Constant.apply(parameter, make) for parameter, make in sums]  # type: ignore[no-untyped-call]
    if nodes:
        torch.autograd.backward(nodes)


class _Constant(torch.autograd.Function):
    """A constant, to whose gradient in a parameter the sum is put."""

    @staticmethod
    def forward(ctx: Any, parameter: nn.Parameter, make: Callable[[], Tensor]) -> Tensor:
        ctx.make, ctx.place = make, (parameter.device, parameter.dtype)
        return parameter.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return ctx.make().to(*ctx.place), None
