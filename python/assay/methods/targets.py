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
    ) -> tuple[dict[str, dict[str, Tensor]], dict[str, str]]:
        """The mean gradient of each target's samples in the parameters that the loss reaches: of those with a loss, and
        a finite gradient there.

        Args:
            run: adds every batch's gradients to a ``Sums``.
            parameters: by name.

        Returns:
            By target: by parameter, of the parameter's shape; and the parameters that could not be tapped.

        Raises:
            ValueError: a target without samples, without a loss and a finite gradient in one of the parameters, or
                whose gradients' sum is not finite.
        """
        gradients: dict[str, dict[str, Tensor]] = {}
        left_out: dict[str, str] = {}
        for target, batches in self.batches.items():
            total, what = Total(parameters), f"{self.name}: target {target!r}"
            folded = run(total, batches)
            folded.check(what, parameters)
            left_out |= folded.left_out
            gradients[target] = {name: g / folded.count(name) for name, g in total.sums.items()}
            if not all(bool(g.isfinite().all()) for g in gradients[target].values()):
                raise ValueError(
                    f"{what} has finite gradients whose sum is not; give it fewer samples, or a wider model"
                )
        each = {t: {name: g for name, g in by_name.items() if name not in left_out} for t, by_name in gradients.items()}
        return each, left_out

    def means(
        self, features: Callable[[Iterable[Any], dict[str, str]], Iterable[Tensor]], given: State = None
    ) -> tuple[Tensor, dict[str, str]]:
        """The mean feature of each target's samples, of those whose feature is finite.

        Args:
            features: batches -> (B, size) of each; what could not be tapped, with the reason, goes into the second
                argument.
            given: as in ``parts.states``.

        Returns:
            (targets, size) float64; and what could not be tapped.

        Raises:
            ValueError: a target without samples, or without a finite one.
        """

        def part(batches: Iterable[Any], first: int) -> State:
            left_out: dict[str, str] = {}
            each = [found.double() for found in features(batches, left_out)]
            whole = torch.cat(each) if each else torch.empty(0, 0)
            finite = whole[whole.isfinite().all(1)]
            return {"sum": finite.sum(0), "finite": len(finite), "samples": len(whole), "left_out": left_out}

        means, left_out = [], dict[str, str]()
        for name, batches in self.batches.items():
            parts = list(states(batches, part, given))
            finite, samples = (sum(state[key] for state in parts) for key in ("finite", "samples"))
            if not samples:
                raise ValueError(f"{self.name}: target {name!r} has no samples")
            if not finite:
                raise ValueError(f"{self.name}: none of target {name!r}'s {samples} samples has a finite gradient")
            means.append(sum(state["sum"] for state in parts if state["finite"]) / finite)
            for state in parts:
                left_out |= state["left_out"]
        return torch.stack(means), left_out
