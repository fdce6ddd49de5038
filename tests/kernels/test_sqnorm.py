"""The Triton kernels of grad_sqnorm against float64: on a GPU where there is one, under the interpreter elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import assay
from assay.kernels import sqnorm
from assay.ops import grad_sqnorm
from assay.ops.sqnorm import CANCELLED
from tests.grid import checkered
from tests.kernels.guarded import DEVICE, GAPS, far_apart, fence_intact, fenced
from tests.kernels.work import work_of

F32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
SHAPES = [  # (B, T, I, O); what it is there for
    (4, 1, 5, 7),  # one position
    (1, 1, 1025, 1024),  # one position, one feature past a block
    (3, 2, 70, 60),  # less than the smallest tile
    (2, 16, 65, 64),  # exactly a tile; a feature past a block, exactly a block
    (2, 17, 64, 65),
    (2, 64, 70, 90),  # a tile of 64
    (1, 65, 330, 320),  # two tiles
    (1, 190, 270, 260),  # three tiles, the last not full
    (2, 300, 8, 6),  # product plan
    (2, 201, 40, 33),  # product plan, positions past a block
    (1, 400, 130, 129),  # product plan, several tiles on both sides
]
TYPES = [(F32, F32), (BF16, BF16), (FP16, FP16), (BF16, F32), (F32, FP16)]


def triton_sqnorm(inputs: Tensor, grads: Tensor) -> Tensor:
    with assay.backend("triton"):
        return grad_sqnorm(inputs, grads)


def exact(inputs: Tensor, grads: Tensor) -> Tensor:
    return (grads.double().mT @ inputs.double()).square().sum((1, 2))


def check(inputs: Tensor, grads: Tensor) -> Tensor:
    """The kernel's result, after it has been held against float64 as tests/ops/test_gradients.py does."""
    result = triton_sqnorm(inputs, grads)
    assert result.dtype == F32
    assert result.device.type == DEVICE
    torch.testing.assert_close(result.double(), exact(inputs, grads), rtol=2e-6, atol=0)
    return result


def draw(
    b: int, t: int, i: int, o: int, types: tuple[torch.dtype, torch.dtype] = (F32, F32), gap: int = 0
) -> tuple[Tensor, Tensor]:
    return fenced(torch.randn(b, t, i).to(types[0]), gap), fenced(torch.randn(b, t, o).to(types[1]), gap)


def plan_name(inputs: Tensor, grads: Tensor, generation: int = 8) -> str:
    return sqnorm.plan(inputs, grads, CANCELLED, generation)[0][0].kernel.__name__


@pytest.mark.parametrize(("shape", "types", "gap"), checkered(SHAPES, TYPES[:3], GAPS, every=3))
def test_against_float64(shape: tuple[int, int, int, int], types: tuple[torch.dtype, torch.dtype], gap: int) -> None:
    check(*draw(*shape, types, gap))


@pytest.mark.parametrize("types", TYPES[3:])
@pytest.mark.parametrize("shape", [(2, 1, 9, 20), (2, 17, 64, 65), (2, 201, 40, 33)])
def test_mixed_types(shape: tuple[int, int, int, int], types: tuple[torch.dtype, torch.dtype]) -> None:
    check(*draw(*shape, types))


def test_the_shapes_above_reach_every_plan() -> None:
    plans = [sqnorm.plan(torch.empty(b, t, i), torch.empty(b, t, o), CANCELLED, 8)[0] for b, t, i, o in SHAPES]
    assert {plan[0].kernel.__name__ for plan in plans} == {"_single", "_gram", "_product"}
    assert {plan[0].arguments["partial"].shape[2] for plan in plans if plan[0].kernel is sqnorm._gram} == {1, 3, 6}


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU runs its own generation's tiles")
@pytest.mark.parametrize("generation", [8, 9, 10, 12])
@pytest.mark.parametrize("types", TYPES[:2])
def test_every_generation_s_tiles(
    monkeypatch: pytest.MonkeyPatch, generation: int, types: tuple[torch.dtype, torch.dtype]
) -> None:
    monkeypatch.setattr(sqnorm, "generation", lambda tensor: generation)
    monkeypatch.setattr(sqnorm, "LARGE_GRAMS", 2)  # the largest Gram tile
    for shape in ((1, 144, 400, 400), (1, 400, 80, 144), (1, 400, 80, 16)):
        check(*draw(*shape, types, gap=16))


