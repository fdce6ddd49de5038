"""KNN-Shapley: what is each sample of a pool worth to a nearest-neighbour classifier of the targets?

*Efficient Task-Specific Data Valuation for Nearest Neighbor Algorithms*, 1908.08619.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from assay.methods.checks import check_one_of
from assay.methods.sums import unit
from assay.ops import scan_scores
from assay.tasks.base import IGNORE

Blocks = Iterable[tuple[Tensor, Tensor]]
"""(b, D) embeddings and (b,) classes, block after block; gone through twice or more, so a list, not a generator."""
Metric = Literal["cosine", "euclidean"]

_log = logging.getLogger("assay")

# So many samples are compared with a target at once.
_PAIRS = 1 << 22


def knn_shapley(
    blocks: Blocks,
    targets: Tensor,
    target_labels: Tensor,
    k: int = 10,
    *,
    metric: Metric = "cosine",
    exact: int = 1024,
    bins: int = 4096,
) -> Tensor:
    """The Shapley values of a pool's samples in the game whose utility is the k-NN classifier's confidence: keep high.

    The utility of a subset for one target is the share, of k, that those of its (at most k) nearest samples are which
    have the target's class; values are means over the targets and sum to the whole pool's utility. Samples as near as
    one another are in random order, and values are the expectation over it: copies are worth the same. With i the rank
    by distance, c_i = 1/max(i, k) and m_i whether the classes match, s_i = c_i m_i − Σ_{j > i} (c_{j−1} − c_j) m_j
    (theorem 1).

    A value follows from its sample's rank in the *whole* pool, so this is no method that scores one sample after the
    other: it is a function of the pool's embeddings, those that ``keep_features`` stored for instance, read twice (and
    before that for how far distances reach). For each target are held the ``exact`` nearest and a histogram of the
    others, 32 · (exact + bins) bytes: those in one of its bins count as equally near. They are beyond rank ``exact``,
    where no value is larger than 1/exact; a pool of at most that many samples has exact values.

    Args:
        blocks: the pool's embeddings and classes.
        targets: (M, D) embeddings.
        target_labels: (M,) classes.
        k: neighbours that vote.
        metric: nearness is the ``"cosine"``, or the ``"euclidean"`` distance, as in the paper.
        exact: ranks held for each target.
        bins: of equal width, of the cosines or distances beyond.

    Returns:
        (N,) float64 on the CPU, in the blocks' order. NaN for a sample without a class (NaN or −100), or whose
        embedding is not finite, or 0 where the cosine is asked for: it takes no part. Such targets are left out; a
        warning says how many.

    Raises:
        TypeError: blocks that can be gone through only once.
        ValueError: no target or no sample that is finite, shapes that do not fit, a number below 1, another metric.
    """
    for name, value in (("k", k), ("exact", exact), ("bins", bins)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"knn_shapley: {name}: expected a whole number of at least 1, got {value!r}")
    if isinstance(blocks, Iterator):
        raise TypeError("knn_shapley: blocks: expected what can be gone through twice, such as a list, got an iterator")
    check_one_of("knn_shapley: metric", metric, get_args(Metric))
    what = f"a class and a {'direction' if metric == 'cosine' else 'finite embedding'}"
    near = _Nearness.to(targets, target_labels, metric, blocks)
    if not len(near.targets):
        raise ValueError(f"knn_shapley: none of {len(targets)} targets has {what}")
    if left_out := len(targets) - len(near.targets):
        _log.warning("knn_shapley: %d of %d targets are left out: they have not %s", left_out, len(targets), what)
    seen = _Seen(near, exact, bins)
    for nearness, matches, _ in near.pairs(blocks):
        seen.add(nearness, matches)
    if not seen.samples:
        raise ValueError(f"knn_shapley: no sample of the pool has {what}")
    worth = seen.worth(k)
    values = []
    for nearness, matches, part in near.pairs(blocks):
        own = torch.full((len(part),), torch.nan, dtype=torch.float64)
        own[part.cpu()] = worth.of(nearness, matches).cpu()
        values.append(own)
    return torch.cat(values)


@dataclass(frozen=True)
class _Nearness:
    """How near samples are to the targets that take part: the larger, the nearer.

    Attributes:
        targets: (M, D) directions, float32, or embeddings, float64.
        classes: (M,).
        least: (M, 1), and ``most``: the numbers that nearness lies between.
    """

    targets: Tensor
    classes: Tensor
    metric: Metric
    least: Tensor
    most: float

    @classmethod
    def to(cls, targets: Tensor, labels: Tensor, metric: Metric, blocks: Blocks) -> _Nearness:
        points, part = _valid("targets", targets, labels, metric)
        points, classes = points[part], labels.to(points.device)[part].double()
        least, most = points.new_full((len(points), 1), -1), 1.0
        if metric == "euclidean" and len(points):
            least, most = -_reach(points, blocks), 0.0
        return cls(points, classes, metric, least, most)

    def pairs(self, blocks: Blocks) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Of some samples, those that take part: (M, b) how near they are and whether their classes are the target's,
        and which they are, (n,) bool."""
        for features, labels in blocks:
            step = max(1, _PAIRS // len(self.targets))
            for start in range(0, len(features), step):
                some, own = features[start : start + step], labels[start : start + step]
                points, part = _valid("blocks", some, own, self.metric)
                matches = self.classes[:, None].to(points.device) == own.to(points.device)[part].double()
                yield self._of(points[part]), matches, part

    def _of(self, points: Tensor) -> Tensor:
        targets = self.targets.to(points)
        if self.metric == "cosine":
            return scan_scores(points, targets, reduce="none")
        # No matrix product: its sums would depend on the block, and lose the digits of what is near.
        return -torch.cdist(targets, points, compute_mode="donot_use_mm_for_euclid_dist")

    def bin(self, nearness: Tensor, bins: int) -> Tensor:
        """(M, b) -> int64, which of so many of equal width."""
        least = self.least.to(nearness)
        return ((nearness - least) * (bins / (self.most - least))).long().clamp(0, bins - 1)


@dataclass
class _Worth:
    """What a sample is worth to a target, by how near it is.

    Attributes:
        nearest: (M, E) ascending nearness of the near samples, no two the same, then infinities.
        cut: (M, 1): what is as near, or less, is in bins.
        values: (M, E + bins, 2) of samples of another class, and of the target's.
    """

    near: _Nearness
    nearest: Tensor
    cut: Tensor
    values: Tensor
    bins: int

    def of(self, nearness: Tensor, matches: Tensor) -> Tensor:
        """(M, b) both -> (b,), the mean over the targets."""
        place = torch.where(
            nearness > self.cut,
            torch.searchsorted(self.nearest, nearness),
            self.nearest.shape[1] + self.near.bin(nearness, self.bins),
        )
        either = self.values.flatten(1).gather(1, 2 * place + matches)
        return either.mean(0)


class _Seen:
    """What the first pass learns of the pool: for each target the nearest samples, and how many are in which bin."""

    def __init__(self, near: _Nearness, exact: int, bins: int) -> None:
        self.samples, self._near, self._exact, self._bins = 0, near, exact, bins
        self._nearest = near.targets[:, :0]
        self._match = torch.zeros_like(self._nearest, dtype=torch.bool)
        others_and_matches = (2, len(near.targets), bins)
        self._counts = torch.zeros(others_and_matches, dtype=torch.long, device=near.targets.device)

    def add(self, nearness: Tensor, matches: Tensor) -> None:
        """(M, b), and whether the classes are the same."""
        self.samples += nearness.shape[1]
        self._count(nearness, matches, 1)
        nearest, match = torch.cat([self._nearest, nearness], 1), torch.cat([self._match, matches], 1)
        self._nearest, order = nearest.topk(min(self._exact, nearest.shape[1]), 1)
        self._match = match.gather(1, order)

    def _count(self, nearness: Tensor, matches: Tensor, times: int | Tensor) -> None:
        place = self._near.bin(nearness, self._bins)
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
        return _Worth(self._near, nearest, cut, values, self._bins)


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


def _reach(points: Tensor, blocks: Blocks) -> Tensor:
    """(M, 1) float64: no sample is farther from the point. By way of the points' mean, in a pass without distances."""
    centre, farthest = points.mean(0), points.new_tensor(torch.finfo(points.dtype).tiny)
    for features, labels in blocks:
        own, part = _valid("blocks", features, labels, "euclidean")
        apart = torch.linalg.vector_norm(own[part].to(points) - centre, dim=1)
        farthest = torch.cat([farthest[None], apart]).max()
    reach: Tensor = farthest + torch.linalg.vector_norm(points - centre, dim=1, keepdim=True)
    return reach


def _valid(what: str, features: Tensor, labels: Tensor, metric: Metric) -> tuple[Tensor, Tensor]:
    """(n, D) what is compared, directions in float32 or embeddings in float64, and which rows take part, (n,) bool."""
    if features.ndim != 2 or labels.shape != features.shape[:1]:
        raise ValueError(
            f"knn_shapley: {what}: expected embeddings (n, D) and a class of each, (n,), got {tuple(features.shape)} "
            f"and {tuple(labels.shape)}"
        )
    points = unit(features).float() if metric == "cosine" else features.double()
    known = ~labels.isnan() & (labels != IGNORE)
    return points, known.to(points.device) & points.isfinite().all(1)
