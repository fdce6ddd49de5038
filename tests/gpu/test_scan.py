"""topk_scan and scan_scores on the GPU against float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from assay.ops.scan import REDUCTIONS, merge_topk
from tests.gpu.harness import assert_same, assert_within, here, kernel, needs_memory, peak_bytes, unaligned

topk_scan, scan_scores = kernel("topk_scan"), kernel("scan_scores")

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8]
SHAPES = [  # (N, d, M): why
    (1, 1, 1),
    (129, 33, 1),  # one past a block of rows and a step of columns
    (1000, 512, 1),
    (127, 31, 2),
    (1000, 512, 16),  # all queries of a tile
    (999, 100, 17),  # one more; nothing a multiple of anything
    (500, 1100, 33),  # several passes over the queries
    *here([(1_000_003, 512, 1), (300_000, 512, 64), (100_000, 4096, 5)], []),  # many chunks of many blocks
]


def draw(n: int, d: int, m: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    queries = torch.randn(m, d, device=device)
    if dtype != torch.int8:
        return torch.randn(n, d, device=device).to(dtype), queries, None
    features = torch.randint(-127, 128, (n, d), dtype=dtype, device=device)
    return features, queries, torch.rand(n, device=device) / 50


def multiplied(features: Tensor, queries: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    scores = queries.to(dtype) @ features.to(dtype).T
    return scores if scales is None else scores * scales.to(dtype)


def reduced(scores: Tensor, reduce: str) -> Tensor:
    return scores if reduce == "none" else scores.mean(0) if reduce == "mean" else scores.amax(0)


def ranked(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """By the order that topk_scan promises, from all the scores."""
    return merge_topk(scores, torch.arange(scores.shape[-1], device=scores.device).expand_as(scores), k)


def assert_best(found: tuple[Tensor, Tensor], scores: Tensor, k: int, what: str) -> None:
    values, indices = ranked(scores, k)
    assert torch.equal(found[1], indices), f"{what}: other rows"
    assert torch.equal(found[0].nan_to_num(7.0), values.nan_to_num(7.0)), f"{what}: other values"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d", "m"), SHAPES)
def test_against_float64(n: int, d: int, m: int, dtype: torch.dtype, device: torch.device) -> None:
    features, queries, scales = draw(n, d, m, dtype, device)
    exact = multiplied(features, queries, scales, torch.float64)
    plain = multiplied(features, queries, scales, torch.float32)
    size = queries.double().norm(dim=1)[:, None] * features.double().norm(dim=1)
    size = size if scales is None else size * scales
    for reduce in REDUCTIONS:
        scores = scan_scores(features, queries, reduce=reduce, scales=scales)
        scale = size if reduce == "none" else size.amax(0)
        assert_within(scores, reduced(exact, reduce), reduced(plain, reduce), scale, reduce)
        for k in {1, min(n, 100), min(n, 128), min(n, 129), min(n, 5000)}:
            found = topk_scan(features, queries, k, reduce=reduce, scales=scales)
            assert_best(found, scores, k, f"{reduce}, k = {k}")


@pytest.mark.parametrize("k", [10, 128, 2000])
@pytest.mark.parametrize("m", [1, 3, 40])
def test_ties_take_the_lower_index(m: int, k: int, device: torch.device) -> None:
    """Whole numbers, so that sums are exact and ties real."""
    features = torch.randint(-1, 2, (here(200_000, 3000), 8), device=device).half()
    queries = torch.randint(-2, 3, (m, 8), device=device).float()
    exact = queries @ features.float().T
    for reduce in ("max", "none"):
        scores = reduced(exact, reduce)
        assert_best(topk_scan(features, queries, k, reduce=reduce), scores, k, reduce)


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("m", [1, 5, 40])
def test_nan_ranks_last_and_infinities_at_the_ends(m: int, dtype: torch.dtype, device: torch.device) -> None:
    features = torch.randn(140, 20, device=device).to(dtype)
    features[3, 5] = math.nan
    features[0] = math.nan
    features[7, 0] = math.inf
    features[9, 0] = -math.inf
    queries = torch.rand(m, 20, device=device) + 0.1  # positive: infinities keep their sign
    for reduce in REDUCTIONS:
        for k in (128, 140):
            values, indices = (x.reshape(-1, k) for x in topk_scan(features, queries, k, reduce=reduce))
            assert bool((indices[:, 0] == 7).all())
            assert bool((values[:, 0] == math.inf).all())
            if k == 140:
                assert indices[:, -3:].tolist() == [[9, 0, 3]] * len(indices)
                assert bool(values[:, -2:].isnan().all())
    queries[m - 1, 2] = math.nan
    assert bool(scan_scores(features, queries, reduce="max").isnan().all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(dtype: torch.dtype, device: torch.device) -> None:
    features, queries, scales = draw(300, 96, 5, dtype, device)
    wide = torch.empty(600, 200, dtype=dtype, device=device)
    for m in (1, 5):
        want = scan_scores(features, queries[:m], reduce="none", scales=scales)
        for view in (
            wide[::2, :96],
            wide[::2, ::2][:, :96],
            torch.empty(96, 310, dtype=dtype, device=device)[:, :300].T,
        ):
            view.copy_(features)
            got = scan_scores(view, queries[:m], reduce="none", scales=scales)
            assert_same(got, want, f"strides {view.stride()}")
        assert_same(scan_scores(unaligned(features), queries[:m], reduce="none", scales=scales), want, "unaligned")
    one, scale = features[:1].expand(300, 96), None if scales is None else scales[:1].expand(300)
    for k in (100, 300):
        assert topk_scan(one, queries, k, reduce="max", scales=scale)[1].tolist() == list(range(k))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 20])
def test_bits_follow_from_the_row_and_the_query(m: int, dtype: torch.dtype, device: torch.device) -> None:
    features, queries, scales = draw(here(50_000, 3000), 160, m, dtype, device)
    for reduce in ("max", "none"):
        whole = scan_scores(features, queries, reduce=reduce, scales=scales)
        for start, end in ((0, 1), (37, 101), (1000, len(features))):
            part = None if scales is None else scales[start:end]
            got = scan_scores(features[start:end], queries, reduce=reduce, scales=part)
            assert_same(got, whole[..., start:end], f"rows {start}:{end}")
        best = topk_scan(features, queries, 77, reduce=reduce, scales=scales)
        for _ in range(here(10, 2)):
            again = topk_scan(features, queries, 77, reduce=reduce, scales=scales)
            assert_same(again[0], best[0], "values")
            assert_same(again[1], best[1], "indices")


def test_empty(device: torch.device) -> None:
    features, queries = torch.empty(0, 4, device=device), torch.ones(2, 4, device=device)
    assert scan_scores(features, queries, reduce="none").shape == (2, 0)
    assert topk_scan(features, queries, 0)[0].shape == (0,)
    assert topk_scan(torch.ones(3, 4, device=device), queries, 0)[1].shape == (0,)


@pytest.mark.parametrize(("m", "reduce"), [(1, "mean"), (64, "max"), (256, "none")])
def test_scores_are_not_held(m: int, reduce: str, device: torch.device) -> None:
    """Candidates only, however many rows: for every query's own best a small part of N × M scores."""
    n = here(2_000_000, 3000)
    features, queries = torch.randn(n, 64, device=device).half(), torch.randn(m, 64, device=device)
    held = peak_bytes(lambda: topk_scan(features, queries, 100, reduce=reduce))
    allowed = 4 * n * m / 8 if reduce == "none" else 8e6
    assert 0 < held <= allowed, f"held {held:,} bytes"


def test_beyond_int32(device: torch.device) -> None:
    """More than 2³¹ elements; the best row is near the end, and its score against float64."""
    needs_memory(6)
    n, d = here((2**22 + 77, 600), (1000, 30))
    features = torch.empty(n, d, dtype=torch.int8, device=device).random_(-10, 11)
    assert here(features.numel(), 2**32) > 2**31
    queries, scales = torch.rand(2, d, device=device), torch.ones(n, device=device)
    features[n - 3] = 100
    values, indices = topk_scan(features, queries, 2, reduce="max", scales=scales)
    assert int(indices[0]) == n - 3
    exact = (queries.double() @ features[n - 3].double()).amax()
    torch.testing.assert_close(values[0].double(), exact, rtol=1e-5, atol=0)
    own = topk_scan(features, queries[:1], 2, scales=scales)
    assert int(own[1][0]) == n - 3
