"""The Kronecker kernels of grad_sketch against float64: on a GPU where there is one, else under the interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import assay
from assay.kernels import sketch as kernel
from assay.kernels._common import Launch
from assay.kernels.philox import INPUT_SIDE, OUTPUT_SIDE
from assay.kernels.slices import plan_sum, plan_total
from assay.ops import grad_sketch
from assay.ops.sketch import signs
from tests.grid import checkered
from tests.kernels.guarded import DEVICE, GAPS, far_apart, fence_intact, fenced

F32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
SHAPES = [  # (B, T, I, O); what it is there for
    (1, 1, 1, 1),
    (4, 1, 5, 7),  # one position, fewer features than a sketch has rows
    (4, 16, 128, 64),  # a tile of positions over the samples; whole blocks of features
    (5, 13, 129, 127),  # one more, one less
    (2, 100, 40, 24),  # several tiles in a slice
    (2, 70, 1100, 70),  # several slices, and splits of the features, the last ones ragged
]
SIDES = [(16, 16), (1, 1), (17, 3), (33, 64), (65, 16), (128, 30)]
TYPES = [(F32, F32), (BF16, BF16), (FP16, FP16)]  # of inputs and grads
MIXED = [(BF16, F32), (F32, BF16), (FP16, BF16)]


def triton_sketch(inputs: Tensor, grads: Tensor, sketch: assay.Kronecker) -> Tensor:
    with assay.backend("triton"):
        return grad_sketch(inputs, grads, sketch)


def check(inputs: Tensor, grads: Tensor, sketch: assay.Kronecker) -> Tensor:
    """The kernel's result, after it has been held against float64 as tests/ops/test_project.py does."""
    result = triton_sketch(inputs, grads, sketch)
    gradient = (grads.double().mT @ inputs.double()).cpu()
    o, i = gradient.shape[1:]
    want = (sketch.output_side(o).double() @ gradient @ sketch.input_side(i).double().T).flatten(1)
    scale = want.norm(dim=1, keepdim=True) + gradient.flatten(1).norm(dim=1, keepdim=True)
    assert result.dtype == F32
    assert result.device.type == DEVICE
    error = (result.cpu() - want).abs() / scale
    assert bool((error <= 2e-6).all()), float(error.max())
    return result


def draw(
    b: int, t: int, i: int, o: int, types: tuple[torch.dtype, torch.dtype] = (F32, F32), gap: int = 0
) -> tuple[Tensor, Tensor]:
    return fenced(torch.randn(b, t, i).to(types[0]), gap), fenced(torch.randn(b, t, o).to(types[1]), gap)


@pytest.mark.parametrize(("shape", "types", "gap"), checkered(SHAPES, TYPES, GAPS, every=5))
def test_against_float64(shape: tuple[int, int, int, int], types: tuple[torch.dtype, torch.dtype], gap: int) -> None:
    a, g = draw(*shape, types, gap)
    for rows, cols in SIDES[:1] if gap == 16 else SIDES[1:4]:
        check(a, g, assay.Kronecker(rows, cols, seed=rows, name="layer"))


LARGE = [*SIDES[4:], (130, 20), (20, 260)]  # the last two: beyond the largest tile


@pytest.mark.parametrize(("sides", "types"), checkered(LARGE, TYPES, every=4))
def test_large_sketches(sides: tuple[int, int], types: tuple[torch.dtype, torch.dtype]) -> None:
    for i, o in ((80, 48), (70, 33)):  # aligned rows, and ragged ones, which have smaller tiles
        check(*draw(2, 35, i, o, types), assay.Kronecker(*sides, seed=1))


@pytest.mark.parametrize("types", MIXED)
def test_mixed_types(types: tuple[torch.dtype, torch.dtype]) -> None:
    for sides in ((16, 16), (70, 16)):
        check(*draw(3, 43, 129, 48, types), assay.Kronecker(*sides))


