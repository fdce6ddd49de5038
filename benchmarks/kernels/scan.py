"""``ops.topk_scan``: bound by reading the features once, or by the GEMM where there are many queries."""

from __future__ import annotations

import tempfile
from typing import Any

import numpy as np
import torch
from torch import Tensor

from assay.corpus.features import FeatureSpec, FeatureStore, FeatureWriter, quantize
from assay.corpus.storage import Store
from assay.ops import topk_scan
from benchmarks.gpu.case import DEVICE, Case, Target, here
from benchmarks.timing import interleave

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


def case(shape: str, features: Tensor, queries: Tensor, reduce: str, variants: dict[str, Any], bound: str) -> dict:
    return {
        "op": "topk_scan",
        "shape": shape,
        "dtype": str(features.dtype).removeprefix("torch."),
        "bound": bound,
        "ceiling": "read-only sum" if bound == "memory" else "float32 GEMM",
        "bytes": features.numel() * features.element_size(),
        "flops": 2 * features.numel() * (1 if reduce == "mean" else len(queries)),
        "timings": interleave(variants, rounds=5, warmup=1),
    }


def streamed() -> list[dict[str, Any]]:
    """The mean over queries: the time of reading the features, beside adding up the same bytes as integers."""
    queries = torch.randn(64, D)
    features = torch.empty(STREAMED_ROWS, D, dtype=torch.float16)
    for part in features.split(1 << 16):
        part.copy_(torch.randn(part.shape))
    words = features.view(torch.int64)
    out = [
        case(
            f"N={STREAMED_ROWS} d={D} M=64 mean",
            features,
            queries,
            "mean",
            {
                "assay": lambda: topk_scan(features, queries, K),
                "ceiling": lambda: words.sum(),
            },
            "memory",
        )
    ]
    with tempfile.TemporaryDirectory() as folder:
        for i in range(STORED_SHARDS):
            with tempfile.TemporaryFile() as spool:
                writer = FeatureWriter(FeatureSpec("benchmark", D), spool)
                for start in range(0, STREAMED_ROWS, 1 << 16):
                    piece = features[start : start + (1 << 16)]
                    rows = np.arange(start, start + len(piece))
                    writer.add(rows, [f"{i}-{row}" for row in rows], piece)
                writer.save(Store.at(folder), f"{i}.arrow", {})
        store = FeatureStore(folder)
        variants = {
            "assay": lambda: store.topk(queries, K),
            "ceiling": lambda: [batch.features.view(torch.int64).sum() for batch in store.batches()],
        }
        out.append(
            {
                **out[0],
                "shape": f"N={store.rows} d={D} M=64 mean, a store in page cache",
                "bytes": store.rows * D * 2,
                "flops": 2 * store.rows * D,
                "timings": interleave(variants, rounds=5, warmup=1),
            }
        )
    return out


def tiled() -> list[dict[str, Any]]:
    """Several queries, each dtype, beside the GEMM of float32 features with the same queries."""
    wide = torch.randn(TILED_ROWS, D)
    out = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int8):
        features, scales = quantize(wide) if dtype == torch.int8 else (wide.to(dtype), None)
        for m, reduce in ((1, "mean"), (4, "max"), (16, "max"), (64, "max"), (64, "none")):
            queries = torch.randn(m, D)
            variants = {
                "assay": lambda x=features, s=scales, q=queries, r=reduce: topk_scan(x, q, K, reduce=r, scales=s),
                "ceiling": lambda q=queries: wide @ q.T,
                "sum": lambda x=features: x.view(torch.int64).sum(),
            }
            if scales is None:
                variants["eager"] = lambda x=features, q=queries, r=reduce: eager(x, q, r)
            out.append(case(f"N={TILED_ROWS} d={D} M={m} {reduce}", features, queries, reduce, variants, "compute"))
    return out


def cases() -> list[dict[str, Any]]:
    torch.manual_seed(0)
    return streamed() + tiled()


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
