"""Where a value that all samples share enters the graph, and what is said of one that cannot be followed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from assay.probe.terms import Dense, Term, sum_of


def _nothing() -> None: ...


@dataclass(eq=False)
class Start:
    """A tensor whose gradient is wanted for every sample: a bare parameter, or a layer's output.

    Attributes:
        value: where it enters the graph.
        what: its name, and how it was found, for messages.
        parameters: the names of those that are tapped by it.
        obstacle: the first use that could not be followed.
        terms: gradients of single uses as a layer's weight.
        grads: (B, *shape), everything else summed; None where the losses do not depend on it.
        uses: how often it is a layer's weight.
        loose: whether it is used in other ways too, or something that was computed from it is.
        waiting: the uses whose gradient has not come yet.
        complete: called when all have, unless it is loose.
    """

    value: Tensor
    what: str
    parameters: tuple[str, ...]
    obstacle: str | None = None
    terms: list[Term] = field(default_factory=list)
    grads: Tensor | None = None
    uses: int = 0
    loose: bool = False
    waiting: int = 0
    complete: Callable[[], None] = field(default=_nothing)

    def reset(self) -> None:
        self.terms, self.grads, self.waiting = [], None, self.uses

    def close(self) -> None:
        """Let go of the gradients, and of whom to call."""
        self.terms, self.grads, self.complete = [], None, _nothing

    def take(self, term: Term) -> None:
        self.terms.append(term)
        self.waiting -= 1
        if self.waiting == 0 and not self.loose:
            self.complete()

    def all_grads(self) -> Tensor | None:
        """``grads`` with those of the uses as a weight multiplied out: what a layer's formula takes."""
        return sum_of([term.dense(self.value.shape) for term in self.all_terms()]) if self.terms else self.grads

    def all_terms(self) -> list[Term]:
        return [*self.terms, *([] if self.grads is None else [Dense(self.grads)])]


def untapped(what: str, why: str) -> str:
    """The message for a layer or a parameter that cannot be tapped as the model uses it."""
    return (
        f"{what}: {why}. To know which sample a gradient belongs to, a layer's first dimension must be the batch's, or "
        "what it gives must be spread over the batch by a sum, a product or expand(). Leave it out "
        "(layers=['*', '!name']), or pass skip_unsupported=True"
    )


def coincidences(shape: Sequence[int], size: int) -> tuple[int, ...]:
    """The dimensions that are as long as the batch: any of them may be the batch's."""
    return tuple(axis for axis, n in enumerate(shape) if n == size)


def broadcast(tensors: Sequence[Tensor]) -> torch.Size:
    shape: torch.Size = torch.broadcast_shapes(*(x.shape for x in tensors))  # type: ignore[no-untyped-call]
    return shape
