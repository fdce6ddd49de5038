"""topk_scan and scan_scores against float64, on every instruction set."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import assay
from assay.ops import scan, scan_scores, topk_scan
from assay.ops.scan import REDUCTIONS, merge_topk

TOLERANCE = 2e-6
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8]

SHAPES = [  # (N, d, M): why
    (1, 1, 1),
    (7, 3, 2),  # fewer columns than lanes
    (33, 64, 1),  # whole vectors
    (50, 127, 3),  # a tail of the row; a query short of AVX-512's direct products
    (41, 100, 4),
    (66, 33, 5),  # one query past them; one block of rows and two rows
    (300, 512, 17),
    (9, 2100, 6),  # rows longer than a block of a float32 accumulator, for AVX-512 too
    (5, 20_000, 5),  # ... and longer than the converted rows' buffer
    (2100, 513, 2),  # several pieces of work
    (20, 0, 3),  # no columns: every score is 0
]


def features_of(n: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    if dtype != torch.int8:
        return torch.randn(n, d).to(dtype), None
    return torch.randint(-128, 128, (n, d), dtype=torch.int8), torch.rand(n) / 50


def exact_scores(features: Tensor, queries: Tensor, scales: Tensor | None) -> Tensor:
    """(M, N) float64."""
    scores = queries.double() @ features.double().T
    return scores if scales is None else scores * scales.double()


def reduced(scores: Tensor, reduce: str) -> Tensor:
    return scores if reduce == "none" else scores.mean(0) if reduce == "mean" else scores.amax(0)


def ranking(scores: Tensor, k: int) -> Tensor:
    """Indices of the k best of each row by the order that topk_scan promises, one comparison at a time."""
    rows = []
    for row in scores.tolist() if scores.dim() == 2 else [scores.tolist()]:
        order = sorted(range(len(row)), key=lambda i: (math.isnan(row[i]), 0 if math.isnan(row[i]) else -row[i], i))
        rows.append(order[:k])
    return torch.tensor(rows, dtype=torch.int64).reshape(*scores.shape[:-1], k)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d", "m"), SHAPES)
def test_against_float64(isa: str, n: int, d: int, m: int, dtype: torch.dtype) -> None:
    features, scales = features_of(n, d, dtype)
    queries = torch.randn(m, d)
    exact = exact_scores(features, queries, scales)
    norms = queries.double().norm(dim=1)[:, None] * features.double().norm(dim=1)
    size = norms if scales is None else norms * scales
    for reduce in REDUCTIONS:
        got = scan_scores(features, queries, reduce=reduce, scales=scales)
        assert got.dtype == torch.float32
        error = (got - reduced(exact, reduce)).abs()
        assert bool((error <= TOLERANCE * (size if reduce == "none" else size.amax(0))).all()), reduce
        for k in {0, 1, min(n, 10), n}:
            values, indices = topk_scan(features, queries, k, reduce=reduce, scales=scales)
            assert values.shape == indices.shape == ((m, k) if reduce == "none" else (k,))
            assert torch.equal(indices, ranking(got, k))  # the same scores, ranked
            assert torch.equal(values, got.gather(-1, indices))


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_within_torch_s_own(isa: str, dtype: torch.dtype) -> None:
    """Long rows of one sign, where a single float32 accumulator loses digits."""
    features, scales = features_of(20, 30_000, dtype)
    features = features.abs().clamp(max=100)
    queries = torch.rand(6, 30_000)
    exact = exact_scores(features, queries, scales)
    plain = queries @ features.float().T * (1 if scales is None else scales)
    for m in (1, 6):
        got = scan_scores(features, queries[:m], reduce="none", scales=scales)
        error, theirs = (got - exact[:m]).abs() / exact[:m], (plain[:m] - exact[:m]).abs() / exact[:m]
        assert float(error.max()) <= max(float(theirs.max()), 5e-7)


@pytest.mark.parametrize("m", [1, 3, 7])
def test_ties_take_the_lower_index(isa: str, m: int) -> None:
    """Whole numbers, so that sums are exact and ties real: most of 3,000 rows share a few scores."""
    features = torch.randint(-1, 2, (3000, 8)).float()
    queries = torch.randint(-2, 3, (m, 8)).float()
    exact = exact_scores(features, queries, None)
    for reduce in ("max", "none"):
        for k in (1, 100, 2999, 3000):
            _, indices = topk_scan(features, queries, k, reduce=reduce)
            assert torch.equal(indices, ranking(reduced(exact, reduce), k))
    same, _ = topk_scan(torch.ones(500, 3), torch.ones(m, 3), 500)[1].sort()
    assert same.tolist() == list(range(500))


@pytest.mark.parametrize("m", [1, 2, 9])
def test_nan_ranks_last_and_infinities_at_the_ends(isa: str, m: int) -> None:
    features = torch.randn(40, 20)
    features[3, 5] = math.nan
    features[0] = math.nan
    features[7, 0] = math.inf
    features[9, 0] = -math.inf
    features[30, 19] = -math.inf
    queries = torch.rand(m, 20) + 0.1  # positive: infinities keep their sign
    queries[0, 1] = 0
    for reduce in REDUCTIONS:
        values, indices = (x.reshape(-1, 40) for x in topk_scan(features, queries, 40, reduce=reduce))
        for row in indices.tolist():
            assert row[0] == 7
            assert row[-4:] == [9, 30, 0, 3]
        assert values[0, 0] == math.inf
        assert values[0, -4:-2].tolist() == [-math.inf] * 2
        assert bool(values[:, -2:].isnan().all())
        assert not values[:, :-2].isnan().any()
    best, _ = topk_scan(features, queries, 38, reduce="max")
    assert not best.isnan().any()  # never selected while there are others
    nothing, rows = topk_scan(torch.full((5, 4), math.nan), torch.ones(m, 4), 5, reduce="max")
    assert bool(nothing.isnan().all())
    assert rows.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("m", [2, 5])
def test_one_query_s_nan_makes_the_maximum_nan(isa: str, m: int) -> None:
    """As torch.amax has it. A plain maximum would drop or keep it by its place."""
    features, queries = torch.rand(6, 4), torch.rand(m, 4)
    for place in range(m):
        broken = queries.clone()
        broken[place] = math.nan
        assert bool(scan_scores(features, broken, reduce="max").isnan().all())
    assert bool((scan_scores(features, torch.full((m, 4), -math.inf), reduce="max") == -math.inf).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(isa: str, dtype: torch.dtype) -> None:
    features, scales = features_of(30, 24, dtype)
    wide = torch.empty(60, 48, dtype=dtype)
    gaps, columns = wide[::2, :24], wide[::2, ::2]
    queries = torch.randn(24, 12)[:, ::2].T
    for view in (gaps, columns, torch.empty(24, 30, dtype=dtype).T):
        view.copy_(features)
        scattered = None if scales is None else torch.stack([scales, scales], 1)[:, 0]
        for m in (1, 6):
            got = topk_scan(view, queries[:m], 9, reduce="none", scales=scattered)
            want = topk_scan(features, queries[:m].contiguous(), 9, reduce="none", scales=scales)
            assert torch.equal(got[0], want[0])
            assert torch.equal(got[1], want[1])
    one = features[:1].expand(50, 24)  # row stride 0
    tied = topk_scan(one, queries, 50, reduce="max", scales=None if scales is None else scales[:1].expand(50))
    assert tied[1].tolist() == list(range(50))


@pytest.mark.parametrize("dtype", [torch.float16, torch.int8])
def test_same_bits_for_any_thread_count_and_neighbours(isa: str, dtype: torch.dtype) -> None:
    features, scales = features_of(9000, 160, dtype)
    features[4000:] = features[:5000].clone()  # ties across pieces
    if scales is not None:
        scales[4000:] = scales[:5000].clone()
    queries = torch.randn(6, 160)
    threads = torch.get_num_threads()
    try:
        for m in (1, 6):
            for reduce in REDUCTIONS:
                results = []
                for count in (1, 2, 3, 8):
                    torch.set_num_threads(count)
                    results.append(topk_scan(features, queries[:m], 777, reduce=reduce, scales=scales))
                for values, indices in results[1:]:
                    assert torch.equal(values, results[0][0])
                    assert torch.equal(indices, results[0][1])
            scores = scan_scores(features, queries[:m], reduce="none", scales=scales)
            part = None if scales is None else scales[37:101]
            alone = scan_scores(features[37:101], queries[:m], reduce="none", scales=part)
            assert torch.equal(scores[:, 37:101], alone)
    finally:
        torch.set_num_threads(threads)


def test_mean_costs_nothing_in_queries_and_equals_the_mean_of_the_scores(isa: str) -> None:
    features, queries = torch.randn(200, 96).half(), torch.randn(50, 96)
    mean = scan_scores(features, queries)
    assert torch.equal(mean, scan_scores(features, queries.double().mean(0).float()[None], reduce="max"))
    torch.testing.assert_close(mean.double(), exact_scores(features, queries, None).mean(0), rtol=1e-5, atol=1e-5)
    narrow = scan_scores(features, queries.bfloat16())
    assert torch.equal(narrow, scan_scores(features, queries.bfloat16().float()))


def test_reference_agrees_and_holds_no_scores_of_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "CHUNK_SCORES", 1000)  # many chunks
    features = torch.randint(-2, 3, (700, 6)).float()
    features[650, 0] = math.nan
    queries = torch.randint(-2, 3, (3, 6)).float()
    for reduce in ("max", "none"):
        for k in (0, 1, 50, 700):
            native = topk_scan(features, queries, k, reduce=reduce)
            with assay.backend("reference"):
                plain = topk_scan(features, queries, k, reduce=reduce)
            for a, b in zip(native, plain, strict=True):
                assert torch.equal(a.nan_to_num(), b.nan_to_num())
                assert a.shape == b.shape
    with assay.backend("reference"):
        torch.testing.assert_close(
            scan_scores(features, queries, reduce="none"), queries @ features.T, equal_nan=True, rtol=0, atol=0
        )
        assert scan_scores(features[:0], queries, reduce="none").shape == (3, 0)
    wide = topk_scan(features.double(), queries, 5)
    assert wide[0].dtype == torch.float64
    assert scan_scores(features.half(), queries.double()).dtype == torch.float64


def test_merging_parts_equals_the_whole() -> None:
    features, queries = torch.randint(-2, 3, (400, 5)).float(), torch.randint(-2, 3, (4, 5)).float()
    features[[3, 390]] = math.nan
    whole = topk_scan(features, queries, 397, reduce="none")
    parts = [topk_scan(features[a : a + 100], queries, 100, reduce="none") for a in range(0, 400, 100)]
    values = torch.cat([v for v, _ in parts], 1)
    indices = torch.cat([i + 100 * p for p, (_, i) in enumerate(parts)], 1)
    merged = merge_topk(values, indices, 397)
    assert torch.equal(merged[1], whole[1])
    assert torch.equal(merged[0], whole[0])


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 200), d=st.integers(0, 40), m=st.integers(1, 9), seed=st.integers(0, 10**6), share=st.floats(0, 1)
)
def test_properties(n: int, d: int, m: int, seed: int, share: float) -> None:
    g = torch.Generator().manual_seed(seed)
    features = torch.randint(-3, 4, (n, d), generator=g).half()
    queries = torch.randint(-3, 4, (m, d), generator=g).float()
    k = int(share * n)
    for reduce in REDUCTIONS:
        scores = scan_scores(features, queries, reduce=reduce)
        values, indices = topk_scan(features, queries, k, reduce=reduce)
        assert torch.equal(indices, ranking(scores, k))
        assert torch.equal(values, scores.gather(-1, indices))


def test_empty() -> None:
    for reduce in REDUCTIONS:
        values, indices = topk_scan(torch.empty(0, 4), torch.ones(2, 4), 0, reduce=reduce)
        assert values.shape == indices.shape == ((2, 0) if reduce == "none" else (0,))
        assert scan_scores(torch.empty(0, 4), torch.ones(2, 4), reduce=reduce).shape[-1] == 0


def test_backends_agree(chosen: list[str]) -> None:
    features, queries = torch.randn(500, 333), torch.randn(9, 333)
    native = scan_scores(features, queries, reduce="none")
    with assay.backend("reference"):
        plain = scan_scores(features, queries, reduce="none")
    assert chosen == ["cpu", "reference"]
    torch.testing.assert_close(native, plain, rtol=1e-5, atol=1e-4)


def test_compiles_whole() -> None:
    def f(x: Tensor, q: Tensor) -> Tensor:
        values, indices = topk_scan(x * 2, q, 5, reduce="none")
        return values + indices + scan_scores(x, q)[:5]

    features, queries = torch.randn(30, 12), torch.randn(3, 12)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(features, queries), f(features, queries))
    for op, arguments in (
        (torch.ops.assay.topk_scan, (features, None, queries, 4, True)),
        (torch.ops.assay.scan_scores, (features, None, queries, False)),
    ):
        torch.library.opcheck(op.default, arguments, test_utils=("test_schema", "test_faketensor"))


def test_memory_stays_far_below_the_scores() -> None:
    """All scores of the scan would take 1 GB; the op takes less than 32 MB."""
    code = """
