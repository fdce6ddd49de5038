"""The Triton kernel of topk_scan against float64: on a GPU where there is one, under the interpreter elsewhere."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import assay
from assay.kernels import scan
from assay.ops import scan_scores, topk_scan
from assay.ops.scan import REDUCTIONS
from tests.grid import checkered
from tests.kernels.guarded import DEVICE, GAPS, MARGIN, far_apart, fence_intact, fenced

F32, BF16, FP16, INT8 = torch.float32, torch.bfloat16, torch.float16, torch.int8
DTYPES = [F32, BF16, FP16, INT8]
SHAPES = [  # (N, d, M); what it is there for
    (1, 1, 1),
    (128, 32, 1),  # a block of rows, a step of columns
    (129, 33, 1),  # one more of each
    (300, 515, 1),  # more steps than are in flight
    (127, 31, 2),  # one less of each
    (200, 96, 16),  # all queries of the smallest matrix product
    (140, 70, 17),  # one query more
    (130, 48, 33),  # two passes
    (20, 0, 3),  # no columns: every score is 0
]

pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy, under the interpreter


def triton_scores(features: Tensor, queries: Tensor, reduce: str, scales: Tensor | None = None) -> Tensor:
    with assay.backend("triton"):
        return scan_scores(features, queries, reduce=reduce, scales=scales)  # type: ignore[arg-type]


def triton_topk(
    features: Tensor, queries: Tensor, k: int, reduce: str, scales: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    with assay.backend("triton"):
        return topk_scan(features, queries, k, reduce=reduce, scales=scales)  # type: ignore[arg-type]


def draw(n: int, d: int, m: int, dtype: torch.dtype, gap: int = 3) -> tuple[Tensor, Tensor, Tensor | None]:
    """Features, queries and scales. What surrounds the features is NaN, or for int8 the far end of its range."""
    queries = torch.randn(m, d, device=DEVICE)
    if dtype != INT8:
        return fenced(torch.randn(n, d).to(dtype), gap), queries, None
    buffer = torch.full((MARGIN + n * (d + gap) + MARGIN,), -128, dtype=INT8, device=DEVICE)
    features = buffer[MARGIN : MARGIN + n * (d + gap)].view(n, d + gap)[:, :d]
    features.copy_(torch.randint(-127, 128, (n, d), dtype=INT8))
    return features, queries, torch.rand(n, device=DEVICE) / 50


def exact_scores(features: Tensor, queries: Tensor, scales: Tensor | None) -> Tensor:
    scores = queries.double() @ features.double().T
    return scores if scales is None else scores * scales.double()


def reduced(scores: Tensor, reduce: str) -> Tensor:
    return scores if reduce == "none" else scores.mean(0) if reduce == "mean" else scores.amax(0)


def check(features: Tensor, queries: Tensor, scales: Tensor | None, reduce: str) -> Tensor:
    """The kernel's scores, after they have been held against float64 as tests/ops/test_scan.py does."""
    got = triton_scores(features, queries, reduce, scales)
    exact = reduced(exact_scores(features, queries, scales), reduce)
    norms = queries.double().norm(dim=1)[:, None] * features.double().norm(dim=1)
    norms = norms if scales is None else norms * scales
    assert got.dtype == F32
    assert got.device.type == DEVICE
    assert bool(((got - exact).abs() <= 2e-6 * (norms if reduce == "none" else norms.amax(0))).all())
    return got


