"""The CUDA kernel of project, Sparse: its entries' order anywhere, its sums on a GPU; its threads: tests/native."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

import assay
from assay.kernels import sparse as kernel
from assay.ops import project
from assay.ops.sketch import buckets
from tests.kernels.guarded import DEVICE, far_apart, fenced

BF16 = torch.bfloat16
FAR = 2**33 + 5
needs_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="CUDA C++ is not interpreted")


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


def added(x: Tensor, first: int, sketch: assay.Sparse) -> Tensor:
    sums = torch.zeros(len(x), sketch.dim, dtype=torch.float64, device=x.device)
    kernel.add_sparse(x, first, sketch.key, sketch.dim, sketch.nonzeros, sums, lambda _, make: make())
    return sums


def expected(x: Tensor, sketch: assay.Sparse, first: int = 0) -> Tensor:
    at, sign = buckets(x.shape[1], sketch.dim, sketch.nonzeros, sketch.key, first=first)
    out = torch.zeros(len(x), sketch.dim, dtype=torch.float64)
    for j in range(sketch.nonzeros):
        out.index_add_(1, at[:, j], x.cpu().double() * sign[:, j])
    return out


@needs_gpu
@pytest.mark.parametrize("gap", [0, 3, 16])  # rows of any address
@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16])
@pytest.mark.parametrize(("dim", "nonzeros"), [(256, 1), (512, 2), (1000, 1), (4096, 1)])
def test_against_float64(dim: int, nonzeros: int, dtype: torch.dtype, gap: int) -> None:
    sketch = assay.Sparse(dim, nonzeros, seed=5)
    for b, d in ((1, 1), (1, 20_001), (2, 8192), (17, 33_000), (3, 300_000)):
        x = fenced(torch.randn(b, d).to(dtype), gap)
        if not kernel.takes(x, dim, nonzeros):
            pytest.skip("more shared memory than this device has")
        error = (added(x, FAR, sketch).cpu() - expected(x, sketch, FAR)).abs()
        assert bool((error <= 2e-6 * x.double().norm(dim=1, keepdim=True).cpu()).all()), (b, d, float(error.max()))


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16])
@pytest.mark.parametrize("dim", [300, 700, 4000])
def test_a_row_s_bits_are_its_own(dim: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(19, 200_001, device=DEVICE).to(dtype)
    if not kernel.takes(x, dim, 1):
        pytest.skip("more shared memory than this device has")
    sketch = assay.Sparse(dim, seed=6)
    found = project(x, sketch)
    for rows in (slice(0, 1), slice(16, 18), slice(2, 5), slice(18, 19)):
        assert torch.equal(project(x[rows], sketch), found[rows])
        assert torch.equal(project(x[rows].contiguous(), sketch), found[rows])
    monkeypatch.setattr(kernel, "PARTIAL_BYTES", 1)  # 16 rows at a time
    assert torch.equal(project(x, sketch), found)


@needs_gpu
def test_other_rows_infinities_stay_theirs() -> None:
    x = torch.randn(18, 9000).to(BF16).to(DEVICE)
    sketch = assay.Sparse(512, seed=4)
    want, bad = project(x, sketch), x.clone()
    bad[3, 50], bad[17, 0] = torch.nan, torch.inf
    found = project(bad, sketch)
    at = buckets(9000, 512, 1, sketch.key)[0][:, 0]
    for row, column in ((3, 50), (17, 0)):
        assert found[row].isfinite().sum() == 511
        assert not found[row, at[column]].isfinite()
    good = [r for r in range(18) if r not in (3, 17)]
    assert torch.equal(found[good], want[good])


@needs_gpu
def test_offsets_beyond_two_to_the_31() -> None:
    x = torch.randn(3, 70, device=DEVICE).to(torch.float16)
    (far_x,) = far_apart(x)
    assert torch.equal(project(far_x, assay.Sparse(512)), project(x, assay.Sparse(512)))
