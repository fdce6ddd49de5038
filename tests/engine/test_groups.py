"""Groups of rows that share a loss follow from the rows' numbers alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from assay.corpus.errors import BadRow
from assay.engine.groups import Group, consecutive, make_groups, score_groups
from assay.engine.rows import Sample
from assay.engine.units import units_at_most
from assay.methods import Column
from assay.recipe.recipe import BatchSpec
from assay.recipe.tasks import Encoded
from assay.tasks.contrastive import Pieces


@pytest.mark.parametrize(
    ("rows", "end", "expected"),
    [
        (range(8), 8, [Group([0, 1, 2, 3]), Group([4, 5, 6, 7])]),
        (range(8, 16), 16, [Group([0, 1, 2, 3]), Group([4, 5, 6, 7])]),
        (range(9), 9, [Group([0, 1, 2, 3]), Group([4, 5, 6, 7]), Group([5, 6, 7, 8], 3)]),
        (range(4, 11), 11, [Group([0, 1, 2, 3]), Group([3, 4, 5, 6], 1)]),
        ([4, 6, 9, 10], 11, [Group([0, 1]), Group([2, 3], 0)]),  # row 7 would be of the last group, and is no sample
        ([4, 6, 7, 10], 12, [Group([0, 1, 2]), Group([3])]),
        ([4, 5, 6, 7], 10, [Group([0, 1, 2, 3])]),
        (range(3), 3, [Group([0, 1, 2])]),
        ([0, 2], 3, [Group([0, 1])]),
        ([1], 2, [Group([0])]),
        ([], 5, []),
    ],
)
def test_groups_of_four(rows: object, end: int, expected: list[Group]) -> None:
    assert make_groups(list(rows), end, 4) == expected  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("count", "sizes"), [(0, []), (2, [2]), (4, [4]), (5, [5]), (6, [4, 2]), (8, [4, 4]), (9, [4, 5])]
)
def test_samples_of_no_shard_are_grouped_in_their_order(count: int, sizes: list[int]) -> None:
    groups = consecutive(count, 4)
    assert list(map(len, groups)) == sizes
    assert [i for group in groups for i in group] == list(range(count))


def test_one_sample_alone_is_no_group() -> None:
    with pytest.raises(ValueError, match="one sample alone has nothing to be compared with"):
        consecutive(1, 4)


class Pairs:
    """Numbers as images and as texts."""

    columns = ("x",)

    def collate(self, data: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor(data), torch.tensor(data)


class SumOfGroup:
    """Scores that every member of the batch takes part in, for at most so many members or pieces at once."""

    columns = (Column("score", "none", ""),)

    def __init__(self, room: int) -> None:
        self.room, self.tried = room, []

    def __call__(self, batch: tuple) -> dict[str, torch.Tensor]:
        images = [images for images, _ in batch.parts] if isinstance(batch, Pieces) else [batch[0]]
        assert [len(piece) for piece in images] == [len(piece) for piece in images if len(piece)]
        self.tried.append(len(images))
        if max(map(len, images)) > self.room:
            raise MemoryError
        whole = torch.cat(images).float()
        return {"score": whole.sum() + whole / 100}


def scored(room: int, numbers: list[int], end: int) -> tuple[list[float], dict[int, str], list[int]]:
    scorer = SumOfGroup(room)
    samples = [Sample(row, str(row), Encoded(row, 1, 1)) for row in numbers]
    scores, failed = score_groups(scorer, Pairs(), samples, make_groups(numbers, end, 4), BatchSpec())  # type: ignore[arg-type]
    return scores["score"].tolist(), failed, scorer.tried


def test_rows_before_the_last_group_are_compared_with_and_keep_their_scores() -> None:
    scores, failed, _ = scored(4, list(range(6)), 6)
    np.testing.assert_allclose(scores, [6, 6.01, 6.02, 6.03, 14.04, 14.05], rtol=1e-6)
    assert not failed


def test_a_group_beyond_memory_comes_in_pieces_and_what_helped_is_kept() -> None:
    scores, failed, tried = scored(1, list(range(8)), 8)
    np.testing.assert_allclose(scores, scored(4, list(range(8)), 8)[0])
    assert tried == [1, 2, 4, 4]
    assert not failed
    scores, failed, tried = scored(0, list(range(4)), 4)
    assert tried == [1, 2, 4]
    assert np.isnan(scores).all()
    assert set(failed) == {0, 1, 2, 3}
    assert "run out of memory; set task.group to less" in failed[0]


def test_a_sample_without_another_is_no_sample() -> None:
    scores, failed, _ = scored(4, [0, 1, 6], 8)
    assert failed == {2: "no other row of its group is a sample that it could be compared with"}
    assert np.isnan(scores).tolist() == [False, False, True]


class Misfits(Pairs):
    """Odd numbers are of a shape that no model takes."""

    apart = True

    def misfit(self, data: int) -> BadRow | None:
        return BadRow("too odd") if data % 2 else None


class NothingOdd(SumOfGroup):
    def __call__(self, batch: Any) -> dict[str, torch.Tensor]:
        parts = batch.parts if isinstance(batch, Pieces) else [batch]
        if any((images % 2).any() for images, _ in parts) or self.room == 0:
            raise RuntimeError("a kernel larger than the image")
        whole = torch.cat([images for images, _ in parts]).float()
        whole = whole if parts[0] is batch or batch.order is None else whole[batch.order]
        return {"score": whole.sum() + whole / 100}


def test_members_of_a_shape_that_no_model_takes_are_missing_in_their_group() -> None:
    numbers = [0, 2, 3, 4, 5, 6, 8]
    samples = [Sample(i, str(i), Encoded(x, 1, 1, (x % 2, x % 4))) for i, x in enumerate(numbers)]
    groups = make_groups(range(7), 7, 4)
    scores, failed = score_groups(NothingOdd(9), Misfits(), samples, groups, BatchSpec())  # type: ignore[arg-type]
    assert failed == {2: "too odd", 4: "too odd"}
    found = scores["score"].tolist()
    np.testing.assert_allclose([found[i] for i in (0, 1, 3, 5, 6)], [6, 6.02, 6.04, 18.06, 18.08], rtol=1e-6)
    assert np.isnan([found[2], found[4]]).all()
    with pytest.raises(RuntimeError, match="a kernel"):
        score_groups(NothingOdd(0), Misfits(), samples[:2], [Group([0, 1])], BatchSpec())  # type: ignore[arg-type]


@pytest.mark.parametrize(("group", "units"), [(None, 4), (64, 1)])
def test_a_large_shard_of_groups_is_one_unit_of_work(group: int | None, units: int) -> None:
    plan: Any = SimpleNamespace(recipe=SimpleNamespace(task=SimpleNamespace(group_rows=group)), shortlist=None)
    shard: Any = "a.parquet"
    assert units_at_most(plan, {shard: 10**12}, 4) == units
