"""What a probe is to take from one forward pass, task by task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from assay.probe.jvp import Jvp
from assay.probe.reductions import Feature, Reduction, TokenDot
from assay.tasks import Task


@dataclass(frozen=True)
class Reading:
    """What is wanted of one task's losses."""

    task: Task
    reductions: Mapping[str, Reduction]
    jvps: Mapping[str, Jvp]

    @classmethod
    def of(cls, task: Task, reductions: Mapping[str, Reduction | Jvp]) -> Reading:
        plain = {key: r for key, r in reductions.items() if not isinstance(r, Jvp)}
        return cls(task, plain, {key: r for key, r in reductions.items() if isinstance(r, Jvp)})

    def nothing(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The losses and the reductions of a batch without samples."""
        none = torch.zeros(0)
        widths = {key: (r.size,) if isinstance(r, Feature) else () for key, r in self.reductions.items()}
        widths |= {key: (0,) for key, r in self.reductions.items() if isinstance(r, TokenDot)}
        return none, {key: none.new_zeros(0, *width) for key, width in widths.items()}


def all_parameters(kept: Sequence[str], readings: Sequence[Reading]) -> list[str]:
    """Every parameter that is to be tapped, once."""
    names = dict.fromkeys(kept)
    for key, reduction in (item for reading in readings for item in reading.reductions.items()):
        if not reduction.parameters:
            raise ValueError(f"reduction {key!r} names no parameter, so that it would always be 0")
        names.update(dict.fromkeys(reduction.parameters))
    return list(names)