@pytest.mark.parametrize(("seed", "name"), [(0, ""), (-1, "a"), (2**63 - 1, "lm_head")])
@pytest.mark.parametrize("side", [OUTPUT_SIDE, INPUT_SIDE])
def test_signs_are_those_of_the_definition(side: int, seed: int, name: str) -> None:
    """To the last bit, for all sizes, across blocks of 128 rows; what pads them is 0."""
    key = assay.Kronecker(1, 1, seed, name).key
    for size, dtype in ((1, BF16), (16, FP16), (33, BF16), (128, BF16), (129, FP16), (300, BF16)):
        matrix = kernel.make_signs(size, 70, side, key, dtype, torch.device(DEVICE)).cpu().float()
        assert torch.equal(matrix[:size, :70], signs(size, 70, side, key).sign())
        assert not matrix[size:].any()
        assert not matrix[:, 70:].any()
        assert matrix.shape[1] % kernel.PAD == 0


def test_one_hot_factors_find_every_sign() -> None:
    """Gradient (o, i) alone is 1: its sketch is the product of a column of either side, exactly."""
    o, i = 37, 21
    sketch = assay.Kronecker(64, 16, seed=3, name="x")
    left, right = sketch.output_side(o).sign(), sketch.input_side(i).sign()
    g = torch.eye(o, device=DEVICE)[:, None].expand(o, 1, o)
    for c in range(0, i, 5):
        a = torch.eye(i, device=DEVICE)[c].expand(o, 1, i)
        found = triton_sketch(a, g, sketch).view(o, 64, 16).cpu() * 32
        assert torch.equal(found, left.T[:, :, None] * right[:, c])


def test_strides() -> None:
    a, g = draw(4, 36, 20, 24)
    sketch = assay.Kronecker(16, 8, seed=5)
    plain = check(a, g, sketch)
    assert torch.equal(triton_sketch(a.transpose(0, 1).contiguous().transpose(0, 1), g, sketch), plain)
    assert torch.equal(triton_sketch(a, g.mT.contiguous().mT, sketch), plain)  # features outermost: copied
    check(a, g[:, :, :1].expand(4, 36, 24), sketch)  # stride 0
    check(a[:, ::2], g[:, 1::2], sketch)
    flat = triton_sketch(a[:, 0], g[:, 0], sketch)
    assert torch.equal(flat, triton_sketch(a[:, :1], g[:, :1], sketch))


