"""Targets: what a method is asked about, and the columns that follow from their names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from assay.methods.base import Column
from assay.methods.parts import State, states
from assay.methods.sums import Folded, Sums, Total

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
        self, run: Callable[[Sums, Iterable[Any]], Folded], parameters: Sequence[str]
    ) -> tuple[dict[str, dict[str, Tensor]], Folded]:
        """The mean gradient of each target's samples in the parameters that the loss reaches: of those with a loss, and
        a finite gradient there.

        Args:
            run: adds every batch's gradients to a ``Sums``.
            parameters: by name.

        Returns:
            By target: by parameter, of the parameter's shape; and what all targets' samples are.

        Raises:
            ValueError: a target without samples, without a loss and a finite gradient in one of the parameters, or
                whose gradients' sum is not finite.
        """
        gradients: dict[str, dict[str, Tensor]] = {}
        whole = Folded()
        for target, batches in self.batches.items():
            total, what = Total(parameters), f"{self.name}: target {target!r}"
            folded = run(total, batches)
            folded.check(what, parameters)
            whole.join(folded.state())
            gradients[target] = {name: g / folded.count(name) for name, g in total.sums.items()}
            if not all(bool(g.isfinite().all()) for g in gradients[target].values()):
                raise ValueError(
                    f"{what} has finite gradients whose sum is not; give it fewer samples, or a wider model"
                )
        each = {
            target: {name: g for name, g in by_name.items() if name not in whole.left_out}
            for target, by_name in gradients.items()
        }
        return each, whole

    def means(
        self, features: Callable[[Iterable[Any], Folded], Iterable[Tensor]], given: State = None
    ) -> tuple[Tensor, Folded]:
        """The mean feature of each target's samples, of those whose feature is finite.

        Args:
            features: batches -> (B, size) of each; the second argument counts the samples, as ``features_of`` does.
            given: as in ``parts.states``.

        Returns:
            (targets, size) float64; and what all targets' samples are.

        Raises:
            ValueError: a target without samples, or without a finite one.
        """

        def part(batches: Iterable[Any], first: int) -> State:
            folded = Folded()
            each = [found.double() for found in features(batches, folded)]
            whole = torch.cat(each) if each else torch.empty(0, 0)
            finite = whole[whole.isfinite().all(1)]
            return {"sum": finite.sum(0), "finite": len(finite), "folded": folded.state()}

        means, whole = [], Folded()
        for name, batches in self.batches.items():
            parts = list(states(batches, part, given))
            finite, folded = sum(state["finite"] for state in parts), Folded()
            for state in parts:
                folded.join(state["folded"])
            if not folded.samples:
                raise ValueError(f"{self.name}: target {name!r} has no samples")
            if not finite:
                raise ValueError(
                    f"{self.name}: none of target {name!r}'s {folded.samples} samples has a finite gradient"
                )
            means.append(sum(state["sum"] for state in parts if state["finite"]) / finite)
            whole.join(folded.state())
        return torch.stack(means), whole
