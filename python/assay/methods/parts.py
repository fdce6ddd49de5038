"""Fits in parts: what each part of the batches gives, whoever made it, is added up in the parts' order.

Which samples make a part is a matter of the samples alone. So whatever number of workers share the parts, and whichever
were made before a run was killed, the same numbers are added in the same order, and their sum has the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

State = Any
"""What a part gives: tensors, numbers and texts, in dicts and lists."""
Make = Callable[[Iterable[Any], int], State]
"""A part's batches, and how many samples are in the parts before it -> its state."""


@runtime_checkable
class Parted(Protocol):
    """Batches that come in parts, and are gone through as often as one likes."""

    def __iter__(self) -> Iterator[Any]: ...

    def states(self, make: Make, given: State) -> Iterator[State]:
        """As the function ``states``."""
        ...


def states(batches: Iterable[Any], make: Make, given: State = None) -> Iterator[State]:
    """What ``make`` gives for every part of the batches, in the parts' order.

    Args:
        batches: in parts if they are ``Parted``, as a recipe's are; any other iterable is one part.
        make: runs here or in another worker, which calls ``fit`` of a method that was made alike. What it gives follows
            from its arguments, the method's constructor and ``given``, and not from other parts.
        given: what it uses that earlier parts gave. States that were made with other bits are not taken.
    """
    return batches.states(make, given) if isinstance(batches, Parted) else iter((make(batches, 0),))


def kept(batches: Iterable[Any]) -> Parted | Sequence[Any]:
    """The batches, as something that can be gone through several times."""
    return batches if isinstance(batches, Parted) else list(batches)
