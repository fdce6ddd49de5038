"""The launches of topk_scan and scan_scores, from their own tables: every tile, every type, both kinds of address."""

from __future__ import annotations

import torch
import triton

from assay.kernels import scan
from assay.kernels._common import Launch
from tests.kernels.aot import CAPABILITIES, Case, case_of

OLD_TRITON = triton.__version__.startswith("3.6")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
QUERIES = {  # M, maximum; what takes them there. float32 has no tile of 32
    "one": (1, True),
    "max 16": (16, True),
    "max 32": (200, True),
    "own 16": (16, False),
    "own 32": (200, False),
}


def launch(dtype: torch.dtype, m: int, maximum: bool, k: int, cc: int, d: int = 512) -> Launch:
    n = 1_000_000
    features, queries = torch.empty(n, d, dtype=dtype, device="meta"), torch.empty(m, d, device="meta")
    scales = torch.empty(n, device="meta") if dtype == torch.int8 else None
    return scan.plan(features, scales, queries, maximum, k, cc // 10)[0]


def cases() -> list[Case]:
    found = []
    for dtype in DTYPES:
        kind = str(dtype).removeprefix("torch.").replace("loat", "")
        for what, (m, maximum) in QUERIES.items():
            if dtype == torch.float32 and m > 16:
                continue
            for k in (100, 0):
                name = f"topk_scan {kind} {what}" if k else f"scan_scores {kind} {what}"
                for cc in CAPABILITIES:
                    if cc == 100 and k and not maximum and OLD_TRITON and dtype != torch.float32:
                        continue  # its pass OptimizeTMemLayouts fails an assertion (docs/gpu.md)
                    found.append(case_of(name, launch(dtype, m, maximum, k, cc), capabilities=(cc,)))
                    if dtype in (torch.float32, torch.float16, torch.int8)[: 3 if m == 1 else 2] and k:
                        ragged = launch(dtype, m, maximum, k, cc, d=333)
                        found.append(case_of(f"{name} ragged", ragged, capabilities=(cc,), aligned=False))
    return found
