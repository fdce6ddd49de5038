"""The Triton kernel of grad_dot against float64: on a GPU where there is one, under the interpreter elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import assay
from assay.kernels import dot
from assay.ops import grad_dot
from tests.kernels.guarded import DEVICE, GAPS, far_apart, fence_intact, fenced
from tests.kernels.work import work_of

F32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
SHAPES = [  # (B, T, I, O); what it is there for
    (4, 1, 5, 7),  # one position, few rows
    (32, 1, 65, 33),  # the last of few rows; one past a tile of K and of NARROW
    (33, 1, 64, 32),  # one row more; exactly a tile of K, exactly NARROW
    (1, 127, 16, 130),
    (1, 129, 130, 128),  # one row past a tile, two columns past a tile
    (3, 43, 129, 48),  # 129 rows again, of three samples
    (1, 1, 1, 1),
    (2, 50, 1100, 40),  # K in two slices, the second shorter
]
TYPES = [  # of inputs, grads and direction
    (F32, F32, F32),
    (BF16, BF16, BF16),
    (FP16, FP16, FP16),
    (BF16, BF16, F32),  # three terms
    (BF16, F32, BF16),
    (F32, BF16, F32),
    (FP16, BF16, F32),
]


def triton_dot(inputs: Tensor, grads: Tensor, direction: Tensor) -> Tensor:
    with assay.backend("triton"):
        return grad_dot(inputs, grads, direction)


def check(inputs: Tensor, grads: Tensor, direction: Tensor) -> Tensor:
    """The kernel's result, after it has been held against float64 as tests/ops/test_gradients.py does."""
    result = triton_dot(inputs, grads, direction)
    gradient = grads.double().mT @ inputs.double()
    want = (gradient * direction.double()).sum((1, 2))
    scale = gradient.flatten(1).norm(dim=1) * direction.double().norm()
    assert result.dtype == F32
    assert result.device.type == DEVICE
    assert bool(((result - want).abs() <= 2e-6 * scale).all()), (result - want).abs() / scale
    return result


