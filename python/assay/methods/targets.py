"""Targets: what a method is asked about, and the columns that follow from their names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from assay.methods.base import Column
from assay.probe import PerSampleGradient, Reduction

Targets = Mapping[str, Iterable[Any]]
"""Batches of the task, by the target's name; gone through several times, so lists rather than generators."""


@dataclass(frozen=True)
class TargetSet:
    """A method's targets, and the scores towards them: one column each, and one for all of them.

    Attributes:
        name: of the column for all, and prefix of the others.
        batches: by the target's name.
        across: how the targets' scores make the one for all.
    """

    name: str
    batches: Targets
    across: Literal["mean", "max"] = "mean"

    def __post_init__(self) -> None:
        object.__setattr__(self, "batches", dict(self.batches))

    def __len__(self) -> int:
        return len(self.batches)

    def __str__(self) -> str:
        return ", ".join(self.batches)

    def required(self) -> TargetSet:
        """These, if there is one at least; else a ValueError."""
        if not self.batches:
            raise ValueError(f"{self.name}: expected at least one target, got none")
        return self

    def columns(self, kind: str) -> list[Column]:
        """The columns of ``scores``; ``kind`` is what their descriptions begin with."""
        each = [Column(f"{self.name}_{t}", "high", f"{kind} on target {t}") for t in self.batches]
        if len(each) < 2:
            return [Column(self.name, "high", column.description) for column in each]
        return [Column(self.name, "high", f"{kind}, {self.across} over the targets"), *each]

    def scores(self, each: Tensor) -> dict[str, Tensor]:
        """(B, targets) -> (B,) per column."""
        if len(self) == 1:
            return {self.name: each[:, 0]}
        together = each.amax(1) if self.across == "max" else each.mean(1)
        return {self.name: together, **{f"{self.name}_{t}": each[:, i] for i, t in enumerate(self.batches)}}

    def gradients(
        self, run: Callable[[Reduction, Iterable[Any]], int], parameters: Collection[str]
    ) -> dict[str, dict[str, Tensor]]:
        """The mean gradient of each target's samples in the parameters that the loss reaches, of those whose gradient
        there is finite.

        Args:
            run: folds every batch's gradients with a reduction -> the number of samples.
            parameters: by name.

        Returns:
            By target: by parameter, of the parameter's shape.

        Raises:
            ValueError: a target without samples, or without a finite gradient in one of the parameters.
        """
        gradients = {}
        for target, batches in self.batches.items():
            total = _Total(parameters)
            count = run(total, batches)
            if not count or any(left_out >= count for left_out in total.left_out.values()):
                why = "has no samples with a finite gradient" if count else "has no samples"
                raise ValueError(f"{self.name}: target {target!r} {why}")
            gradients[target] = {name: g / (count - total.left_out[name]) for name, g in total.sums.items()}
        return gradients

    def means(self, features: Callable[[Any], Tensor]) -> Tensor:
        """The mean feature of each target's samples, of those whose feature is finite.

        Args:
            features: batch -> (B, size).

        Returns:
            (targets, size) float64.

        Raises:
            ValueError: a target without samples, or without a finite one.
        """
        means = []
        for name, batches in self.batches.items():
            parts = [features(batch).double() for batch in batches]
            if not parts:
                raise ValueError(f"{self.name}: target {name!r} has no samples")
            whole = torch.cat(parts)
            if not len(finite := whole[whole.isfinite().all(1)]):
                raise ValueError(f"{self.name}: none of target {name!r}'s {len(whole)} samples has a finite gradient")
            means.append(finite.mean(0))
        return torch.stack(means)


@dataclass
class _Total:
    """A reduction that adds the gradients up over samples."""

    parameters: Collection[str]
    sums: dict[str, Tensor] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)  # samples without a finite gradient

    def __call__(self, parameter: str, gradient: PerSampleGradient) -> Tensor:
        total, finite = gradient.total()
        self.left_out[parameter] += int((~finite).sum())
        self.sums[parameter] = self.sums[parameter] + total if parameter in self.sums else total
        return torch.zeros(gradient.samples)
