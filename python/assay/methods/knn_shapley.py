"""KNN-Shapley: what is each sample of a pool worth to a nearest-neighbour classifier of the targets?

*Efficient Task-Specific Data Valuation for Nearest Neighbor Algorithms*, 1908.08619.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from assay.methods.embedding import unit
from assay.ops import scan_scores
from assay.tasks.base import IGNORE

Blocks = Iterable[tuple[Tensor, Tensor]]
"""(b, D) embeddings and (b,) classes, block after block; gone through twice, so a list rather than a generator."""

# So many cosines are made at once.
_COSINES = 1 << 22


def knn_shapley(
    blocks: Blocks, targets: Tensor, target_labels: Tensor, k: int = 10, *, exact: int = 1024, bins: int = 4096
) -> Tensor:
    """The Shapley values of a pool's samples in the game whose utility is the k-NN classifier's confidence: keep high.

    The utility of a subset for one target is the share, of k, that those of its (at most k) nearest samples are which
    have the target's class; values are means over the targets and sum to the whole pool's utility. Samples as near as
    one another are in random order, and values are the expectation over it: copies are worth the same. With i the rank
    by distance, c_i = 1/max(i, k) and m_i whether the classes match, s_i = c_i m_i − Σ_{j > i} (c_{j−1} − c_j) m_j
    (theorem 1).

    A value follows from its sample's rank in the *whole* pool, so this is no method that scores one sample after the
    other: it is a function of the pool's embeddings, those that ``keep_features`` stored for instance, read twice. For
    each target are held the ``exact`` nearest and a histogram of the others, 32 · (exact + bins) bytes: those in one of
    its bins count as equally near. They are beyond rank ``exact``, where no value is larger than 1/exact; a pool of at
    most that many samples has exact values.

    Args:
        blocks: the pool's embeddings and classes. Nearness is the cosine.
        targets: (M, D) embeddings.
        target_labels: (M,) classes.
        k: neighbours that vote.
        exact: ranks held for each target.
        bins: of the cosines beyond.

    Returns:
        (N,) float64 on the CPU, in the blocks' order. NaN for a sample without a class (NaN or −100), or whose
        embedding is 0 or not finite: it takes no part. Such targets are left out.

    Raises:
        TypeError: blocks that can be gone through only once.
        ValueError: no target or no sample that is finite, shapes that do not fit, or a number below 1.
    """
    for name, value in (("k", k), ("exact", exact), ("bins", bins)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"knn_shapley: {name}: expected a whole number of at least 1, got {value!r}")
    if isinstance(blocks, Iterator):
        raise TypeError("knn_shapley: blocks: expected what can be gone through twice, such as a list, got an iterator")
    queries, classes = _valid("targets", targets, target_labels)
    if not len(queries):
        raise ValueError(f"knn_shapley: none of {len(targets)} targets has a class and a direction")
    seen = _Seen(queries, classes, exact, bins)
    for cosines, matches in _pairs(blocks, queries, classes):
        seen.add(cosines, matches)
    if not seen.samples:
        raise ValueError("knn_shapley: no sample of the pool has a class and a direction")
    worth = seen.worth(k)
    values = []
    for features, labels in blocks:
        own = torch.full((len(features),), torch.nan, dtype=torch.float64)
        found = [worth.of(*pair).cpu() for pair in _pairs([(features, labels)], queries, classes)]
        if found:
            own[_taking_part(features, labels).cpu()] = torch.cat(found)
        values.append(own)
    return torch.cat(values)


@dataclass
class _Worth:
    """What a sample is worth to a target, by its cosine.

    Attributes:
        nearest: (M, E) ascending cosines of the near samples, no two the same, then infinities.
        cut: (M, 1): cosines up to it are in bins.
        values: (M, E + bins, 2) of samples of another class, and of the target's.
    """

    nearest: Tensor
    cut: Tensor
    values: Tensor
    bins: int

    def of(self, cosines: Tensor, matches: Tensor) -> Tensor:
        """(M, b) both -> (b,), the mean over the targets."""
        place = torch.where(
            cosines > self.cut,
            torch.searchsorted(self.nearest, cosines),
            self.nearest.shape[1] + _bin(cosines, self.bins),
        )
        either = self.values.flatten(1).gather(1, 2 * place + matches)
        return either.mean(0)


class _Seen:
    """What the first pass learns of the pool: for each target the nearest samples, and how many are in which bin."""

    def __init__(self, queries: Tensor, classes: Tensor, exact: int, bins: int) -> None:
        self.samples, self._exact, self._bins = 0, exact, bins
        self._nearest = queries.new_empty(len(queries), 0)
        self._match = torch.empty(len(queries), 0, dtype=torch.bool, device=queries.device)
        self._counts = torch.zeros(2, len(queries), bins, dtype=torch.long, device=queries.device)  # others', matches

    def add(self, cosines: Tensor, matches: Tensor) -> None:
        """(M, b) cosines, and whether the classes are the same."""
        self.samples += cosines.shape[1]
        self._count(cosines, matches, 1)
        nearest, match = torch.cat([self._nearest, cosines], 1), torch.cat([self._match, matches], 1)
        self._nearest, order = nearest.topk(min(self._exact, nearest.shape[1]), 1)
        self._match = match.gather(1, order)

    def _count(self, cosines: Tensor, matches: Tensor, times: int | Tensor) -> None:
        place = _bin(cosines, self._bins)
        for counts, which in zip(self._counts, (~matches, matches), strict=True):
            counts.scatter_add_(1, place, which.long() * times)

    def worth(self, k: int) -> _Worth:
        """From now on no sample can be added."""
        cut = self._nearest[
            :, -1:
        ].contiguous()  # of samples as near as the last, not all need be held: they are binned
        inside = self._nearest > cut
        self._count(self._nearest, self._match, -inside.long())
        width = self._nearest.shape[1]
        nearest = torch.full_like(self._nearest, torch.inf)
        values = self._counts.new_zeros(len(cut), width + self._bins, 2, dtype=torch.float64)
        for t, own in enumerate(inside):
            distinct, which = torch.unique(self._nearest[t, own], return_inverse=True)
            near = torch.zeros(2, len(distinct), dtype=torch.long, device=cut.device)
            near.index_put_((self._match[t, own].long(), which), torch.ones_like(which), accumulate=True)
            nearest[t, : len(distinct)] = distinct
            groups = torch.cat([self._counts[:, t], near], 1).flip(1)  # from the nearest group to the farthest
            worth = _group_values(groups[0] + groups[1], groups[1], k).flip(0)
            values[t, width:], values[t, : len(distinct)] = worth[: self._bins], worth[self._bins :]
        return _Worth(nearest, cut, values, self._bins)


def _group_values(sizes: Tensor, matches: Tensor, k: int) -> Tensor:
    """Values by group of equally near samples, from the nearest to the farthest group.

    Args:
        sizes: (G,) samples of each group.
        matches: (G,) those of the target's class among them.

    Returns:
        (G, 2) float64: of a sample of another class, and of the target's.
    """
    last = sizes.cumsum(0)
    first = last - sizes  # ranks first + 1 … last are the group's
    ends, starts = (1 / ranks.clamp(min=k).double() for ranks in (last, first))  # c_i
    sizes, matches = sizes.double(), matches.double()
    mean = torch.where(sizes == 1, ends, (_sums(last, k) - _sums(first, k)) / sizes.clamp(min=1))
    lost = matches / sizes.clamp(min=1) * (starts - ends)
    behind = lost.flip(0).cumsum(0).flip(0) - lost
    each = []
    for own in (0.0, 1.0):
        others = (matches - own).clamp(min=0) / (sizes - 1).clamp(min=1)  # of the target's class, among the other ones
        each.append(own * mean - others * (mean - ends) - behind)
    return torch.stack(each, 1)


def _sums(ranks: Tensor, k: int) -> Tensor:
    """Σ c_i over i ≤ rank, float64; c_i = 1/max(i, k)."""
    within = ranks.clamp(max=k).double() / k
    beyond: Tensor = torch.special.digamma(ranks.clamp(min=k).double() + 1)
    beyond -= torch.special.digamma(within.new_tensor(k + 1.0))
    return within + beyond


def _bin(cosines: Tensor, bins: int) -> Tensor:
    return ((cosines + 1) * (bins / 2)).long().clamp(0, bins - 1)


def _pairs(blocks: Blocks, queries: Tensor, classes: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(M, b) cosines of the samples that take part, and whether their classes are the target's."""
    for features, labels in blocks:
        step = max(1, _COSINES // len(queries))
        for start in range(0, len(features), step):
            part = slice(start, start + step)
            directions, own = _valid("blocks", features[part], labels[part])
            if len(own):
                cosines = scan_scores(directions, queries.to(directions), reduce="none")
                yield cosines, classes[:, None].to(own.device) == own


def _valid(what: str, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Directions in float32 and classes of the rows that have both."""
    if features.ndim != 2 or labels.shape != features.shape[:1]:
        raise ValueError(
            f"knn_shapley: {what}: expected embeddings (n, D) and a class of each, (n,), got {tuple(features.shape)} "
            f"and {tuple(labels.shape)}"
        )
    part = _taking_part(features, labels)
    return unit(features)[part].float(), labels.to(features.device)[part].double()


def _taking_part(features: Tensor, labels: Tensor) -> Tensor:
    known = ~labels.isnan() & (labels != IGNORE)
    return known.to(features.device) & unit(features).isfinite().all(1)