def draw(
    b: int, t: int, i: int, o: int, types: tuple[torch.dtype, torch.dtype, torch.dtype] = (F32, F32, F32), gap: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    sizes = (b, t, i), (b, t, o), (o, i)
    a, g, v = (fenced(torch.randn(size).to(dtype), gap) for size, dtype in zip(sizes, types, strict=True))
    return a, g, v


@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize("types", TYPES[:3])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(
    shape: tuple[int, int, int, int], types: tuple[torch.dtype, torch.dtype, torch.dtype], gap: int
) -> None:
    check(*draw(*shape, types, gap))


@pytest.mark.parametrize("types", TYPES[3:])
@pytest.mark.parametrize("shape", [(3, 43, 129, 48), (4, 9, 40, 70)])
def test_mixed_types(shape: tuple[int, int, int, int], types: tuple[torch.dtype, torch.dtype, torch.dtype]) -> None:
    check(*draw(*shape, types))


@pytest.mark.slow
@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU runs its own generation's tiles")
@pytest.mark.parametrize("generation", [8, 9, 10, 12])
@pytest.mark.parametrize("types", TYPES[:2])
def test_every_generation_s_tiles(
    monkeypatch: pytest.MonkeyPatch, generation: int, types: tuple[torch.dtype, torch.dtype, torch.dtype]
) -> None:
    monkeypatch.setattr(dot, "generation", lambda tensor: generation)
    for shape in ((2, 80, 272, 288), (2, 80, 272, 16), (2, 3, 272, 288)):
        check(*draw(*shape, types, gap=16))


def test_a_float32_direction_loses_nothing_to_bfloat16_factors() -> None:
    """Two words of bfloat16 would be off by 8e-6 of the result here; three are float32's 24 bits."""
    a, g = torch.ones(1, 1, 64, dtype=BF16, device=DEVICE), torch.ones(1, 1, 64, dtype=BF16, device=DEVICE)
    v = torch.full((64, 64), 1 + 2**-8 + 2**-17 + 2**-22, device=DEVICE)
    assert torch.equal(triton_dot(a, g, v).double(), v.double().sum()[None].float().double())
    v = torch.randn(50, 60) * 10.0 ** torch.randint(-20, 20, (50, 60))
    assert torch.equal(dot.terms(v, BF16).double().sum(0), v.double())
    assert dot.terms(v.to(BF16), BF16).shape == (1, 50, 60)


def test_strides() -> None:
    a, g, v = draw(4, 6, 20, 24)
    plain = check(a, g, v)
    same = torch.testing.assert_close
    same(check(a.transpose(0, 1).contiguous().transpose(0, 1), g, v), plain)  # samples inside positions
    same(check(a.mT.contiguous().mT, g, v), plain)  # features outermost: copied
    same(check(a, g, v.T.contiguous().T), plain)
    same(check(a, g, torch.stack([v, v], 2)[..., 0]), plain)  # a direction without any unit stride
    one = g[:, :, :1].expand(4, 6, 24)
    check(a, one, v)  # stride 0
    check(a[:, ::2], g[:, ::2], v)
    flat = triton_dot(a[:, 0], g[:, 0], v)
    assert torch.equal(flat, triton_dot(a[:, :1], g[:, :1], v))


def test_only_a_strided_last_dimension_is_copied() -> None:
    a, g, v = draw(4, 6, 20, 24)
    for x in (a, a[:, ::2], a[..., 3:17], a.transpose(0, 1), a[:1].expand(9, -1, -1)):
        assert dot.unit_stride(x) is x
    assert dot.unit_stride(a[..., ::2]).is_contiguous()
    launch, _ = dot.plan(a, g, v, 8)
    assert {launch.arguments["left"].data_ptr(), launch.arguments["right"].data_ptr()} == {a.data_ptr(), g.data_ptr()}
    assert launch.arguments["matrix"].data_ptr() == v.data_ptr()


@pytest.mark.parametrize("shape", [(3, 43, 129, 48), (2, 50, 1100, 40), (7, 1, 70, 80)])
def test_every_partial_sum_is_written_and_nothing_else(shape: tuple[int, int, int, int]) -> None:
    a, g, v = draw(*shape)
    launch, partial = dot.plan(a, g, v, 8, interpret=DEVICE == "cpu")
    sums = fenced(torch.full(partial.shape, torch.nan), 0)
    launch.arguments["partial"] = sums
    launch.run(a)
    assert not sums.isnan().any()
    assert fence_intact(sums)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy, under the interpreter
def test_other_samples_infinities_stay_theirs() -> None:
    a, g, v = draw(3, 43, 129, 48)
    a[1, 5, 7] = torch.inf
    g[2, 42, 47] = torch.nan
    result = triton_dot(a, g, v)
    assert torch.equal(result[0], triton_dot(a.nan_to_num(1.0, 1.0), g.nan_to_num(1.0), v)[0])
    assert not result[1:].isfinite().any()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy, under the interpreter
def test_an_infinite_gradient_is_infinite() -> None:
    """Not NaN, which infinity times a padded column's zero would be."""
    a, g, v = (torch.ones(s, device=DEVICE) for s in ((2, 3, 5), (2, 3, 7), (7, 5)))
    g[1] = torch.inf
    assert triton_dot(a, g, v).tolist() == [105.0, torch.inf]


@pytest.mark.parametrize(("i", "o"), [(8, 3), (2, 3)])  # the direction's rows are columns of the product, or its K
def test_offsets_beyond_two_to_the_31(i: int, o: int) -> None:
    """Samples, and rows of the direction, 2³⁰ elements apart: 32-bit offsets would wrap on the third."""
    a, g, v = draw(3, 2, i, o, (FP16, FP16, FP16))
    far_a, far_v = far_apart(a, v)
    assert torch.equal(triton_dot(far_a, g, far_v), check(a, g, v))


def test_the_same_bits_every_time() -> None:
    a, g, v = draw(2, 50, 1100, 40, (BF16, BF16, F32))
    assert torch.equal(triton_dot(a, g, v), triton_dot(a, g, v))


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)])
def test_empty(shape: tuple[int, int, int, int]) -> None:
    b, t, i, o = shape
    a, g, v = (torch.ones(s, device=DEVICE) for s in ((b, t, i), (b, t, o), (o, i)))
    assert triton_dot(a, g, v).tolist() == [0.0] * b


def meta(b: int, t: int, i: int, o: int, types: tuple[torch.dtype, ...] = (BF16, BF16, BF16)) -> tuple[Tensor, ...]:
    sizes = (b, t, i), (b, t, o), (o, i)
    return tuple(torch.empty(s, dtype=x, device="meta") for s, x in zip(sizes, types, strict=True))


