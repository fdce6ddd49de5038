"""The CUDA kernel of project, Sparse: its entries' order. Its threads: tests/native; its sums: tests/gpu."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from assay.ops import _sparse as kernel
from assay.ops.sketch import buckets
from tests.kernels.guarded import DEVICE

FAR = 2**33 + 5


def decoded(order: Tensor, chunk: int, count: int, dim: int, one: bool) -> list[list[int]]:
    """[chunk · dim + bucket]: 2 coordinate + (1 for a minus), in the order they are added in."""
    found = []
    for number, row in enumerate(order.cpu().int() & 0xFFFF):
        bounds, entries = row[: dim + 1].tolist(), row[-(-(dim + 1) // 8) * 8 :].tolist()
        for begin, end in pairwise(bounds):
            places = [(e // 2 if one else e // 2 ^ (e // 16 & 1), e % 2) for e in entries[begin:end]]
            found.append([2 * (number * chunk + place) + minus for place, minus in places])
    assert max(e for row in found for e in row) < 2 * count
    return found


@pytest.mark.parametrize("one", [False, True])
@pytest.mark.parametrize(("dim", "nonzeros", "count"), [(7, 3, 100), (23, 1, 64), (300, 2, 130)])
def test_a_bucket_s_entries_are_in_their_order(
    dim: int, nonzeros: int, count: int, one: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunk by chunk and bucket by bucket, whatever is sorted at a time; every entry once, with its sign."""
    chunk = 32
    monkeypatch.setattr(kernel, "SORT_SPAN", 64)
    order = kernel.sort_entries(FAR, count, chunk, (1, 2), dim, nonzeros, one, torch.device(DEVICE))
    assert order.shape == (-(-count // chunk), -(-(dim + 1) // 8) * 8 + chunk * nonzeros)
    at, sign = buckets(count, dim, nonzeros, (1, 2), first=FAR)
    want: list[list[int]] = [[] for _ in range(len(order) * dim)]
    for c in range(count):
        for j in range(nonzeros):
            want[c // chunk * dim + int(at[c, j])].append(2 * c + int(sign[c, j] < 0))
    assert decoded(order, chunk, count, dim, one) == want


def test_more_entries_than_an_int16_counts() -> None:
    """Where buckets begin, up to 2¹⁶."""
    order = kernel.sort_entries(0, 8192, 8192, (1, 2), 256, 7, True, torch.device(DEVICE)).cpu().int() & 0xFFFF
    assert int(order[0, 256]) == 7 * 8192
    assert bool((order[0, 1:257] >= order[0, :256]).all())


def test_slices_and_pieces_follow_from_the_shape() -> None:
    assert kernel.cut(1, 512, 1) == (8192, 1)
    assert kernel.cut(1 << 24, 512, 1) == (64 * 512, 2)
    assert kernel.cut(1 << 26, 512, 1) == (64 * 512, 8)
    assert kernel.cut(1 << 24, 4096, 1) == (1 << 17, 1)
    for count in (1, 8191, 1 << 20, (1 << 26) - 1):
        for dim, nonzeros in ((256, 7), (1000, 2), (4096, 1)):
            length, per_piece = kernel.cut(count, dim, nonzeros)
            assert length % kernel.ALIGNED == 0
            assert -(-count // (length * per_piece)) <= kernel.PIECES


def test_elsewhere_the_other_kernel_runs() -> None:
    assert not kernel.takes(torch.zeros(2, 100), 512, 1)
    assert not kernel.takes(torch.zeros(2, 100, device=DEVICE), kernel.LEAST_DIM - 1, 1)
