"""Where a run's time goes: measured in a few places with a clock that costs nothing beside them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields


@dataclass
class Times:
    """Seconds of a run's parts; those of several workers add up.

    ``read`` and ``encode`` pass on a thread of their own, while the others go on; ``wait`` is how long scoring waited
    for that thread.
    """

    load: float = 0.0
    """Loading models and fitting methods."""
    read: float = 0.0
    """Files, and what decodes them."""
    encode: float = 0.0
    """Rows to samples: checks, tokens, pixels."""
    wait: float = 0.0
    collate: float = 0.0
    """Samples to batches."""
    model: float = 0.0
    """The models' forward and backward passes, with the reductions of gradients that are made during them."""
    ops: float = 0.0
    """The methods' formulas of what the models gave; for a fused language model its output layer is among them."""
    write: float = 0.0
    total: float = 0.0

    def add(self, other: Times) -> None:
        """Add another's seconds."""
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Add to one part what the block takes."""
        began = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, part, getattr(self, part) + time.perf_counter() - began)

    @property
    def bottleneck(self) -> str:
        """What the run would be faster without: the largest of what did not pass beside something else."""
        behind = "read" if self.read >= self.encode else "prepare"
        prepare = self.collate + (self.wait if behind == "prepare" else 0.0)
        parts = {"load": self.load, "read": self.wait if behind == "read" else 0.0, "prepare": prepare}
        parts |= {"model": self.model, "ops": self.ops, "write": self.write}
        return max(parts, key=lambda part: parts[part])

    def line(self, workers: int = 1) -> str:
        """All of it on one line; of several workers the sum."""
        parts = {"load": self.load, "read": self.read, "prepare": self.encode + self.collate}
        parts |= {"model": self.model, "ops": self.ops, "write": self.write, "waiting for rows": self.wait}
        listed = ", ".join(f"{part} {seconds:.1f}" for part, seconds in parts.items())
        where = f" in {workers} workers" if workers > 1 else ""
        return f"time: {self.total:.1f} s{where}: {listed}; the bottleneck was {_BOTTLENECKS[self.bottleneck]}"


_BOTTLENECKS = {
    "load": "loading and fitting",
    "read": "reading",
    "prepare": "preparing rows",
    "model": "the model",
    "ops": "the methods' formulas",
    "write": "writing",
}