def tile_of(*tensors: Tensor) -> tuple[int, int, int]:
    arguments = dot.plan(*tensors, 9)[0].arguments
    return arguments["BLOCK_M"], arguments["BLOCK_N"], arguments["BLOCK_K"]


def test_dispatch_on_both_sides_of_each_limit() -> None:
    tiles, floats = dot.HALF_TILES[9], dot.FLOAT_TILES[8]

    def size(tile: dot.Tile) -> tuple[int, int, int]:
        return tile.m, tile.n, tile.k

    assert tile_of(*meta(dot.FEW_ROWS, 1, 512, 512)) == size(tiles.few_rows)
    assert tile_of(*meta(dot.FEW_ROWS + 1, 1, 512, 512)) == size(tiles.large)
    assert tile_of(*meta(8, 64, 512, dot.NARROW)) == size(tiles.narrow)
    assert tile_of(*meta(8, 64, 512, dot.NARROW + 16)) == size(tiles.large)
    assert tile_of(*meta(8, 64, 513, 512)) == size(tiles.small)
    assert tile_of(*meta(8, 64, 512, 512, (F32, F32, F32))) == size(floats.large)
    assert tile_of(*meta(8, 64, 512, 512, (F32, F32, BF16))) == size(floats.small)
    assert tile_of(*meta(8, 64, 512, 512, (BF16, F32, BF16))) == size(dot.HALF_TILES[8].large)
    # K is cut where the tiles alone do not fill a card, or a sum on tensor cores would be too long.
    assert dot.plan(*meta(1, 1, 4096, 1024), 9)[0].grid == (1024 // tiles.few_rows.n, 8)
    assert dot.plan(*meta(64, 1024, 4096, 4096, (F32, F32, F32)), 9)[0].grid[1] == 1
    for dtype, longest in ((BF16, 1152), (FP16, 512)):
        assert [dot.plan(*meta(64, 1024, k, k, (dtype,) * 3), 9)[0].grid[1] for k in (longest, longest + 16)] == [1, 2]


def test_tiles_end_with_each_sample_where_few_rows_are_wasted() -> None:
    """Then they write one sum each; a sample of a classifier's layer has no rows for a tile of its own."""
    m = dot.HALF_TILES[9].large.m
    for t, whole in ((m, True), (m + 1, False), (16 * m - m // 2, True), (8 * m - m // 2, False)):
        launch, partial = dot.plan(*meta(3, t, 512, 512), 9)
        tiles = -(-t // m)
        assert launch.arguments["WHOLE"] == whole
        assert launch.grid[0] == (3 * tiles if whole else -(-3 * t // m)) * partial.shape[1]
        assert partial.shape[2] == (3 * tiles if whole else 3 * t)


@pytest.mark.parametrize("b", [1, 3])
@pytest.mark.parametrize("t", [124, 125, 128, 256])
def test_a_sample_s_own_tiles(t: int, b: int) -> None:
    """Full ones, and a last one whose spare rows are left out, as whole samples' sums, at any stride."""
    a, g, v = draw(b, t, 40, 144, (BF16, BF16, BF16), gap=16)
    assert dot.plan(a, g, v, 8)[0].arguments["WHOLE"]
    plain = check(a, g, v)
    assert torch.equal(check(a[:1], g[:1], v), plain[:1])
    check(a.transpose(0, 1).contiguous().transpose(0, 1), g, v)


def test_two_launches_and_nothing_else() -> None:
    for shape in ((2, 128, 40, 144), (2, 3, 1100, 40), (40, 1, 20, 30)):
        a, g, v = draw(*shape, (BF16, BF16, BF16))
        assert work_of(lambda a=a, g=g, v=v: dot.grad_dot(a, g, v)) == ["_grad_dot", "_total_samples"]


def test_the_order_of_the_product() -> None:
    def left_is_grads(*types: torch.dtype, i: int = 64, o: int = 32) -> bool:
        inputs, grads, direction = meta(2, 3, i, o, types)
        return dot.orient(inputs, grads, direction)[0] is grads

    assert not left_is_grads(BF16, BF16, BF16)  # the narrower product: A Vᵀ, 32 columns
    assert left_is_grads(BF16, BF16, BF16, i=32, o=64)
    assert left_is_grads(F32, BF16, BF16)  # but rather the one on tensor cores
    assert left_is_grads(F32, BF16, F32)  # even three times over
    assert not left_is_grads(F32, F32, F32)
