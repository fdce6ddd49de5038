"""project's launches (Sparse), from its own table: the types, tiles of many rows and one row as it lies."""

from __future__ import annotations

import torch

from assay.kernels import project
from tests.kernels.aot import Case, case_of

TYPES = [torch.float32, torch.bfloat16, torch.float16]


def cases() -> list[Case]:
    found = [case_of("project_codes", project.plan_codes(torch.empty(1 << 20, dtype=torch.int32), 0, (1, 2), 512))]
    for dtype in TYPES:
        kind = str(dtype).removeprefix("torch.").replace("loat", "")
        for b, d in ((1, 1 << 20), (4, 1 << 20), (16, 1 << 20), (16, 1_000_003)):
            vectors = torch.empty(b, d, dtype=dtype, device="meta")
            sums = torch.empty(b, 512, dtype=torch.float64, device="meta")
            order = torch.empty(d + 1, dtype=torch.int32, device="meta")
            *launches, _ = next(project.plan(vectors, 0, (1, 2), 512, 1, sums, lambda *_, order=order: order))
            found += [case_of(f"project{launch.kernel.__name__} {kind} B={b} D={d}", launch) for launch in launches]
    return found
