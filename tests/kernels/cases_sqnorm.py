"""grad_sqnorm's launches, from its own tables: both plans, every tile, every pair of types, both kinds of address."""

from __future__ import annotations

import torch

from assay.kernels import sqnorm
from tests.kernels.aot import CAPABILITIES, Case, case_of

BF16, FP16, F32 = torch.bfloat16, torch.float16, torch.float32
TYPES = [(BF16, BF16), (FP16, FP16), (F32, F32), (BF16, F32), (F32, BF16)]  # of inputs and grads
SHAPES = {  # (B, T, I, O); what takes them there
    "tile16": (8, 16, 1024, 1024),
    "tile32": (8, 32, 1024, 1024),
    "tile64": (8, 64, 1024, 1024),
    "tile128": (64, 512, 2048, 2048),
    "tail": (64, 500, 1040, 2064),  # features past the block's multiple
    "ragged16": (8, 15, 1023, 1025),
    "ragged32": (8, 31, 1023, 1025),
    "ragged64": (8, 511, 1023, 1025),
    "product": (2, 4096, 512, 1024),
    "product_narrow": (2, 4096, 1024, 16),
    "product_ragged": (2, 4096, 511, 1025),
    "product_narrow_ragged": (2, 4096, 1023, 10),
    "single": (8, 1, 1024, 1024),
    "single_ragged": (8, 1, 1023, 1025),
}


def cases() -> list[Case]:
    found = []
    for cc in CAPABILITIES:
        for kinds in TYPES:
            names = [str(k).removeprefix("torch.").replace("loat", "") for k in kinds]
            for what, (b, t, i, o) in SHAPES.items():
                if kinds == (FP16, FP16) and what not in ("tile64", "product"):
                    continue  # the same code as for bfloat16 but for the instruction's name
                if kinds[0] != kinds[1] and what not in ("tile64", "product", "product_narrow"):
                    continue  # float32's tables again, here with one factor widened on load
                inputs = torch.empty(b, t, i, dtype=kinds[0], device="meta")
                grads = torch.empty(b, t, o, dtype=kinds[1], device="meta")
                for launch in sqnorm.plan(inputs, grads, 0.5, cc // 10)[0]:
                    name = f"grad_sqnorm{launch.kernel.__name__} {'*'.join(names)} {what}"
                    found.append(case_of(name, launch, capabilities=(cc,)))
    return found
