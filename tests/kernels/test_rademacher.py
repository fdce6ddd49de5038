"""The Rademacher kernel of project against float64: on a GPU where there is one, under the interpreter elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import assay
from assay.kernels import rademacher as kernel
from assay.ops import grad_sketch, project
from assay.ops.sketch import RADEMACHER, signs
from tests.grid import checkered
from tests.kernels.guarded import DEVICE, GAPS, far_apart, fence_intact, fenced

F32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [F32, BF16, FP16]
FAR = 2**33 + 5  # a coordinate whose counter needs its second word
SHAPES = [  # (B, D); what it is there for
    (1, 1),
    (16, 128),  # as many rows as a program has, whole blocks
    (17, 129),  # one more of both
    (2, 1300),  # two slices
]
SKETCHES = [assay.Rademacher(1, seed=1), assay.Rademacher(128, seed=2, name="a"), assay.Rademacher(300, seed=3)]


def triton_project(vectors: Tensor, sketch: assay.Rademacher) -> Tensor:
    with assay.backend("triton"):
        return project(vectors, sketch)


def expected(x: Tensor, sketch: assay.Rademacher, first: int = 0) -> Tensor:
    """Unscaled, by the definition in ops/sketch.py."""
    matrix = signs(sketch.dim, x.shape[1], RADEMACHER, sketch.key, first=first).sign()
    return x.cpu().double() @ matrix.double().T


def added(x: Tensor, first: int, sketch: assay.Rademacher) -> Tensor:
    sums = torch.zeros(len(x), sketch.dim, dtype=torch.float64, device=x.device)
    kernel.add_dense(x, first, sketch.key, sketch.dim, sums)
    return sums


@pytest.mark.parametrize(("sketch", "dtype", "gap"), checkered(SKETCHES, DTYPES, GAPS, every=3))
def test_against_float64(sketch: assay.Rademacher, dtype: torch.dtype, gap: int) -> None:
    for b, d in SHAPES if gap == 3 else SHAPES[1:2]:
        if sketch.dim == 300 and d == 1300:
            continue  # one slice, and slow under the interpreter
        x = fenced(torch.randn(b, d).to(dtype), gap)
        found = triton_project(x, sketch)
        assert found.shape == (b, sketch.dim)
        assert found.dtype == F32
        assert found.device.type == DEVICE
        error = (found.cpu() - expected(x, sketch) / sketch.dim**0.5).abs()
        assert bool((error <= 2e-6 * x.double().norm(dim=1, keepdim=True).cpu()).all()), (b, d, float(error.max()))


@pytest.mark.parametrize(("first", "dtype"), checkered([0, 2**32 - 31, FAR, 2**60], DTYPES, every=3))
def test_every_sign_is_the_definition_s(first: int, dtype: torch.dtype) -> None:
    """To the last bit, beyond 2³² and across it, in blocks of 128 rows and in what is left of one."""
    eye = torch.eye(67, dtype=dtype, device=DEVICE)
    for sketch in (assay.Rademacher(130, seed=-1, name="b"), assay.Rademacher(31, seed=2**63 - 1)):
        assert torch.equal(added(eye, first, sketch).cpu(), expected(eye, sketch, first))


def test_float32_loses_nothing_to_three_words() -> None:
    """All 24 bits, at every exponent: rounded words would overflow at the top."""
    x = (torch.rand(200, 1) + 1) * 2.0 ** torch.arange(-100, 100)[:, None]
    x = torch.cat([x, torch.tensor([[torch.finfo(F32).max], [-torch.finfo(F32).max], [0.0]])]).to(DEVICE)
    assert torch.equal(added(x, 0, assay.Rademacher(1)).abs(), x.double().abs())


def test_strides() -> None:
    x = torch.randn(20, 70, device=DEVICE)
    want = triton_project(x, SKETCHES[1])
    assert torch.equal(triton_project(x.T.contiguous().T, SKETCHES[1]), want)  # copied
    assert torch.equal(triton_project(torch.stack([x, x], 1)[:, 0], SKETCHES[1]), want)
    assert torch.equal(triton_project(x[:1].expand(3, -1), SKETCHES[1]), want[:1].expand(3, -1))


@pytest.mark.parametrize("dtype", [DTYPES[0], *(pytest.param(d, marks=pytest.mark.slow) for d in DTYPES[1:])])
def test_a_row_s_bits_are_its_own(dtype: torch.dtype) -> None:
    """Whatever the batch, over several slices; and the same every time."""
    x = torch.randn(19, kernel.MIN_SLICE + 70, device=DEVICE).to(dtype)
    found = triton_project(x, SKETCHES[0])
    for rows in (slice(0, 19), slice(0, 1), slice(16, 18)):
        assert torch.equal(triton_project(x[rows], SKETCHES[0]), found[rows])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy, under the interpreter
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_in_its_row(dtype: torch.dtype) -> None:
    x = torch.randn(18, 101).to(dtype).to(DEVICE)
    want = triton_project(x, SKETCHES[1])
    x[3, 50], x[17, 0] = torch.nan, torch.inf
    found = triton_project(x, SKETCHES[1])
    assert found[3].isnan().all()
    assert torch.equal(found[17].cpu(), expected(x[17:], SKETCHES[1])[0].float())  # every one infinite, with its sign
    good = [r for r in range(18) if r not in (3, 17)]
    assert torch.equal(found[good], want[good])


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_every_partial_sum_is_written_and_nothing_else(dtype: torch.dtype) -> None:
    x, sums = torch.randn(17, 1300, device=DEVICE).to(dtype), torch.zeros(17, 40, dtype=torch.float64, device=DEVICE)
    ((launch, _),) = kernel.plan(x, 0, (1, 2), 40, sums, interpret=DEVICE == "cpu")
    found = fenced(torch.full(launch.arguments["partial"].shape, torch.nan), 0)
    launch.arguments["partial"] = found
    launch.run(x)
    assert len(found) == 2
    assert not found.isnan().any()
    assert fence_intact(found)


def test_pieces_go_on_where_they_left_off(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 300, device=DEVICE)
    for name, small in (("MIN_SLICE", 1), ("TERMS", 1), ("PROGRAMS", 2), ("SLICES", 5)):
        monkeypatch.setattr(kernel, name, small)
    sketch = assay.Rademacher(40, seed=9)
    assert len(list(kernel.plan(x, 0, (1, 2), 40, torch.zeros(3, 40)))) == 3  # slices of 64, two in a piece
    torch.testing.assert_close(added(x, FAR, sketch).cpu(), expected(x, sketch, FAR), rtol=1e-6, atol=1e-5)


def test_offsets_beyond_two_to_the_31() -> None:
    """Rows 2³⁰ elements apart: 32-bit offsets would wrap on the third."""
    x = torch.randn(3, 70, device=DEVICE).to(FP16)
    (far_x,) = far_apart(x)
    assert torch.equal(triton_project(far_x, SKETCHES[1]), triton_project(x, SKETCHES[1]))


def test_gradients_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """grad_sketch projects a gradient a few of its rows at a time, with the coordinates where they are."""
    monkeypatch.setattr("assay.ops.layer_sketch.TILE", 100)
    a, g = torch.randn(3, 5, 40, device=DEVICE), torch.randn(3, 5, 9, device=DEVICE)
    sketch = assay.Rademacher(30, seed=1)
    with assay.backend("triton"):
        found = grad_sketch(a, g, sketch)
    want = expected((g.mT @ a).flatten(1), sketch) / sketch.dim**0.5
    torch.testing.assert_close(found.cpu().double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 50), (3, 0)])
def test_empty(shape: tuple[int, int]) -> None:
    assert triton_project(torch.ones(shape, device=DEVICE), assay.Rademacher(4)).tolist() == [[0.0] * 4] * shape[0]


def test_slices_and_pieces_follow_from_the_shape() -> None:
    def plan(b: int, d: int, dim: int, dtype: torch.dtype = BF16) -> tuple[int, int]:
        x, sums = torch.empty(b, d, dtype=dtype, device="meta"), torch.empty(b, dim, device="meta")
        pieces = [launch.arguments["slices"] for launch, _ in kernel.plan(x, 0, (1, 2), dim, sums)]
        return len(pieces), sum(pieces)

    for dtype in DTYPES:
        for b in (1, 64):
            assert plan(b, 1024, 16, dtype) == (1, 1)
            assert plan(b, 1025, 16, dtype) == (1, 2)
            assert plan(b, 1 << 24, 512, dtype) == (1, kernel.SLICES)
            # A piece's sums are 1 MiB for each row of the vectors, however wide the sketch.
            assert plan(b, 1 << 24, 4096, dtype) == (8, kernel.SLICES)
    assert plan(1, 1 << 20, 1 << 20) == (1, 1)
