"""A sampler of torch's that draws rows by their scores."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch.distributed as dist
from torch.utils.data import Sampler

from assay import select
from assay.select.rules import amount_rows, log_proportions, uniform
from assay.select.selection import oriented
from assay.train.tables import score_table

Indices = npt.NDArray[np.int64]


class WeightedSampler(Sampler[int]):
    """Draws the rows of a data set by a score::

        sampler = assay.train.WeightedSampler("scores", by="mimic", temperature=0.5)
        loader = DataLoader(dataset, batch_size=32, sampler=sampler)

    Every epoch is a draw of its own that follows from the scores, ``seed`` and the epoch alone, on every process the
    same. Going through the sampler once more begins the next, ``set_epoch`` any.
    Rows whose score is NaN, and rows that the table lacks, are never drawn.

    **Several processes** draw one sequence, and each takes every ``world_size``-th of its rows (up to
    ``world_size`` - 1 at its end are left out, so that all get the same number). Where training is distributed it must
    be said who shares the sequence out: this sampler (``rank`` and ``world_size``, in a loop of your own), or what
    wraps it (``world_size=1``: Lightning, Accelerate and transformers' Trainer give each process its share of whatever
    sampler they find). Without either it is an error, because both or neither would train on other data than is meant.

    Args:
        table: where the scores are: a table with a column ``row``, the row's position in the data set (as `assay.score`
            has it); a table without ``row`` and ``id``, whose own rows are the data set's; a Hugging Face data set with
            a column of scores (as `assay.train.join` makes it); or a scores folder of `assay score`, of which
            the data set is the corpus, its shards after one another in the order of their paths.
        by: the score, or a column of weights.
        num_samples: rows per epoch and over all processes: an int is a number, a float a share of the table's rows.
            None: as many as there are to draw from (with a ``curriculum`` not the same in every epoch: say a number
            where a trainer wraps the sampler, for Lightning's wrapper asks for the length once).
        replacement: whether a row may be drawn more than once per epoch.
        temperature: rows are drawn in proportion to softmax(worth / temperature), worth being the score or, if it is
            better when low, its negative. None: in proportion to the score itself, which must not be negative.
        keep: which end of the score is better, if the table does not say; of a column named ``weight`` the high one.
        curriculum: shares of the table's rows, one per epoch, of which the last goes on: in epoch e only the best
            ``curriculum[e]`` are drawn from. With ``replacement=False`` and no ``num_samples`` each of them comes once.
        seed: of the draws, at least 0.
        rank, world_size: of this process, and of how many, if the sampler is to share the sequence out; without
            ``rank``, that which torch.distributed has.
        corpus_path: of a scores folder, where the corpus is now, if it has moved.

    Attributes:
        epoch: the one that was begun last; before that, the one that comes first.

    Raises:
        ValueError: a score that there is not or that is infinite; rows that are repeated; fewer rows to draw from than
            are to be drawn; an argument that has no effect.
        RuntimeError: nothing said who shares the sequence out, and training is distributed.
    """

    def __init__(
        self,
        table: Any,
        by: str,
        *,
        num_samples: int | float | None = None,
        replacement: bool = True,
        temperature: float | None = None,
        keep: Literal["high", "low"] | None = None,
        curriculum: Sequence[float] | None = None,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        corpus_path: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__()
        self._scores, self._rows = score_table(table, by, corpus_path)
        self.by, self.replacement, self.temperature = by, replacement, temperature
        said = (self._scores.schema.field(by).metadata or {}).get(b"keep", b"")
        self.keep: Literal["high", "low"] | None = "high" if by == "weight" and not (keep or said) else keep
        self.seed = _at_least(seed, 0, "seed")
        self.num_samples = num_samples
        self._once = not replacement and num_samples is None
        self._stages = _stages(curriculum)
        self._check_order_matters(curriculum)
        self._counts = [self._count(share) for share in self._stages]
        self._rank, self._world_size = _check_place(rank, world_size)
        self.epoch = 0
        self._begun = False
        self._position = 0  # of the epoch's sequence, where this process goes on

    def __len__(self) -> int:
        """How many rows of the epoch are this process's."""
        return self._counts[self._stage()] // self._place()[1]

    def __iter__(self) -> Iterator[int]:
        rank, world_size = self._place()
        if self._begun or (self._position and self._position + world_size > self._counts[self._stage()]):
            self.set_epoch(self.epoch + 1)
        there = self._counts[self._stage()]
        if there < world_size:
            raise ValueError(
                f"WeightedSampler: {there} rows for {world_size} processes: expected at least one for each; raise "
                "num_samples"
            )
        self._begun = True
        return self._walk(self._sequence()[: there // world_size * world_size], rank, world_size)

    def set_epoch(self, epoch: int) -> None:
        """Have the next draw be that of ``epoch``, from its beginning."""
        self.epoch, self._begun, self._position = _at_least(epoch, 0, "epoch"), False, 0

    def state_dict(self, position: int | None = None) -> dict[str, Any]:
        """Where the sampler is, for a checkpoint.

        Args:
            position: how many of the epoch's rows were trained on, by all processes together. None: as many as the
                sampler has handed out, which is ahead of training where a DataLoader's workers fetch in advance.
        """
        here = self._position if position is None else _at_least(position, 0, "position")
        return {"epoch": self.epoch, "position": here, "draws": self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on in the middle of an epoch, in as many processes as there are now. ``len`` stays the whole epoch's.

        Raises:
            ValueError: the state is that of other scores or settings.
        """
        if state["draws"] != self._identity():
            raise ValueError(
                "WeightedSampler: the state is that of other draws (other scores, seed or settings): expected the "
                "sampler to be made as it was when the state was taken; set_epoch() begins an epoch anew"
            )
        self.set_epoch(int(state["epoch"]))
        self._position = _at_least(int(state["position"]), 0, "position")

    # ---- an epoch

    def _walk(self, sequence: Indices, rank: int, world_size: int) -> Iterator[int]:
        for start in range(self._position, len(sequence) - world_size + 1, world_size):
            self._position = start + world_size
            yield int(sequence[start + rank])

    def _sequence(self) -> Indices:
        """The rows of the epoch, of all processes."""
        stage = self._stage()
        pool, count, seed = self._pool(self._stages[stage]), self._counts[stage], self._seed(0)
        if self._once:
            drawn = np.flatnonzero(oriented(pool, self.by, self.keep).valid)
        elif self.replacement:
            drawn = select.draw(pool, self.by, count, seed, self.temperature, self.keep)
        else:
            drawn = select.sample(pool, self.by, count, seed, self.temperature, self.keep).indices
        if not self.replacement:
            drawn = drawn[np.argsort(uniform(len(drawn), self._seed(1)), kind="stable")]
        return drawn if self._rows is None else self._rows[drawn]

    def _pool(self, share: float) -> pa.Table:
        """The scores, NaN where a row is not among the best ``share``."""
        if share == 1:
            return self._scores
        best = select.top(self._scores, self.by, share, self.keep).mask
        values = np.where(best, self._scores[self.by].to_numpy(), np.nan)
        return pa.Table.from_arrays([pa.array(values, from_pandas=False)], schema=_as_double(self._scores.schema))

    def _count(self, share: float) -> int:
        """How many rows an epoch has that draws from the best ``share``. ValueError if they are not there."""
        score = oriented(self._pool(share), self.by, self.keep)
        if self._once:
            there = int(score.valid.sum())
        else:
            there = int((log_proportions(score, self.temperature) > -np.inf).sum())
        where = f"by={self.by!r}" if share == 1 else f"by={self.by!r}, the best {share} of the rows"
        if not there:
            raise ValueError(f"WeightedSampler: {where}: no row can be drawn; expected one with a score that is not 0")
        wanted = there if self.num_samples is None else self.num_samples
        if not isinstance(wanted, int) or isinstance(wanted, bool):
            wanted = amount_rows(wanted, self._scores.num_rows)
        if wanted > there and not self.replacement:
            raise ValueError(
                f"WeightedSampler: num_samples={self.num_samples}: {wanted} rows without replacement, and {where} "
                f"leaves {there}; lower it or draw with replacement=True"
            )
        return _at_least(wanted, 1, "num_samples")

    def _check_order_matters(self, curriculum: Sequence[float] | None) -> None:
        if self._once and curriculum is None:
            raise ValueError(
                "WeightedSampler: replacement=False without num_samples: every row would come once whatever its score; "
                "say how many, or give a curriculum"
            )
        if self._once and self.temperature is not None:
            raise ValueError(
                f"WeightedSampler: temperature={self.temperature}: has no effect where each of the best rows comes "
                "once; leave it out, or say num_samples"
            )

    def _stage(self) -> int:
        return min(self.epoch, len(self._stages) - 1)

    def _seed(self, purpose: int) -> int:
        words = np.random.SeedSequence((self.seed, self.epoch, purpose)).generate_state(4)
        return int.from_bytes(words.astype("<u4").tobytes(), "little")

    def _place(self) -> tuple[int, int]:
        """This process's rank, and of how many processes."""
        spread = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if self._world_size is None:
            if spread:
                raise RuntimeError(
                    f"WeightedSampler: {dist.get_world_size()} processes train, and nothing said who shares the rows "
                    "out: expected world_size=1 where a trainer does (Lightning, Accelerate, transformers), or "
                    "rank=dist.get_rank(), world_size=dist.get_world_size() in a loop of your own"
                )
            return 0, 1
        if self._rank is not None or self._world_size == 1:
            return self._rank or 0, self._world_size
        if not spread or dist.get_world_size() != self._world_size:
            raise RuntimeError(f"WeightedSampler: world_size={self._world_size}: expected rank= with it")
        return dist.get_rank(), self._world_size

    def _identity(self) -> str:
        """A fingerprint of what the draws follow from."""
        settings = (self.by, self.keep, self.replacement, self.temperature, self.seed, self._stages, self._counts)
        digest = hashlib.sha256(repr(settings).encode())
        digest.update(self._scores[self.by].to_numpy().tobytes())
        digest.update(b"" if self._rows is None else self._rows.tobytes())
        return digest.hexdigest()


def _stages(curriculum: Sequence[float] | None) -> list[float]:
    if curriculum is None:
        return [1.0]
    stages = [float(share) for share in curriculum]
    if not stages or not all(0 < share <= 1 for share in stages):
        raise ValueError(f"WeightedSampler: curriculum={curriculum!r}: expected shares in (0, 1], one per epoch")
    return stages


def _check_place(rank: int | None, world_size: int | None) -> tuple[int | None, int | None]:
    if world_size is None and rank is not None:
        raise ValueError(f"WeightedSampler: rank={rank} without world_size; expected both")
    if world_size is not None:
        _at_least(world_size, 1, "world_size")
    if world_size is not None and rank is not None and not 0 <= rank < world_size:
        raise ValueError(f"WeightedSampler: rank={rank}: expected 0 to {world_size - 1}, below world_size")
    return rank, world_size


def _at_least(value: int, least: int, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"WeightedSampler: {what}={value!r}: expected a whole number of at least {least}")
    return value


def _as_double(schema: pa.Schema) -> pa.Schema:
    return pa.schema([field.with_type(pa.float64()) for field in schema])
