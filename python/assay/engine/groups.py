"""Samples with a loss that is defined on a group of rows: which rows make a group follows from the shard alone.

A shard's rows are taken ``group`` at a time. The last ones, where fewer are left, are compared with the ``group`` last
rows of the shard: of those before them, which have their scores already, as many as it takes. So every loss has the
same number of rows to be compared with, save those of a shard with fewer; rows in quarantine are missing in theirs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from assay.engine.batches import BatchScorer, empty_scores, make_batches, unless_out_of_memory, why_misfit
from assay.engine.kept_features import Scores
from assay.engine.rows import Sample
from assay.engine.timing import Times
from assay.recipe.recipe import BatchSpec, Recipe
from assay.recipe.tasks import Encoded, Encoder
from assay.tasks.contrastive import Pieces, in_pieces


@dataclass(frozen=True)
class Group:
    """Positions among a window's samples that are compared with one another; the first ``known`` have their scores."""

    members: Sequence[int]
    known: int = 0

    @property
    def scored(self) -> Sequence[int]:
        """Those whose scores are wanted."""
        return self.members[self.known :]

    def without(self, others: Collection[int]) -> Group:
        """The group of the other members."""
        kept = [i for i in self.members if i not in others]
        return Group(kept, sum(i not in others for i in self.members[: self.known]))


def make_groups(rows: Sequence[int], end: int, group: int) -> list[Group]:
    """The groups of a window.

    Args:
        rows: the numbers of its samples in the shard, ascending; its first row is the first of a group, and if its last
            is not the last of one, it has ``group`` rows or more, unless the shard has fewer.
        end: the number of the row behind its last, sample or not.
        group: the rows of a group.
    """
    whole = end // group * group
    places: dict[int, list[int]] = {}
    for place, row in enumerate(rows):
        places.setdefault(min(row, whole) // group, []).append(place)
    rest = places.pop(whole // group, [])
    groups = [Group(members) for members in places.values()]
    if rest:
        before = [place for place, row in enumerate(rows) if end - group <= row < whole]
        groups.append(Group([*before, *rest], len(before)))
    return groups


def score_groups(
    scorer: BatchScorer,
    encoder: Encoder,
    samples: Sequence[Sample],
    groups: Sequence[Group],
    limits: BatchSpec,
    times: Times | None = None,
) -> tuple[Scores, dict[int, str]]:
    """As `score_samples`, a group at a time.

    A group that runs out of memory is embedded in pieces, of one sample at last.

    Raises:
        ValueError: it runs out of memory where gradients are wanted, which pieces do not help against.
    """
    times = times or Times()
    scores = empty_scores(scorer.columns, len(samples))
    failed: dict[int, str] = {}
    pieces = 1  # what has helped once is kept
    waiting = deque(groups)
    while waiting:
        group = waiting.popleft()
        own = [samples[i] for i in group.members]
        result = None
        if len(own) > 1:
            pieces = min(pieces, len(own))
            try:
                while True:
                    collate = partial(_collate, encoder, limits, pieces)
                    result = unless_out_of_memory(scorer, collate, own, times)
                    if result is not None or pieces == len(own):
                        break
                    pieces = min(2 * pieces, len(own))
            except Exception:
                misfits = _misfits(encoder, samples, group)
                if not misfits:
                    raise
                failed |= {i: reason for i, reason in misfits.items() if i in group.scored}
                waiting.appendleft(group.without(misfits))
                continue
        if result is not None:
            for name, values in result.items():
                scores[name][group.scored] = values[group.known :].numpy()
            continue
        reason = (
            f"the {len(own)} rows that it is compared with run out of memory; set task.group to less"
            if len(own) > 1
            else "no other row of its group is a sample that it could be compared with"
        )
        failed |= dict.fromkeys(group.scored, reason)
    return scores, failed


def _collate(encoder: Encoder, limits: BatchSpec, pieces: int, samples: Sequence[Sample]) -> Any:
    batch = collate_group(encoder, [sample.encoded for sample in samples], limits)
    return batch if pieces == 1 else in_pieces(batch, pieces)


def collate_group(encoder: Encoder, samples: Sequence[Encoded], limits: BatchSpec) -> Any:
    """A group as a batch; if its samples differ in shape, as `Pieces` of one each, within the limits."""
    if len({sample.shape for sample in samples}) < 2:
        return encoder.collate([sample.data for sample in samples])
    batches = make_batches(samples, limits)
    places = torch.tensor([i for batch in batches for i in batch])
    return Pieces([encoder.collate([samples[i].data for i in batch]) for batch in batches], places.argsort())


def _misfits(encoder: Encoder, samples: Sequence[Sample], group: Group) -> dict[int, str]:
    """The members whose shape the models do not take, and why."""
    first = {samples[i].encoded.shape: i for i in reversed(group.members)}
    reasons = {shape: why_misfit(encoder, samples[i]) for shape, i in first.items()}
    found = {i: reasons[samples[i].encoded.shape] for i in group.members}
    return {i: reason for i, reason in found.items() if reason is not None}


def consecutive(count: int, group: int) -> list[list[int]]:
    """Samples that are no rows of one shard, as of a target, in groups in their order. One that is left over joins the
    group before it. ValueError for one sample alone."""
    if count == 1:
        raise ValueError("one sample alone has nothing to be compared with; a contrastive task needs two or more")
    starts = [start for start in range(0, count, group) if count - start > 1]
    return [list(range(start, end)) for start, end in zip(starts, [*starts, count][1:], strict=True)]


def batches_of(recipe: Recipe, encoder: Encoder, samples: Sequence[Encoded]) -> Iterator[Any]:
    """Samples that are no rows of one shard as batches of the task, collated."""
    group, limits = recipe.task.group_rows, recipe.batch
    batches = make_batches(samples, limits) if group is None else consecutive(len(samples), group)
    for batch in batches:
        yield collate_group(encoder, [samples[i] for i in batch], limits)
