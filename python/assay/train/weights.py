"""Scores of a global batch -> weights, whose mean is 1."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

Mode = Literal["reweight", "filter", "observe"]


def softmax_weights(scores: Tensor, temperature: float) -> Tensor:
    """B · softmax(score / temperature) over the samples with a score; 0 where there is none (2501.06708, stage 1).

    Args:
        scores: (B,), NaN where there is none.
        temperature: in units of the score; the larger, the closer all weights are to 1.
    """
    logits = (scores.double() / temperature).masked_fill(scores.isnan(), -math.inf)
    return logits.softmax(0) * len(scores)


def best_share(scores: Tensor, keep: float) -> Tensor:
    """B / n for the n = ⌈keep · B⌉ samples with the highest scores, of equal ones the first; 0 for the others.

    Args:
        scores: (B,), NaN where there is none; such a sample is never kept.
        keep: in (0, 1].
    """
    unknown = scores.isnan()
    count = min(int((~unknown).sum()), max(1, math.ceil(keep * len(scores) - 1e-9)))
    order = scores.double().masked_fill(unknown, 0).argsort(descending=True, stable=True)
    best = order[unknown[order].argsort(stable=True)][:count]  # behind the worst score, −inf too
    weights = torch.zeros(len(scores), dtype=torch.float64, device=scores.device)
    weights[best] = len(scores) / max(count, 1)
    return weights


def gathered(values: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, slice]:
    """Every rank's rows, in the order of the ranks, and where this rank's are.

    Args:
        values: (B, n); B may differ by rank.
        group: None: the default group, or this process alone if there is none.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return values, slice(0, len(values))
    size = torch.tensor([len(values)], device=values.device)
    sizes = [torch.empty_like(size) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, size, group=group)
    counts = [int(count) for count in sizes]
    padded = values.new_zeros(max(counts), *values.shape[1:])
    padded[: len(values)] = values
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded, group=group)
    start = sum(counts[: dist.get_rank(group)])
    rows = torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
    return rows, slice(start, start + len(values))