@pytest.mark.parametrize("types", TYPES[:2])
@pytest.mark.parametrize("t", [2, 33, 100])
def test_the_plans_agree(monkeypatch: pytest.MonkeyPatch, t: int, types: tuple[torch.dtype, torch.dtype]) -> None:
    a, g = draw(2, t, 50, 40, types)
    norms = []
    for cheaper in (True, False):
        monkeypatch.setattr(sqnorm, "gram_is_cheaper", lambda *_, cheaper=cheaper: cheaper)
        assert plan_name(a, g) == ("_gram" if cheaper else "_product")
        norms.append(check(a, g))
    torch.testing.assert_close(*norms, rtol=2e-6, atol=0)


def cancelling(types: tuple[torch.dtype, torch.dtype]) -> tuple[Tensor, Tensor]:
    """Three samples; in the second every token is undone by the next, but one, almost."""
    a, g = draw(3, 64, 256, 256, types)
    a[1, 1::2] = a[1, ::2]
    g[1, 1::2] = -g[1, ::2]
    g[1, 1] *= 1 + 2**-6
    terms = a.double().square().sum((1, 2)) * g.double().square().sum((1, 2))
    assert bool(exact(a, g)[1] < 1e-3 * terms[1] / 64), "the batch does not cancel"
    assert plan_name(a, g) == "_gram"
    return a, g


@pytest.mark.parametrize("types", TYPES[:2])
def test_cancelling_tokens_keep_their_norm(types: tuple[torch.dtype, torch.dtype]) -> None:
    """Opacus 1.6 returns exactly 0 for such a batch in bfloat16: a negative Gram sum behind a clamp."""
    a, g = cancelling(types)
    result, want = triton_sqnorm(a, g), exact(a, g)
    torch.testing.assert_close(result[1].double(), want[1], rtol=1e-4, atol=0)
    torch.testing.assert_close(result.double()[::2], want[::2], rtol=2e-6, atol=0)


def test_only_cancelled_samples_are_computed_again() -> None:
    a, g = cancelling((F32, F32))
    a = a * 1.7  # where the two ways round one of the other samples differently
    gram = sqnorm.grad_sqnorm(a, g, cancelled=-2.0)  # no sum is below this
    product = sqnorm.grad_sqnorm(a, g, cancelled=2.0)  # every sum is
    result = sqnorm.grad_sqnorm(a, g, CANCELLED)
    assert result[1] == product[1] != gram[1]
    assert torch.equal(result[::2], gram[::2])
    assert not torch.equal(gram[::2], product[::2])


def test_a_sample_without_a_gradient_is_zero() -> None:
    a, g = draw(3, 9, 33, 17)
    g[1] = 0
    assert triton_sqnorm(a, g)[1] == 0


def test_strides() -> None:
    a, g = draw(4, 6, 20, 24)
    plain = check(a, g)
    same = torch.testing.assert_close
    same(check(a.transpose(0, 1).contiguous().transpose(0, 1), g), plain)
    same(check(a.mT.contiguous().mT, g), plain)
    check(a, g[:, :, :1].expand(4, 6, 24))  # stride 0
    check(a[:, ::2, ::2], g[:, ::2])
    assert torch.equal(triton_sqnorm(a[:, 0], g[:, 0]), triton_sqnorm(a[:, :1], g[:, :1]))


@pytest.mark.parametrize("shape", [(3, 70, 120, 110), (3, 300, 8, 6), (3, 1, 9, 8)])
def test_every_partial_sum_is_written_and_nothing_else(shape: tuple[int, int, int, int]) -> None:
    a, g = draw(*shape)
    launches, _ = sqnorm.plan(a, g, CANCELLED, 8, interpret=DEVICE == "cpu")
    for launch in launches:
        name = "out" if "out" in launch.arguments else "partial"
        sums = fenced(torch.full_like(launch.arguments[name], torch.nan), 0)
        launch.run(a)
        filled = launch.arguments[name]
        launch.arguments[name] = sums
        launch.run(a)
        assert torch.equal(sums, filled)
        assert not sums.isnan().any()
        assert fence_intact(sums)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy, under the interpreter
@pytest.mark.parametrize("shape", [(3, 43, 129, 48), (3, 300, 9, 7), (3, 1, 9, 7)])
def test_other_samples_infinities_stay_theirs(shape: tuple[int, int, int, int]) -> None:
    a, g = draw(*shape)
    clean = triton_sqnorm(a, g)
    a[1, 0, 7] = torch.inf
    g[2, shape[1] - 1, 6] = torch.nan
    result = triton_sqnorm(a, g)
    assert result[0] == clean[0]
    assert not result[1:].isfinite().any()


@pytest.mark.parametrize(("t", "plan"), [(1, "_single"), (3, "_gram"), (200, "_product")])
def test_offsets_beyond_two_to_the_31(t: int, plan: str) -> None:
    """Samples 2³⁰ elements apart: a 32-bit offset would wrap on the third."""
    a, g = draw(3, t, 8, 3, (FP16, FP16))
    far_a, far_g = far_apart(a, g)
    assert plan_name(far_a, far_g) == plan
    assert torch.equal(triton_sqnorm(far_a, far_g), check(a, g))