@pytest.mark.parametrize("types", TYPES)
def test_a_sample_s_bits_are_its_own(types: tuple[torch.dtype, torch.dtype], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the batch, in several slices and in one, however many are made at a time; every time the same."""
    for name, small in (("MIN_CHUNK", 64), ("MIN_SLICE", 32), ("READ_PER_WRITTEN", 1)):
        monkeypatch.setattr(kernel, name, small)
    for t in (1, 40):
        a, g = draw(5, t, 130, 70, types)
        sketch = assay.Kronecker(16, 16, seed=2)
        found = triton_sketch(a, g, sketch)
        assert torch.equal(triton_sketch(a, g, sketch), found)
        assert torch.equal(triton_sketch(a[3:4], g[3:4], sketch), found[3:4])
        assert torch.equal(triton_sketch(a[1:4], g[1:4], sketch), found[1:4])
        with monkeypatch.context() as patch:
            patch.setattr(kernel, "SCRATCH_BYTES", 2 * 4 * t * 3 * 16)  # two at a time, then the last
            assert torch.equal(triton_sketch(a, g, sketch), found)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy, under the interpreter
@pytest.mark.parametrize("types", TYPES[:2])
def test_other_samples_infinities_stay_theirs(types: tuple[torch.dtype, torch.dtype]) -> None:
    a, g = draw(3, 43, 129, 48, types)
    a[1, 42, 128] = torch.inf
    g[2, 5, 47] = torch.nan
    sketch = assay.Kronecker(16, 16)
    result = triton_sketch(a, g, sketch)
    assert torch.equal(result[0], triton_sketch(a[:1], g[:1], sketch)[0])
    assert not result[1:].isfinite().any()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy, under the interpreter
def test_an_infinity_is_what_the_reference_makes_of_it() -> None:
    """Infinite, with its sign: the words of a float32 must not cancel it to NaN."""
    a, g = torch.ones(2, 1, 3, device=DEVICE), torch.ones(2, 1, 1, device=DEVICE)
    a[0, 0, 1], a[1, 0, 2] = torch.inf, -torch.inf
    sketch = assay.Kronecker(2, 4)
    with assay.backend("reference"):
        assert torch.equal(triton_sketch(a, g, sketch), grad_sketch(a, g, sketch))


def test_float32_loses_nothing_to_three_words() -> None:
    """All 24 bits, at every exponent: rounded words would overflow at the top."""
    a = (torch.rand(200, 1) + 1) * 2.0 ** torch.arange(-100, 100)[:, None]
    a = torch.cat([a, torch.tensor([[torch.finfo(F32).max], [-torch.finfo(F32).max], [0.0]])]).to(DEVICE)
    assert torch.equal(triton_sketch(a, torch.ones_like(a), assay.Kronecker(1, 1)).abs(), a.abs())


@pytest.mark.parametrize(
    ("shape", "sides"), [((3, 43, 129, 48), (16, 16)), ((2, 70, 1100, 70), (3, 5)), ((2, 1, 30, 20), (130, 20))]
)
def test_every_partial_sum_is_written_and_nothing_else(
    shape: tuple[int, int, int, int], sides: tuple[int, int]
) -> None:
    a, g = draw(*shape)
    made = [
        kernel.make_signs(size, x.shape[2], side, (1, 2), BF16, a.device)
        for size, x, side in ((sides[1], a, INPUT_SIDE), (sides[0], g, OUTPUT_SIDE))
    ]
    out = fenced(torch.full((shape[0], *sides), torch.nan), 0)
    (launches,) = kernel.plan(a, g, *made, out, interpret=DEVICE == "cpu")
    scratch = {}
    for launch in launches:
        for name in {"partial", "left", "right", "out"} & launch.arguments.keys():
            given = launch.arguments[name]
            if given.data_ptr() != out.data_ptr():  # poisoned and fenced, the same for all who use it
                at = scratch.setdefault(given.data_ptr(), fenced(torch.full(given.shape, torch.nan), 0))
                launch.arguments[name] = at
        launch.run(a)
    for found in (out, *scratch.values()):
        assert not found.isnan().any()
        assert fence_intact(found)


def test_offsets_beyond_two_to_the_31() -> None:
    """Samples 2³⁰ elements apart: 32-bit offsets would wrap on the third."""
    a, g = draw(3, 2, 8, 5, (FP16, FP16))
    (far_a,) = far_apart(a)
    sketch = assay.Kronecker(4, 4)
    assert torch.equal(triton_sketch(far_a, g, sketch), check(a, g, sketch))


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)])
def test_empty(shape: tuple[int, int, int, int]) -> None:
    b, t, i, o = shape
    a, g = (torch.ones(s, device=DEVICE) for s in ((b, t, i), (b, t, o)))
    assert triton_sketch(a, g, assay.Kronecker(2, 3)).tolist() == [[0.0] * 6] * b


def meta(b: int, t: int, i: int, o: int, dtype: torch.dtype = BF16) -> tuple[Tensor, ...]:
    signs = (torch.empty(256, n, dtype=dtype, device="meta") for n in (i, o))
    return *(torch.empty(b, t, n, dtype=dtype, device="meta") for n in (i, o)), *signs


def launches(shape: tuple[int, ...], rows: int, cols: int, dtype: torch.dtype = BF16) -> list[Launch]:
    return next(kernel.plan(*meta(*shape, dtype), torch.empty(shape[0], rows, cols, device="meta")))


def test_dispatch_on_both_sides_of_each_limit() -> None:
    def tiles(rows: int, cols: int, dtype: torch.dtype = BF16, i: int = 768) -> list[tuple[int, int]]:
        some = launches((8, 31, i, 3072), rows, cols, dtype)[:2]  # too few positions for one launch
        return [(launch.arguments["SIDE"], launch.arguments["BLOCK_K"]) for launch in some]

    (half, *_), (full, *_), (ragged, *_) = kernel.HALF_TILES, kernel.FLOAT_TILES, kernel.RAGGED_TILES
    assert tiles(32, 5) == [(16, half.k), (32, half.k)]
    assert tiles(33, 65) == [(128, half.k), (64, half.k)]
    assert tiles(129, 500) == [(128, half.k), (128, half.k)]
    assert tiles(128, 16, i=767) == [(16, ragged.k), (128, half.k)]
    assert tiles(64, 65, F32) == [(128, full.k), (64, full.k)]
    # The factors are read once up to the largest tile; beyond it, once for each.
    assert [launch.grid[2] for launch in launches((8, 512, 768, 3072), 128, 129)[:2]] == [2, 1]


def test_one_launch_where_a_sample_has_the_positions_or_few_features() -> None:
    def names(*shape: int, rows: int = 16, cols: int = 16) -> list[str]:
        return [launch.kernel.__name__ for launch in launches(shape, rows, cols)]

    several = ["_project", "_project", "_multiply_out"]
    for b in (1, 8):
        assert names(b, 196, 27, 64) == ["_fused"]
        assert names(b, 512, 4096, 14336) == ["_fused", "_total_slices"]
        assert names(b, 511, 4096, 14336)[:3] == several
        assert names(b, 32, 768, 3072, rows=64) == ["_fused"]
        assert names(b, 32, 768, 3072, rows=65) == names(b, 31, 768, 3072) == several
        assert names(b, 1, 768, 3072) == ["_single"]
        assert names(b, 1, 768, 3072, rows=17) == several
    for shape in ((768, 3072), (27, 64), (4096, 14336)):
        for t in (512, 4096):
            some, one = (launches((b, t, *shape), 16, 16)[0].arguments for b in (8, 1))
            assert some["slices"] == one["slices"]
            assert some["t_slice"] == one["t_slice"]
            assert some["slices"] == 1 or some["t_slice"] * sum(shape) * 2 >= kernel.FUSED_LEAST_BYTES
            assert (some["slices"] - 1) * some["t_slice"] < t <= some["slices"] * some["t_slice"]


def test_splits_and_slices_read_more_than_they_write_and_ignore_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "fuses", lambda *_: False)
    monkeypatch.setattr(kernel, "SINGLE_NUMBERS", 0)
    for shape in ((768, 3072), (27, 64), (4096, 14336)):
        for side in (16, 64, 128):
            for t in (1, 196, 4096):
                some, one = (launches((b, t, *shape), side, side) for b in (8, 1))
                for project, alone in zip(some[:2], one[:2], strict=True):
                    splits, chunk = project.grid[1], project.arguments["chunk"]
                    assert splits == alone.grid[1]
                    assert splits == 1 or (chunk + kernel.PAD) * 2 >= kernel.READ_PER_WRITTEN * 4 * side
                    assert chunk % kernel.PAD == 0
                slices, t_slice = (some[2].arguments[name] for name in ("slices", "t_slice"))
                assert slices == one[2].arguments["slices"]
                assert slices == 1 or t_slice * sum(shape) * 2 >= kernel.READ_PER_WRITTEN * 4 * side * side


@pytest.mark.parametrize("shape", [(3, 1, 40, 20), (2, 150, 33, 17), (1, 70, 20, 9)])
def test_one_launch_and_several_agree(shape: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    a, g = draw(*shape)
    sketch = assay.Kronecker(5, 16)
    found = check(a, g, sketch)
    monkeypatch.setattr(kernel, "fuses", lambda *_: False)
    monkeypatch.setattr(kernel, "SINGLE_NUMBERS", 0)
    torch.testing.assert_close(triton_sketch(a, g, sketch), found, rtol=1e-5, atol=1e-5 * float(found.abs().max()))


def test_sums_of_slices_are_double_and_keep_their_order() -> None:
    """And added to what is there; an element's bits do not depend on how many there are."""
    partial = torch.randn(70, 3, 50, device=DEVICE)
    sums = torch.randn(3, 50, dtype=torch.float64, device=DEVICE)
    want = sums + partial.double().sum(0)
    found = sums.clone()
    plan_sum(partial, found).run(partial)
    torch.testing.assert_close(found, want, rtol=1e-14, atol=1e-14)
    one = sums[1:2].clone()
    plan_sum(partial[:, 1:2].contiguous(), one).run(partial)
    assert torch.equal(one, found[1:2])
    total = torch.empty(3, 50, device=DEVICE)
    plan_total(partial, total).run(partial)
    assert torch.equal(total, partial.double().sum(0).float())
