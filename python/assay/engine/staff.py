"""What a crew asks of those who work for it: processes of this machine, or actors of a cluster."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar


class Hand(Protocol):
    """One worker, from when it was hired. It hears a ``Setup`` first, then ``Unit``s, and at last None."""

    place: str
    """Where it works, for messages; another one is hired there if it dies."""
    device: str
    """On which it computes."""

    def tell(self, message: Any) -> None:
        """Send it something. That it has died shows where its words are waited for."""

    def hear(self) -> Any:
        """Its next word, which ``wait`` said is there; None if it has died."""

    def end_of(self) -> tuple[str, bool]:
        """How it died, and whether it may have been an accident, after which another one is worth a try."""


H = TypeVar("H", bound=Hand)


class Staff(Protocol[H]):
    """Hires workers and listens to them."""

    sees_local_files: bool
    """Whether they find what lies in a temporary folder here."""
    advice: str
    """What is to be said of a worker that cannot start."""

    @property
    def keeps(self) -> int | None:
        """How many stay to the end, also if no unit is left for them; None: all."""

    def hire(self, place: str) -> H:
        """Start one. EngineError if there can be none."""

    def wait(self, hands: Sequence[H], seconds: float) -> Sequence[H]:
        """Those who have something to say; after so many seconds perhaps none."""

    def let_go(self, hand: H) -> None:
        """End one that has nothing to do, where not all stay."""

    def dismiss(self) -> None:
        """Let those who were hired end by themselves."""

    def end(self) -> None:
        """See that none of them is left."""
