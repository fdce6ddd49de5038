"""Density sampling: how crowded is it where a sample lies?

*How to Train Data-Efficient LLMs*, 2402.09668, section 3.3.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from assay.methods.base import Column, Method, Need
from assay.methods.embedding import Embedder, Pooling
from assay.methods.sums import Folded, samples_left_out, unit
from assay.probe import Signals
from assay.tasks import Task

if TYPE_CHECKING:
    from typing_extensions import Self


class Density(Method):
    """Mean kernel between a sample's embedding and the pool's, from hashes; and its inverse, to draw by.

    Columns: ``density``, which says nothing of worth on its own; ``density_weight`` = 1/``density``, keep high: the
    paper draws in proportion to it, without replacement, which is ``select.sample(table, "density_weight", …)``.
    (Algorithm 2 prints the inverse of that, section 3.3 and theorem A.2 do not.) NaN for a sample with nothing to
    predict, or whose embedding is 0 or not finite.

    ``fit`` must run first: it hashes the pool, or a random sample of it. The kernel is the probability that two
    embeddings of length 1 share the cells of two random grids (``KernelSums``).

    Args:
        model: a forward pass of it is what a sample costs.
        task: what a sample is.
        repetitions: R, hash functions; the relative error of a density falls as 1/√R.
        buckets: B of each; they hold R · B counts of 4 bytes. None: 8 for each fitted sample, at most 20,000 as in the
            paper (80 MB).
        bandwidth: the grid's cells, in root mean squared distances of the pool's embeddings.
        at, pooling: as in ``EmbeddingSimilarity``.
        seed: of the hash functions.
        name: of the first column, and prefix of the other.

    Raises:
        ValueError: a number that is not positive, counts beyond 4 GiB, or no such layer.
    """

    uses_pool: ClassVar[bool] = True
    gathers: ClassVar[int | None] = 0

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        *,
        repetitions: int = 1000,
        buckets: int | None = None,
        bandwidth: float = 0.5,
        at: str | None = None,
        pooling: Pooling = "mean",
        seed: int = 0,
        name: str = "density",
    ) -> None:
        self.name, self.model, self.task = name, model, task
        most = _BUCKETS if buckets is None else buckets
        if repetitions < 1 or most < 2 or not 0 < bandwidth < float("inf"):
            raise ValueError(
                f"{name}: expected at least 1 repetition, 2 buckets and a positive bandwidth, got {repetitions}, "
                f"{most} and {bandwidth}"
            )
        if (size := 4 * repetitions * most) > _COUNT_BYTES:
            raise ValueError(
                f"{name}: {repetitions} repetitions of {most} buckets take {size / 2**30:,.0f} GiB, "
                f"more than {_COUNT_BYTES / 2**30:g} GiB; take fewer"
            )
        self.repetitions, self.buckets, self.bandwidth, self.seed = repetitions, buckets, bandwidth, seed
        self.embedder = Embedder(name, model, task, at, pooling)
        self._sums: KernelSums | None = None
        self._of_pool = Folded()

    @property
    def columns(self) -> Sequence[Column]:
        return [
            Column(self.name, "none", "mean kernel between the sample's embedding and the pool's"),
            Column(f"{self.name}_weight", "high", "1/density: draw in proportion to it"),
        ]

    def needs(self) -> Mapping[str, Need]:
        return {"model": self.embedder.need()}

    def fit(self, pool: Iterable[Any] = ()) -> Self:
        """Hash the pool's embeddings, which are in memory until that is done.

        Args:
            pool: the pool or a random sample of it. A sample that is not in it counts as alone where it is empty.

        Raises:
            ValueError: no sample has a finite embedding.
        """
        folded = Folded()
        directions = self.embedder.finite(pool, folded, unit)
        if not len(directions):
            raise ValueError(f"{self.name}: fit() needs samples of the pool, found none with a finite embedding")
        width = self.bandwidth * _spread(directions)
        buckets = min(_BUCKETS, 8 * len(directions)) if self.buckets is None else self.buckets
        sums = KernelSums(directions.shape[1], width, self.repetitions, buckets, self.seed, directions.device)
        for start in range(0, len(directions), _ROWS):
            sums.add(directions[start : start + _ROWS])
        self._sums, self._of_pool = sums, folded
        return self

    def score(self, signals: Mapping[str, Signals]) -> dict[str, Tensor]:
        if self._sums is None:
            raise RuntimeError(f"{self.name}: call fit() before scoring")
        directions = unit(self.embedder.embeddings(signals["model"])).to(self._sums.device)
        fine = directions.isfinite().all(1)
        sums = self._sums(directions.masked_fill(~fine[:, None], 0)).masked_fill(~fine, torch.nan)
        density = sums.clamp(min=1) / self._sums.samples  # itself, at least
        return {self.name: density, f"{self.name}_weight": 1 / density}

    def metadata(self) -> dict[str, str]:
        pooled = self.embedder.pooled
        facts = {
            "embedding": f"input of layer {pooled.layer!r}, {pooled.weights} over positions",
            "left_out": samples_left_out(self._of_pool),
        }
        if self._sums is not None:
            facts |= {"samples": str(self._sums.samples), "cell": f"{self._sums.width:.6g}"}
        return facts


_COUNT_BYTES = 4 << 30
_BUCKETS = 20_000
# So many samples are hashed at once.
_ROWS = 1024
_HASHES = 2
"""Grids of a hash function: samples meet in a bucket that share a cell of both."""


class KernelSums:
    """Σ_j k(x, x_j) over what was added, by R hash functions into B buckets each (RACE, 1912.02283).

    h(x) = ⌊(a·x + b) / width⌋ with a standard normal and b uniform on [0, width); two of them, mixed, make a bucket's
    number. k is the probability that both agree: p(c)² with p(c) = 1 − 2Φ(−u) − (2/(√(2π) u))(1 − exp(−u²/2)), u =
    width/c, at distance c. What meets in a bucket without sharing its cells is subtracted as its expectation, so that
    the sums have no bias.

    Args:
        size: D.
        width: of a cell.
        repetitions, buckets: R and B.
        seed: of a, b and the mixing.
    """

    def __init__(
        self, size: int, width: float, repetitions: int, buckets: int, seed: int, device: torch.device | None = None
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        functions = repetitions * _HASHES
        directions = torch.randn(functions, size, generator=generator)
        offsets = torch.rand(functions, generator=generator, dtype=torch.float64)
        mixers = torch.randint(2**62, (2, repetitions, _HASHES), generator=generator) * 2 + 1
        self.width, self.buckets, self.samples = width, buckets, 0
        self._directions, self._offsets, self._mixers = (t.to(device) for t in (directions, offsets, mixers))
        self._counts = torch.zeros(repetitions, buckets, dtype=torch.int32, device=device)
        self._first = torch.arange(repetitions, device=device) * buckets

    @property
    def device(self) -> torch.device:
        return self._counts.device

    def add(self, x: Tensor) -> None:
        """(B, D) finite floats."""
        places = self._places(x).flatten()
        self._counts.view(-1).scatter_add_(0, places, torch.ones_like(places, dtype=torch.int32))
        self.samples += len(x)

    def __call__(self, x: Tensor) -> Tensor:
        """(B, D) finite floats -> (B,) float64; below 0 at times where nothing is near."""
        met = self._counts.view(-1)[self._places(x)].double().mean(1)
        return (met - self.samples / self.buckets) / (1 - 1 / self.buckets)

    def _places(self, x: Tensor) -> Tensor:
        """(B, R): where in the counts."""
        cells = (x.to(self._directions) @ self._directions.T).double().div_(self.width).add_(self._offsets).floor_()
        mixed = (cells.long().view(len(x), -1, _HASHES) * self._mixers[0]).sum(2)  # modulo 2⁶⁴
        mixed = (mixed ^ (mixed >> 31)) * self._mixers[1, :, 0]
        return ((mixed >> 20) % self.buckets) + self._first


def _spread(x: Tensor) -> float:
    """Root mean squared distance of two rows; 1 where all are the same but for float32's rounding, by which cells would
    be told apart."""
    wide = x.double()
    squared = 2 * float((wide - wide.mean(0)).square().sum(1).mean())
    return squared**0.5 if squared > 1e-10 else 1.0
