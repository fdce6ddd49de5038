"""grad_dot's launches, from its own tables: every tile, every pair of types, both kinds of address."""

from __future__ import annotations

import torch

from assay.kernels import dot
from assay.kernels._common import Launch
from tests.kernels.aot import CAPABILITIES, Case, case_of

BF16, FP16, F32 = torch.bfloat16, torch.float16, torch.float32
TYPES = [  # of the factors and of the direction
    (BF16, BF16),
    (FP16, FP16),
    (BF16, F32),  # three terms
    (F32, F32),
    (FP16, F32),  # widened on load
]
SHAPES = {  # (B, T, I, O); what takes them there
    "large": (8, 512, 1024, 2048),
    "tail": (8, 512, 1040, 2064),  # K past the tile's multiple
    "wide": (8, 512, 2048, 1024),  # the other order, whose matrix is transposed
    "ragged": (8, 511, 1023, 1025),
    "narrow": (8, 512, 1024, 16),
    "narrow_ragged": (8, 511, 1023, 10),
    "few_rows": (8, 1, 1024, 4096),
    "few_rows_ragged": (8, 1, 1023, 4095),
}


def launch(shape: tuple[int, int, int, int], kinds: tuple[torch.dtype, torch.dtype], generation: int) -> Launch:
    b, t, i, o = shape
    inputs = torch.empty(b, t, i, dtype=kinds[0], device="meta")
    grads = torch.empty(b, t, o, dtype=kinds[0], device="meta")
    return dot.plan(inputs, grads, torch.empty(o, i, dtype=kinds[1], device="meta"), generation)[0]


def cases() -> list[Case]:
    found = []
    for cc in CAPABILITIES:
        for kinds in TYPES:
            names = [str(k).removeprefix("torch.").replace("loat", "") for k in kinds]
            for what, shape in SHAPES.items():
                if kinds in ((FP16, FP16), (FP16, F32)) and what not in ("large", "few_rows_ragged"):
                    continue  # the same code as for bfloat16 but for the instruction's name
                name = f"grad_dot {'*'.join(names)} {what}"
                found.append(case_of(name, launch(shape, kinds, cc // 10), capabilities=(cc,)))
    return found
