"""project's launches (Sparse), from its own table: every split of a bucket into digits, every type."""

from __future__ import annotations

import torch

from assay.kernels import project
from tests.kernels.aot import Case, case_of

TYPES = [torch.float32, torch.bfloat16, torch.float16]
DIMS = [7, 64, 256, 512, 1024, 2048, 4096, 8192]


def cases() -> list[Case]:
    found = []
    for dtype in TYPES:
        kind = str(dtype).removeprefix("torch.").replace("loat", "")
        for dim in DIMS:
            for nonzeros, d in ((1, 1 << 20), (3, 1_000_003)):
                if (nonzeros == 3 or dtype == torch.float16) and dim != 512:
                    continue  # the same table again
                vectors = torch.empty(16, d, dtype=dtype, device="meta")
                sums = torch.empty(16, dim, dtype=torch.float64, device="meta")
                for launch in next(project.plan(vectors, 0, (1, 2), dim, nonzeros, sums)):
                    name = f"project{launch.kernel.__name__} {kind} dim={dim} nonzeros={nonzeros}"
                    found.append(case_of(name, launch))
    return found