def test_the_same_bits_every_time() -> None:
    for shape in ((2, 70, 90, 80), (2, 201, 40, 33)):
        a, g = draw(*shape, (BF16, BF16))
        assert torch.equal(triton_sqnorm(a, g), triton_sqnorm(a, g))


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)])
def test_empty(shape: tuple[int, int, int, int]) -> None:
    b, t, i, o = shape
    a, g = torch.ones(b, t, i, device=DEVICE), torch.ones(b, t, o, device=DEVICE)
    assert triton_sqnorm(a, g).tolist() == [0.0] * b


def meta(b: int, t: int, i: int, o: int, types: tuple[torch.dtype, ...] = (BF16, BF16)) -> tuple[Tensor, Tensor]:
    return torch.empty(b, t, i, dtype=types[0], device="meta"), torch.empty(b, t, o, dtype=types[1], device="meta")


def test_the_cheaper_plan_is_taken() -> None:
    """T < 2IO/(I+O), less about a tile: at I = O = 4,096 and tiles of 128, T < 3,968."""
    assert plan_name(*meta(8, 4096 - 256, 4096, 4096), 9) == "_gram"
    assert plan_name(*meta(8, 4096, 4096, 4096), 9) == "_product"
    assert plan_name(*meta(8, 64, 4096, 16), 9) == "_product"  # 2IO/(I+O) is 32
    assert plan_name(*meta(8, 4096 - 256, 4096, 4096, (BF16, F32)), 9) == "_gram"
    assert plan_name(*meta(8, 4096, 4096, 4096, (F32, F32)), 9) == "_product"


def test_dispatch_on_both_sides_of_each_limit() -> None:
    grams, products = sqnorm.HALF_GRAMS[9], sqnorm.HALF_PRODUCTS[9]
    for t, tile in ((2, 16), (16, 16), (17, 32), (32, 32), (33, 64), (64, 64), (65, 64), (640, 64)):
        assert sqnorm.gram_tile(*meta(1, t, 512, 512), 9).tile == tile
    full = (sqnorm.LARGE_GRAMS - 1) // 15  # 640 positions are 15 pairs of tiles of 128
    assert sqnorm.gram_tile(*meta(full, 640, 512, 512), 9) == grams[-2]
    assert sqnorm.gram_tile(*meta(full + 1, 640, 512, 512), 9) == grams[-1]
    assert sqnorm.gram_tile(*meta(full + 1, 640, 512, 513), 9) == sqnorm.RAGGED_GRAMS[8][-1]
    assert sqnorm.gram_tile(*meta(1, 64, 512, 512, (BF16, F32)), 9) == sqnorm.FLOAT_GRAMS[8][-1]
    assert sqnorm.product_tile(*meta(1, 64, 512, sqnorm.NARROW), 9) == products.narrow
    assert sqnorm.product_tile(*meta(1, 64, 512, sqnorm.NARROW + 16), 9) == products.large
    assert sqnorm.product_tile(*meta(1, 64, 512, 511), 9) == products.small
    assert sqnorm.product_tile(*meta(1, 64, 512, 512, (BF16, F32)), 9) == sqnorm.FLOAT_PRODUCTS[8].small


def test_no_more_launches_than_the_plans_have() -> None:
    plans = {
        (3, 1, 9, 8): ["_single"],
        (3, 64, 256, 256): ["_gram", "_product", "_total_samples"],
        (3, 300, 8, 6): ["_product", "_total_samples"],
    }
    for shape, names in plans.items():
        a, g = draw(*shape)
        assert work_of(lambda a=a, g=g: sqnorm.grad_sqnorm(a, g, CANCELLED)) == names


def test_programs_that_look_for_cancelled_samples_fit_a_card() -> None:
    """All at a time: most find none."""
    for b in (1, 8, 1000):
        second = sqnorm.plan(*meta(b, 512, 4096, 4096), CANCELLED, 9)[0][1]
        assert second.kernel.__name__ == "_product"
        assert second.grid[0] == max(b, sqnorm.RECOMPUTING)


def test_each_pair_of_tiles_is_visited_once() -> None:
    """The kernel's circle, in Python: tile p % n with the tile p // n further on."""
    for n in range(1, 20):
        pairs = [(p % n, (p % n + p // n) % n) for p in range(n * (n + 1) // 2)]
        assert len({frozenset(pair) for pair in pairs}) == n * (n + 1) // 2
        assert [a == b for a, b in pairs] == [p < n for p in range(len(pairs))]
