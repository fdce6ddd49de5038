"""project's launches (Rademacher): every type, aligned rows and others."""

from __future__ import annotations

import torch

from assay.kernels import rademacher
from tests.kernels.aot import Case, case_of

TYPES = [torch.float32, torch.bfloat16, torch.float16]


def cases() -> list[Case]:
    found = []
    for dtype in TYPES:
        kind = str(dtype).removeprefix("torch.").replace("loat", "")
        for what, d in (("even", 1 << 24), ("ragged", 1_000_003)):
            vectors = torch.empty(16, d, dtype=dtype, device="meta")
            sums = torch.empty(16, 512, dtype=torch.float64, device="meta")
            launch, _ = next(rademacher.plan(vectors, 1 << 33 if what == "ragged" else 0, (1, 2), 512, sums))
            found.append(case_of(f"project_dense {kind} {what}", launch))
    return found