def assert_ranked(found: tuple[Tensor, Tensor], scores: Tensor, k: int) -> None:
    """Values and indices are the k best of the scores by value, NaN last, ties by index."""
    rows = []
    for row in scores.reshape(-1, scores.shape[-1]).tolist():
        order = sorted(range(len(row)), key=lambda i: (math.isnan(row[i]), 0 if math.isnan(row[i]) else -row[i], i))
        rows.append(order[:k])
    want = torch.tensor(rows, device=scores.device).reshape(*scores.shape[:-1], k)
    values, indices = found
    assert torch.equal(indices, want)
    assert values.dtype == F32
    assert torch.equal(values.nan_to_num(7.0), scores.gather(-1, want).nan_to_num(7.0))


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sorting takes the interpreter seconds per block of the usual size."""
    monkeypatch.setattr(scan, "BLOCK_ROWS", 16)
    monkeypatch.setattr(scan, "MOST_KEPT", 16)


@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d", "m"), SHAPES)
def test_against_float64(n: int, d: int, m: int, dtype: torch.dtype, gap: int) -> None:
    features, queries, scales = draw(n, d, m, dtype, gap)
    for reduce in REDUCTIONS:
        check(features, queries, scales, reduce)


@pytest.mark.parametrize(("shape", "dtype"), checkered(SHAPES[:5], [F32, INT8], every=5))
def test_the_best_are_those_of_the_scores(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    n, d, m = shape
    features, queries, scales = draw(n, d, m, dtype)
    for reduce in ("mean", "max"):
        scores = triton_scores(features, queries, reduce, scales)
        for k in {1, min(n, 10), min(n, scan.MOST_KEPT), n}:
            assert_ranked(triton_topk(features, queries, k, reduce, scales), scores, k)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("n", "d", "m"), [(40, 70, 3), (30, 20, 33)])
def test_every_query_s_own_best(n: int, d: int, m: int) -> None:
    features, queries, _ = draw(n, d, m, FP16)
    scores = triton_scores(features, queries, "none")
    for k in (9, n):
        assert_ranked(triton_topk(features, queries, k, "none"), scores, k)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("programs", [1, 2])
def test_chunks_of_many_blocks(monkeypatch: pytest.MonkeyPatch, programs: int) -> None:
    """Blocks with better rows, without, and with a tie that must not win; the last chunk shorter than the others."""
    monkeypatch.setattr(scan, "RANKING_PROGRAMS", programs)
    features = torch.randint(-2, 3, (7 * scan.BLOCK_ROWS + 5, 4), device=DEVICE).float()
    features[70, :] = 9
    query = torch.ones(1, 4, device=DEVICE)
    scores = triton_scores(features, query, "max")
    for k in (3, scan.MOST_KEPT):
        launch, _ = scan.plan(features, None, query, True, k)
        assert launch.grid == (programs,)
        assert_ranked(triton_topk(features, query, k, "max"), scores, k)
    features = features[: 2 * scan.BLOCK_ROWS]
    queries = torch.randint(-2, 3, (3, 4), device=DEVICE).float()
    assert_ranked(triton_topk(features, queries, 5, "none"), triton_scores(features, queries, "none"), 5)


@pytest.mark.usefixtures("small_blocks")
def test_both_sides_of_most_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "PIECE_SCORES", 2 * 20)  # several pieces, the last a part
    features, queries, _ = draw(50, 20, 2, F32)
    features[::3] = features[:1]
    for reduce in ("max", "none"):
        scores = triton_scores(features, queries, reduce)
        for k in (scan.MOST_KEPT, scan.MOST_KEPT + 1, 50):
            assert_ranked(triton_topk(features, queries, k, reduce), scores, k)


@pytest.mark.parametrize("k", [40, 139, 140])  # ranked by the kernel and by torch
@pytest.mark.parametrize("dtype", [F32, FP16])
@pytest.mark.parametrize("m", [1, 3])
def test_nan_ranks_last_and_infinities_at_the_ends(m: int, dtype: torch.dtype, k: int) -> None:
    features = torch.randn(140, 20, device=DEVICE).to(dtype)
    features[3, 5] = math.nan
    features[0] = math.nan
    features[7, 0] = math.inf
    features[9, 0] = -math.inf
    features[30, 19] = -math.inf
    queries = torch.rand(m, 20, device=DEVICE) + 0.1  # positive: infinities keep their sign
    queries[:, 0] = 0.1  # no TF32 number: the second term of ∞ · 0.1 has a sign of its own
    for reduce in REDUCTIONS if k == 140 else ("max",):
        scores = triton_scores(features, queries, reduce).reshape(-1, 140)
        assert bool((scores[:, 7] == math.inf).all())
        assert bool((scores[:, [9, 30]] == -math.inf).all())
        assert bool(scores[:, [0, 3]].isnan().all())
        assert int(scores.isfinite().sum()) == len(scores) * 135
        values, indices = (x.reshape(-1, k) for x in triton_topk(features, queries, k, reduce))
        assert_ranked((values, indices), scores, k)


def test_ranks_order_as_rows_do() -> None:
    """... and give value and index back, in torch as in the kernel."""
    scores = torch.tensor([[math.nan, -math.inf, -1e30, -1e-45, -0.0, 0.0, 1e-45, 1.0, math.inf]], device=DEVICE)
    ranks = scan.ranks_of(scores, 5)
    assert ranks.argsort(descending=True)[0].tolist() == [8, 7, 6, 4, 5, 3, 2, 1, 0]
    assert bool((ranks > scan.NOTHING.value).all())
    values, rows = scan.rows_of(ranks)
    assert torch.equal(values.nan_to_num(7.0), scores.nan_to_num(7.0))
    assert rows.tolist() == [list(range(5, 14))]
    features, query = scores.T.contiguous(), torch.ones(1, 1, device=DEVICE)
    assert triton_topk(features, query, 9, "max")[1].tolist() == [8, 7, 6, 4, 5, 3, 2, 1, 0]


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_one_query_s_nan_or_infinity_is_the_maximum_s(dtype: torch.dtype) -> None:
    features, queries = torch.rand(6, 4, device=DEVICE).to(dtype) + 1, torch.rand(70, 4, device=DEVICE)
    for place in (0, 33, 69):  # of the first pass, the second, the third
        for value in (math.nan, math.inf):
            broken = queries.clone()
            broken[place] = value
            got = triton_scores(features, broken, "max")
            assert bool((got.isnan() if math.isnan(value) else got == value).all())
    lowest = torch.full((3, 4), -math.inf, device=DEVICE)
    assert bool((triton_scores(features, lowest, "max") == -math.inf).all())


@pytest.mark.parametrize("dtype", [FP16, INT8])
@pytest.mark.parametrize("m", [1, 3])
def test_scores_depend_on_no_other_row(m: int, dtype: torch.dtype) -> None:
    features, queries, scales = draw(300, 100, m, dtype, gap=28)
    whole = triton_scores(features, queries, "none", scales)
    for start, end in ((0, 1), (37, 101), (127, 300)):
        part = None if scales is None else scales[start:end]
        assert torch.equal(whole[:, start:end], triton_scores(features[start:end], queries, "none", part))
    assert torch.equal(whole, triton_scores(features, queries, "none", scales))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(dtype: torch.dtype) -> None:
    features, queries, scales = draw(140, 24, 3, dtype)
    wide = torch.empty(280, 48, dtype=dtype, device=DEVICE)
    for m in (1, 3):
        want = triton_scores(features, queries[:m], "none", scales)
        for view in (wide[::2, :24], wide[::2, ::2], torch.empty(24, 150, dtype=dtype, device=DEVICE)[:, :140].T):
            view.copy_(features)
            scattered = None if scales is None else torch.stack([scales, scales], 1)[:, 0]
            assert torch.equal(triton_scores(view, queries[:m], "none", scattered), want)
    one, scale = features[:1].expand(140, 24), None if scales is None else scales[:1].expand(140)  # row stride 0
    for k in (20, 140):
        assert triton_topk(one, queries, k, "max", scale)[1].tolist() == list(range(k))


def test_only_strided_columns_are_copied() -> None:
    features, queries, _ = draw(50, 24, 3, FP16)
    for x in (features, features[::2], features[:, 3:17], features[:1].expand(9, -1)):
        arguments = scan.plan(x, None, queries[:, : x.shape[1]].contiguous(), True)[0].arguments
        assert arguments["features"].data_ptr() == x.data_ptr()
    assert scan.plan(features[:, ::2], None, queries, True)[0].arguments["features"].is_contiguous()


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("m", "maximum"), [(1, True), (5, True), (5, False)])
@pytest.mark.parametrize("k", [0, 7])
def test_every_result_is_written_and_nothing_else(m: int, maximum: bool, k: int) -> None:
    features, queries, _ = draw(41, 40, m, FP16)
    launch, out = scan.plan(features, None, queries, maximum, k)
    values = torch.full((MARGIN + out.numel() + MARGIN,), -1, dtype=torch.int64, device=DEVICE)
    if k:
        launch.arguments["out"] = values[MARGIN : MARGIN + out.numel()].view(out.shape)
        launch.run(features)
        # NOTHING where a chunk has fewer rows than are kept; both of these have enough
        assert bool((launch.arguments["out"].sort(-1, descending=True).values == launch.arguments["out"]).all())
        assert not (launch.arguments["out"] == -1).any()
        assert bool((values[:MARGIN] == -1).all() and (values[-MARGIN:] == -1).all())
    else:
        launch.arguments["out"] = fenced(torch.full(out.shape, torch.nan), 0)
        launch.run(features)
        assert not launch.arguments["out"].isnan().any()
        assert fence_intact(launch.arguments["out"])


@pytest.mark.parametrize("m", [1, 3])
def test_offsets_beyond_two_to_the_31(m: int) -> None:
    """Rows 2³⁰ elements apart: 32-bit offsets would wrap on the third."""
    features, queries, _ = draw(3, 8, m, FP16)
    (rows,) = far_apart(features)
    assert torch.equal(triton_scores(rows, queries, "none"), triton_scores(features, queries, "none"))
    assert torch.equal(triton_topk(rows, queries, 3, "max")[1], triton_topk(features, queries, 3, "max")[1])


def test_two_terms_are_a_float32() -> None:
    queries = torch.randn(40, 50) * 10.0 ** torch.randint(-20, 20, (40, 50))
    high, low = scan.terms(queries)
    assert bool(((high.double() + low.double() - queries.double()).abs() <= 2**-22 * queries.double().abs()).all())
    for term in (high, low):
        assert not (term.view(torch.int32) & 0x1FFF).any()  # nothing for TF32 to round away
    ends = torch.tensor([[math.inf, -math.inf, math.nan, torch.finfo(F32).max, 0.0]])
    high, low = scan.terms(ends)
    assert torch.equal(high.isfinite(), ends.isfinite())
    assert high[0, :2].tolist() == [math.inf, -math.inf]
    assert bool(low.isfinite().all())


def test_dispatch_on_both_sides_of_each_limit() -> None:
    def tile(m: int, dtype: torch.dtype = FP16, d: int = 512) -> tuple[int, int, int]:
        features, queries = torch.empty(5000, d, dtype=dtype, device="meta"), torch.empty(m, d, device="meta")
        arguments = scan.plan(features, None, queries, True)[0].arguments
        return arguments["BLOCK_M"], arguments["passes"], arguments["BLOCK_D"]

    _, some, more = scan.HALF_TILES
    assert tile(1)[:2] == (1, 1)
    assert tile(2) == tile(some.queries) == (some.queries, 1, some.d)
    assert tile(some.queries + 1) == tile(more.queries) == (more.queries, 1, more.d)
    assert tile(more.queries + 1)[:2] == (more.queries, 2)
    assert tile(2, F32) == (16, 1, scan.FLOAT_TILES[1].d)
    assert tile(2, d=some.d // 2 + 1)[2] == some.d
    assert tile(2, d=5)[2] == 16  # the least a matrix product takes


def test_candidates_stay_few() -> None:
    """Whatever N and M: at most RANKING_PROGRAMS times the queries of a tile times k ranks."""
    for n, m in ((10**9, 1), (10**7, 1000), (10**8, 33)):
        features, queries = torch.empty(n, 64, dtype=FP16, device="meta"), torch.empty(m, 64, device="meta")
        launch, ranks = scan.plan(features, None, queries, False, 100)
        assert launch.grid[0] <= scan.RANKING_PROGRAMS
        assert ranks.numel() <= scan.RANKING_PROGRAMS * launch.arguments["BLOCK_M"] * 100
        chunks = ranks.shape[1]
        assert chunks * launch.arguments["blocks"] * scan.BLOCK_ROWS >= n


def test_too_many_rows_is_an_error() -> None:
    features, queries = torch.empty(2**32, 1, dtype=INT8, device="meta"), torch.empty(1, 1, device="meta")
    with pytest.raises(ValueError, match=r"at most 4294967295 rows.*got 4294967296; scan them in parts"):
        scan.topk_scan(features, None, queries, 1, True)


def test_empty() -> None:
    features, queries = torch.empty(0, 4, device=DEVICE), torch.ones(2, 4, device=DEVICE)
    for reduce in REDUCTIONS:
        assert triton_topk(features, queries, 0, reduce)[1].shape == ((2, 0) if reduce == "none" else (0,))
        assert triton_scores(features, queries, reduce).shape[-1] == 0
    assert triton_topk(torch.ones(5, 4, device=DEVICE), queries, 0, "max")[0].shape == (0,)
