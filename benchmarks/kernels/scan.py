"""``ops.topk_scan``: bound by reading the features once, or by the GEMM where there are many queries."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from assay.ops import topk_scan
from benchmarks.case import DEVICE, Case, Target, here

if TYPE_CHECKING:  # the corpus needs more than the kernels: `make gpu` runs without
    from assay.corpus.features import FeatureStore

D, K = 512, 100
STREAMED_ROWS = 2_000_000  # 2 GB of float16: far beyond any cache
TILED_ROWS = 200_000
STORED_SHARDS = 5  # of as many rows each: 10 GB, which must fit into the page cache


def eager(features: Tensor, queries: Tensor, reduce: str) -> tuple[Tensor, Tensor]:
    """As one would write it, the features converted by chunks and the scores of all rows kept."""
    parts = features.split(1 << 16)
    if reduce == "mean":
        return torch.cat([part.float() @ queries.mean(0) for part in parts]).topk(K)
    scores = torch.cat([part.float() @ queries.T for part in parts])
    return (scores.amax(1) if reduce == "max" else scores.T).topk(K)


def cases() -> list[Case]:
    several = ((1, "mean"), (4, "max"), (16, "max"), (64, "max"), (64, "none"))
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
    return [_streamed(), _stored(), *(_tiled(dtype, m, reduce) for dtype in dtypes for m, reduce in several)]


def halves(n: int) -> Tensor:
    features = torch.empty(n, D, dtype=torch.float16)
    for part in features.split(1 << 16):
        part.copy_(torch.randn(part.shape))
    return features


def _streamed() -> Case:
    """The mean over queries: the time of reading the features, beside adding up the same bytes as integers."""

    def make() -> tuple[Tensor, Tensor]:
        return halves(STREAMED_ROWS), torch.randn(64, D)

    return Case(
        op="topk_scan",
        shape=f"N={STREAMED_ROWS} d={D} M=64 mean",
        dtype=torch.float16,
        bytes=2 * STREAMED_ROWS * D,
        flops=2 * STREAMED_ROWS * D,
        bound="read",
        make=make,
        run=lambda x, q: topk_scan(x, q, K),
        rivals={"ceiling": lambda x, q: x.view(torch.int64).sum()},
        ceiling="read-only sum",
        rounds=5,
        warmup=1,
    )


def _stored() -> Case:
    """The same from a folder of features on disk, in the page cache."""
    rows = STREAMED_ROWS * STORED_SHARDS
    return replace(
        _streamed(),
        shape=f"N={rows} d={D} M=64 mean, a store in page cache",
        bytes=2 * rows * D,
        flops=2 * rows * D,
        make=_make_store,
        run=lambda store, q, _: store.topk(q, K),
        rivals={"ceiling": lambda store, q, _: [b.features.view(torch.int64).sum() for b in store.batches()]},
    )


def _make_store() -> tuple[FeatureStore, Tensor, Any]:
    """The last is the folder, which lives as long."""
    from assay.corpus.features import FeatureSpec, FeatureStore, FeatureWriter
    from assay.corpus.storage import Store

    features, folder = halves(STREAMED_ROWS), tempfile.TemporaryDirectory()
    for i in range(STORED_SHARDS):
        with tempfile.TemporaryFile() as spool:
            writer = FeatureWriter(FeatureSpec("benchmark", D), spool)
            for start in range(0, STREAMED_ROWS, 1 << 16):
                piece = features[start : start + (1 << 16)]
                numbers = np.arange(start, start + len(piece))
                writer.add(numbers, [f"{i}-{number}" for number in numbers], piece)
            writer.save(Store.at(folder.name), f"{i}.arrow", {})
    return FeatureStore(folder.name), torch.randn(64, D), folder


def _tiled(dtype: torch.dtype, m: int, reduce: str) -> Case:
    """Several queries, each dtype, beside the GEMM of float32 features with the same queries."""
    from assay.corpus.features import quantize

    def make() -> tuple[Any, ...]:
        wide = torch.randn(TILED_ROWS, D)
        features, scales = quantize(wide) if dtype == torch.int8 else (wide.to(dtype), None)
        return features, scales, torch.randn(m, D), wide

    rivals: dict[str, Any] = {
        "ceiling": lambda x, s, q, wide: wide @ q.T,
        "sum": lambda x, s, q, wide: x.view(torch.int64).sum(),
    }
    if dtype != torch.int8:
        rivals["eager"] = lambda x, s, q, wide: eager(x, q, reduce)
    return Case(
        op="topk_scan",
        shape=f"N={TILED_ROWS} d={D} M={m} {reduce}",
        dtype=dtype,
        bytes=TILED_ROWS * D * dtype.itemsize,
        flops=2 * TILED_ROWS * D * (1 if reduce == "mean" else m),
        bound="gemm",
        make=make,
        run=lambda x, s, q, wide: topk_scan(x, q, K, reduce=reduce, scales=s),
        rivals=rivals,
        ceiling="float32 GEMM",
        rounds=5,
        warmup=1,
    )


# ---- on a GPU -------------------------------------------------------------------------------------------------------

GPU_ROWS = here(4_000_000, 2000)  # 4 GB of float16
MANY_ROWS = here(1_000_000, 1000)
SHORT = here((20_000_000, 64), (2000, 16))  # short rows: more of them to rank in the time of a read
LARGE_K = here(100_000, 500)  # ranked by torch
GPU_D = here(D, 24)


def gpu_cases() -> list[Case]:
    """The contract is for the mean, one query; what more queries cost stands beside their GEMM."""
    k, mean = here(K, 10), ("mean", 64)
    out = [_scan(GPU_ROWS, GPU_D, dtype, k, *mean) for dtype in (torch.float16, torch.bfloat16, torch.float32)]
    out += [_scan(GPU_ROWS, GPU_D, torch.int8, k, *mean), _scan(GPU_ROWS, GPU_D, torch.float16, LARGE_K, *mean)]
    out.append(_scan(*SHORT, torch.float16, k, *mean))
    for m in (16, 64):
        out += [_scan(MANY_ROWS, GPU_D, torch.float16, k, reduce, m) for reduce in ("max", "none")]
    return [*out, _scan(MANY_ROWS, GPU_D, torch.float32, k, "max", 16)]


def _scan(n: int, d: int, dtype: torch.dtype, k: int, reduce: str, m: int) -> Case:
    columns, multiplied = (m if reduce == "none" else 1), (1 if reduce == "mean" else m)
    scaled = dtype == torch.int8
    memory_bound = reduce == "mean"

    def make() -> tuple[Tensor, Tensor, Tensor | None]:
        queries = torch.randn(m, d, device=DEVICE)
        if scaled:
            features = torch.randint(-127, 128, (n, d), dtype=dtype, device=DEVICE)
            return features, queries, torch.rand(n, device=DEVICE)
        return torch.randn(n, d, dtype=dtype, device=DEVICE), queries, None

    def run(features: Tensor, queries: Tensor, scales: Tensor | None) -> tuple[Tensor, Tensor]:
        return topk_scan(features, queries, k, reduce=reduce, scales=scales)

    def gpu_eager(features: Tensor, queries: Tensor, scales: Tensor | None) -> tuple[Tensor, Tensor]:
        """Queries rounded to the features' type: the product that needs no copy of the features."""
        queries = (queries.mean(0, keepdim=True) if reduce == "mean" else queries).to(features.dtype)
        scores = queries @ features.T
        return (scores.amax(0, keepdim=True) if reduce == "max" else scores).topk(k)

    rivals = {} if scaled else {"gemm": lambda x, q, s: q.to(x.dtype) @ x.T, "eager": gpu_eager}
    return Case(
        op="topk_scan",
        shape=f"N={n} d={d} M={m} {reduce} k={k}",
        dtype=dtype,
        bytes=n * (d * dtype.itemsize + 4 * scaled) + 4 * m * d + 12 * columns * k,
        flops=2 * n * d * multiplied,
        bound="read" if memory_bound else "gemm",
        make=make,
        run=run,
        rivals=rivals,
        target=Target("read", 0.9) if memory_bound and k == here(K, 10) else None,
    )
