"""What a method is: the signals it needs, the columns it gives, and the formula between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor, nn

from assay.probe import Jvp, Reduction, Signals
from assay.tasks import Task

Keep = Literal["high", "low", "none"]


@dataclass(frozen=True)
class Column:
    """One score: its name in the table, the end worth training on, and one line that says what it is.

    ``keep`` is ``"high"`` or ``"low"``; ``"none"`` marks a score that says nothing about worth on its own (an
    entropy never saw the label).
    """

    name: str
    keep: Keep
    description: str


@dataclass(frozen=True)
class Need:
    """What a method wants to know about one model on every batch. Losses always come.

    ``reductions`` are folded while the backward pass runs; without any, there is no backward pass. Those of the kind
    ``Jvp`` come from the forward pass alone. ``layers`` and ``skip_unsupported`` are what their parameters were
    selected with, and whether a layer that turns out not to be tapped may be left out.
    """

    model: nn.Module
    task: Task
    logits: bool = False
    reductions: Mapping[str, Reduction | Jvp] = field(default_factory=dict)
    layers: str | Sequence[str] | None = None
    skip_unsupported: bool = False


@runtime_checkable
class Method(Protocol):
    """Scores samples from signals. It cannot tell whether a corpus run or a trainer made them."""

    name: str

    @property
    def columns(self) -> Sequence[Column]:
        """The scores, in the order of the table."""
        ...

    def needs(self) -> Mapping[str, Need]:
        """Role -> what to run. The same roles key the signals that ``score`` gets."""
        ...

    def score(self, signals: Mapping[str, Signals]) -> dict[str, Tensor]:
        """Signals by role -> a (B,) tensor per column name."""
        ...

    def metadata(self) -> dict[str, str]:
        """Facts and warnings about what was scored so far, for the table's footer."""
        ...
