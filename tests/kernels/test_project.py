"""The Sparse kernels of project against float64: on a GPU where there is one, under the interpreter elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import assay
from assay.kernels import project as kernel
from assay.ops import grad_sketch, project
from assay.ops.philox import make_key
from assay.ops.sketch import buckets
from tests.grid import checkered
from tests.kernels.guarded import DEVICE, GAPS, far_apart, fence_intact, fenced

F32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [F32, BF16, FP16]
FAR = 2**33 + 5  # a coordinate whose counter needs its second word, for several entries each too
SHAPES = [  # (B, D); what it is there for
    (1, 1),
    (3, 63),
    (16, 256),  # as many rows as a tile has, and columns
    (17, 257),  # one more of both
    (2, 5000),  # several runs
]
SKETCHES = [
    assay.Sparse(1, seed=1),
    assay.Sparse(7, seed=2, name="a"),  # many short runs
    assay.Sparse(17, 2, seed=3),
    assay.Sparse(512, seed=4),
    assay.Sparse(300, 3, seed=5),
    assay.Sparse(9000, seed=6),  # more buckets than coordinates
]


def triton_project(vectors: Tensor, sketch: assay.Sparse) -> Tensor:
    with assay.backend("triton"):
        return project(vectors, sketch)


def expected(x: Tensor, sketch: assay.Sparse, first: int = 0) -> Tensor:
    """Unscaled, by the definition in ops/sketch.py."""
    x = x.cpu().double()
    at, sign = buckets(x.shape[1], sketch.dim, sketch.nonzeros, sketch.key, first=first)
    out = x.new_zeros(len(x), sketch.dim)
    for j in range(sketch.nonzeros):
        out.index_add_(1, at[:, j], x * sign[:, j])
    return out


def anew(_: object, make: Callable[[], Tensor]) -> Tensor:
    """Nothing is kept."""
    return make()


def added(x: Tensor, first: int, sketch: assay.Sparse) -> Tensor:
    sums = torch.zeros(len(x), sketch.dim, dtype=torch.float64, device=x.device)
    kernel.add_sparse(x, first, sketch.key, sketch.dim, sketch.nonzeros, sums, anew)
    return sums


@pytest.mark.parametrize(("sketch", "dtype", "gap"), checkered(SKETCHES, DTYPES, GAPS, every=5))
def test_against_float64(sketch: assay.Sparse, dtype: torch.dtype, gap: int) -> None:
    shapes = SHAPES if gap == 3 else SHAPES[-1:]
    for b, d in shapes if sketch.dim < 9000 else [(3, 63)]:
        x = fenced(torch.randn(b, d).to(dtype), gap)
        found = triton_project(x, sketch)
        assert found.shape == (b, sketch.dim)
        assert found.dtype == F32
        assert found.device.type == DEVICE
        error = (found.cpu() - expected(x, sketch) / sketch.nonzeros**0.5).abs()
        assert bool((error <= 2e-6 * x.double().norm(dim=1, keepdim=True).cpu()).all()), (b, d, float(error.max()))


ENTRIES = [SKETCHES[1], SKETCHES[4], assay.Sparse(40, 5, seed=-1, name="b")]


@pytest.mark.parametrize(("sketch", "first"), checkered(ENTRIES, [0, 2**32 - 31, FAR, 2**60], every=3))
def test_every_entry_is_the_definition_s(sketch: assay.Sparse, first: int) -> None:
    """Signs and buckets to the last bit, beyond 2³² and across it; exact sums of ones."""
    eye = torch.eye(67, device=DEVICE)
    assert torch.equal(added(eye, first, sketch).cpu(), expected(eye, sketch, first))


@pytest.mark.parametrize("dim", [1, 2, 3, 1000, 4097, 2**31 - 1])
@pytest.mark.parametrize(("seed", "name"), [(0, ""), (-1, "a"), (2**63 - 1, "lm_head")])
def test_codes_are_the_definition_s(dim: int, seed: int, name: str) -> None:
    key = make_key(seed, name)
    for first in (0, 1, 2, 3, 2**34 - 70, FAR):
        codes = torch.full((300,), -1, dtype=torch.int32, device=DEVICE)
        kernel.plan_codes(codes, first, key, dim).run(codes)
        at, sign = buckets(300, dim, 1, key, first=first)
        assert torch.equal(codes.cpu().long() & 0xFFFFFFFF, (2 * at + (sign < 0))[:, 0]), first


def test_strides() -> None:
    x = torch.randn(20, 700, device=DEVICE)
    sketch = SKETCHES[3]
    want = triton_project(x, sketch)
    assert torch.equal(triton_project(x.T.contiguous().T, sketch), want)  # copied
    assert torch.equal(triton_project(torch.stack([x, x], 1)[:, 0], sketch), want)
    assert torch.equal(triton_project(x[:1].expand(3, -1), sketch), want[:1].expand(3, -1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sketch", SKETCHES[1:3], ids=str)
def test_a_row_s_bits_are_its_own(sketch: assay.Sparse, dtype: torch.dtype) -> None:
    """Whatever the batch, over several slices; and the same every time."""
    x = torch.randn(19, kernel.TERMS * sketch.dim // sketch.nonzeros + 500, device=DEVICE).to(dtype)
    found = triton_project(x, sketch)
    for rows in (slice(0, 19), slice(0, 1), slice(16, 18), slice(2, 5)):
        assert torch.equal(triton_project(x[rows], sketch), found[rows])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy, under the interpreter
@pytest.mark.parametrize("dtype", DTYPES)
def test_other_rows_infinities_stay_theirs(dtype: torch.dtype) -> None:
    """And the other buckets of their row. A program holds 16 rows at a time."""
    x = torch.randn(18, 101).to(dtype).to(DEVICE)
    want = triton_project(x, SKETCHES[3])
    bad = x.clone()
    bad[3, 50], bad[17, 0] = torch.nan, torch.inf
    found = triton_project(bad, SKETCHES[3])
    at = buckets(101, 512, 1, SKETCHES[3].key)[0][:, 0]
    for row, column in ((3, 50), (17, 0)):
        assert not found[row, at[column]].isfinite()
        others = torch.arange(512, device=DEVICE) != at[column].item()
        assert torch.equal(found[row, others], want[row, others])
    good = [r for r in range(18) if r not in (3, 17)]
    assert torch.equal(found[good], want[good])


def test_every_sum_is_written_and_nothing_else() -> None:
    for dim, b, d in ((300, 17, 6000), (7, 3, 700), (5000, 2, 100), (40, 1, 1300)):
        x, sums = torch.randn(b, d, device=DEVICE), torch.zeros(b, dim, dtype=torch.float64, device=DEVICE)
        (launches,) = kernel.plan(x, 0, (1, 2), dim, 1, sums, anew)
        scratch: dict[str, Tensor] = {}
        for launch in launches[:-1]:
            for name, shared in (("out", "scratch"), ("x", "scratch"), ("partial", "partial")):
                if name in launch.arguments and not (name == "x" and b == 1):
                    given = launch.arguments[name]
                    poisoned = scratch.setdefault(shared, fenced(torch.full(given.shape, torch.nan), 0))
                    launch.arguments[name] = poisoned
            launch.run(x)
        for found in scratch.values():
            assert not found.isnan().any()
            assert fence_intact(found)


@pytest.mark.parametrize("nonzeros", [1, 3])
def test_chunks_go_on_where_they_left_off(nonzeros: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 1000, device=DEVICE)
    sketch = assay.Sparse(50, nonzeros, seed=9)
    monkeypatch.setattr(kernel, "SCRATCH_BYTES", 300 * 16 * 4)
    monkeypatch.setattr(kernel, "TERMS", 2)
    length = 100 // nonzeros
    chunks = list(kernel.plan(x, 0, (1, 2), 50, nonzeros, torch.zeros(3, 50), lambda *_: x))
    assert len(chunks) == -(-1000 // (300 // length * length))
    torch.testing.assert_close(added(x, FAR, sketch).cpu(), expected(x, sketch, FAR), rtol=1e-6, atol=1e-5)


def test_offsets_beyond_two_to_the_31() -> None:
    """Rows 2³⁰ elements apart: 32-bit offsets would wrap on the third."""
    x = torch.randn(3, 70, device=DEVICE).to(FP16)
    (far_x,) = far_apart(x)
    assert torch.equal(triton_project(far_x, SKETCHES[3]), triton_project(x, SKETCHES[3]))


def test_gradients_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """grad_sketch projects a gradient a few of its rows at a time, with the coordinates where they are."""
    monkeypatch.setattr("assay.ops.layer_sketch.TILE", 100)
    a, g = torch.randn(3, 5, 40, device=DEVICE), torch.randn(3, 5, 9, device=DEVICE)
    for sketch in (assay.Sparse(30, seed=1), assay.Sparse(70, 2, seed=1)):
        with assay.backend("triton"):
            found = grad_sketch(a, g, sketch)
        want = expected((g.mT @ a).flatten(1), sketch) / sketch.nonzeros**0.5
        torch.testing.assert_close(found.cpu().double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 50), (3, 0)])
def test_empty(shape: tuple[int, int]) -> None:
    assert triton_project(torch.ones(shape, device=DEVICE), assay.Sparse(4)).tolist() == [[0.0] * 4] * shape[0]


def test_what_the_kernels_do_not_take_is_an_error() -> None:
    x = torch.randn(2, 100, device=DEVICE)
    for call in (project, lambda x, sketch: grad_sketch(x, x, sketch)):
        for mask in (assay.Mask(2, 3), assay.Mask(2, 3, assay.Sparse(4)), assay.Mask(200, 200)):
            with (
                assay.backend("triton"),
                pytest.raises(ValueError, match="no kernel for a Mask in triton, only"),
            ):
                call(x, mask)


def test_entries_are_sorted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made, sort = [], kernel.sort_entries
    monkeypatch.setattr(kernel, "sort_entries", lambda *a: made.append(a) or sort(*a))
    sketch = assay.Sparse(20, seed=77, name="sorted once")
    for b in (1, 3, 3):
        triton_project(torch.randn(b, 50, device=DEVICE), sketch)
    assert len(made) == 1


def test_a_bucket_s_entries_are_in_their_order() -> None:
    """Run by run and bucket by bucket; every entry once, with its sign."""
    count, length, dim, nonzeros = 100, 40, 7, 3
    order = kernel.sort_entries(FAR, count, length, (1, 2), dim, nonzeros, torch.device(DEVICE)).cpu()
    lanes = 3 * dim
    bounds, entries = order[: lanes + 1].tolist(), order[lanes + 1 :].tolist()
    at, sign = buckets(count, dim, nonzeros, (1, 2), first=FAR)
    want: list[list[int]] = [[] for _ in range(lanes)]
    for c in range(count):
        for j in range(nonzeros):
            want[c // length * dim + int(at[c, j])].append(2 * c + int(sign[c, j] < 0))
    assert [entries[a:b] for a, b in pairwise(bounds)] == want
    assert bounds[0] == 0
    assert bounds[-1] == len(entries) == count * nonzeros


def test_runs_and_chunks_follow_from_the_shape() -> None:
    def runs(b: int, d: int, dim: int, dtype: torch.dtype = BF16) -> list[int]:
        x, sums = torch.empty(b, d, dtype=dtype, device="meta"), torch.empty(b, dim, device="meta")
        plans = kernel.plan(x, 0, (1, 2), dim, 1, sums, lambda *_: x)
        return [len(launches[-1].arguments["partial"]) for launches in plans]

    for b in (1, 64):
        assert runs(b, kernel.TERMS * 512, 512) == [1]
        assert runs(b, kernel.TERMS * 512 + 1, 512) == [2]
        assert runs(b, 1 << 21, 512) == [96, 96, 64]
        assert runs(b, 1 << 21, 512, F32) == [48] * 5 + [16]
        assert runs(b, 1 << 21, 1 << 18) == [1, 1, 1]
