"""Sums of whole gradients over samples, and what is made of one sample's: what takes them without a projection."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from assay.probe import PerSampleGradient, Probe
from assay.tasks import Sampled, Task


@dataclass
class Sums(ABC):
    """A feature that adds something of the gradients up over samples, and marks those that it could not add.

    Attributes:
        parameters: by name; sample b has a 1 in a parameter's place where its gradient there was left out, else 0.
    """

    parameters: Sequence[str]

    def __post_init__(self) -> None:
        self._places = {name: slice(i, i + 1) for i, name in enumerate(self.parameters)}

    @property
    def size(self) -> int:
        return len(self.parameters)

    def place(self, parameter: str) -> slice:
        return self._places[parameter]

    def __call__(self, parameter: str, gradient: PerSampleGradient) -> Tensor:
        return (~self.add(parameter, gradient))[:, None].float()

    @abstractmethod
    def add(self, parameter: str, gradient: PerSampleGradient) -> Tensor:
        """Add the samples with a finite gradient -> which those are, (B,) bool."""


@dataclass
class Total(Sums):
    """The gradients' own sum, by parameter."""

    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, parameter: str, gradient: PerSampleGradient) -> Tensor:
        total, finite = gradient.total()
        self.sums[parameter] = self.sums[parameter] + total if parameter in self.sums else total
        return finite


@dataclass
class Folded:
    """The samples that a ``Sums`` has seen.

    Attributes:
        samples: all of them.
        with_loss: those with something to predict that can be; the gradient of another is 0, or not finite.
        broken: by parameter, those of ``with_loss`` whose gradient in it was left out.
        left_out: parameters that could not be tapped, with the reason.
    """

    samples: int = 0
    with_loss: int = 0
    broken: Counter[str] = field(default_factory=Counter)
    left_out: dict[str, str] = field(default_factory=dict)

    def count(self, parameter: str) -> int:
        """The samples that a mean over the parameter's gradients is of."""
        return self.with_loss - self.broken[parameter]

    def check(self, what: str, parameters: Iterable[str]) -> None:
        """ValueError if nothing was seen, or nothing finite in one of the parameters."""
        if not self.samples:
            raise ValueError(f"{what} has no samples")
        if all(map(self.count, parameters)) and self.with_loss:
            return
        raise ValueError(
            f"{what} has no samples with a finite gradient: of {self.samples}, {self.with_loss} have a loss"
        )


def fold(
    model: nn.Module,
    task: Task,
    sums: Sums,
    batches: Iterable[Any],
    *,
    skip_unsupported: bool,
    drawn: int | None = None,
) -> Folded:
    """Run the model over the batches and add their gradients to ``sums``.

    Args:
        drawn: with labels drawn from the model by this seed, the same whenever the same samples come, in whatever
            batches; None: with their own.
    """
    folded = Folded()
    probe = Probe(model, task, reductions={"sums": sums}, logits=False, skip_unsupported=skip_unsupported)
    for batch in batches:
        if drawn is not None:
            probe.task = Sampled(task, drawn, first=folded.samples)
        signals = probe(batch)
        with_loss = ~signals.losses.isnan()
        folded.samples += len(with_loss)
        folded.with_loss += int(with_loss.sum())
        broken = signals.reduced["sums"][with_loss].sum(0, dtype=torch.long).tolist()
        folded.broken.update(dict(zip(sums.parameters, broken, strict=True)))
    folded.left_out = probe.left_out
    return folded


def cosines(dots: Tensor, sqnorm: Tensor) -> Tensor:
    """⟨g, direction⟩ / ‖g‖ of samples' gradients: 0 where g is 0, NaN where ‖g‖² is beyond its type.

    Args:
        dots: (B, ...), with directions of length 1.
        sqnorm: ‖g‖² (B,).
    """
    norm = sqnorm.sqrt().view(-1, *[1] * (dots.ndim - 1))
    quotients = torch.where((norm == 0) & (dots == 0), 0.0, dots / norm)
    return quotients.masked_fill(norm.isinf() | quotients.isinf(), torch.nan)