import torch
from assay.ops import topk_scan
def field(name): return int(next(l for l in open("/proc/self/status") if l.startswith(name)).split()[1])
features, queries = torch.randn(1 << 18, 4).half(), torch.randn(1024, 4)
topk_scan(features[:100], queries, 10, reduce="none")
open("/proc/self/clear_refs", "w").write("5")
before = field("VmRSS")
topk_scan(features, queries, 10, reduce="none")
print(field("VmHWM") - before)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if "clear_refs" in run.stderr:
        pytest.skip("this kernel does not let a process reset its peak memory")
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 32 * 1024, f"{int(run.stdout) / 1024:.0f} MB"


X, Q, S = torch.zeros(5, 3), torch.zeros(2, 3), torch.ones(5)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: topk_scan(X, Q, 6), ValueError, "N = 5, and not negative, got k = 6"),
        (lambda: topk_scan(X, Q, -1), ValueError, "got k = -1"),
        (lambda: topk_scan(X, Q, 2.0), TypeError, "k: expected an int, got 2.0"),
        (lambda: topk_scan(X[0], Q, 1), ValueError, r"features: expected two dimensions.*\(3,\)"),
        (lambda: topk_scan(X, Q[0], 1), ValueError, r"queries: expected two dimensions.*\(3,\)"),
        (lambda: topk_scan(X, Q[:, :2], 1), ValueError, r"d = 3 of the features.*got \(2, 2\)"),
        (lambda: topk_scan(X, Q[:0], 1), ValueError, r"M ≥ 1.*got \(0, 3\)"),
        (lambda: topk_scan(X.long(), Q, 1), TypeError, "features: .*int64"),
        (lambda: topk_scan(X, Q.long(), 1), TypeError, "queries: .*int64"),
        (lambda: topk_scan(X, Q, 1, reduce="sum"), ValueError, "mean, max, none, got 'sum'"),
        (lambda: topk_scan(X.char(), Q, 1), ValueError, "scales: int8 features need them"),
        (lambda: topk_scan(X, Q, 1, scales=S), ValueError, "no others take them; these are torch.float32"),
        (lambda: scan_scores(X.char(), Q, scales=S[:4]), ValueError, r"scales: .*\(5,\).*got .*\(4,\)"),
        (
            lambda: scan_scores(X.char(), Q, scales=S.double()),
            ValueError,
            "scales: expected float32 .* got torch.float64",
        ),
    ],
)
def test_wrong_arguments_say_what_is_wrong(call: object, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()  # type: ignore[operator]
