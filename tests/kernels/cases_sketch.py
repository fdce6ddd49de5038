"""grad_sketch's launches (Kronecker), from its own tables: every tile, every pair of types, both kinds of address."""

from __future__ import annotations

import torch

from assay.kernels import philox, sketch
from tests.kernels.aot import CAPABILITIES, Case, case_of

BF16, FP16, F32 = torch.bfloat16, torch.float16, torch.float32
META = torch.device("meta")
TYPES = [(BF16, BF16), (FP16, FP16), (F32, F32), (BF16, F32)]  # of inputs and grads
SHAPES = {  # (B, T, I, O)
    "even": (8, 512, 1024, 2048),
    "ragged": (8, 511, 1023, 1025),
}
SIDES = [(32, 32), (64, 64), (128, 128)]  # each tile
MORE_SIDES = [(16, 16), (16, 64), (200, 40)]  # smaller in one direction or both


def cases() -> list[Case]:
    found = [
        case_of(f"sign_words {words}", launch)
        for words, size in ((1, 16), (2, 64), (4, 128))
        for launch in philox.plan_signs(torch.empty(words, 4096, dtype=torch.int32, device=META), 0, (1, 2))[:1]
    ]
    found += [
        case_of(f"sign_matrix {dtype}", philox.plan_sign_matrix(torch.empty(64, 4096, dtype=dtype, device=META), *rest))
        for dtype, rest in ((BF16, (40, 4000, 0, (1, 2))), (FP16, (64, 4096, 0, (1, 2))))
    ]
    for kinds in TYPES:
        names = "*".join(str(k).removeprefix("torch.").replace("loat", "") for k in kinds)
        for what, (b, t, i, o) in SHAPES.items():
            for rows, cols in [*SIDES, *MORE_SIDES] if what == "even" else SIDES:
                if kinds not in ((BF16, BF16), (F32, F32)) and (what, rows) != ("even", 64):
                    continue  # the same tables again
                inputs = torch.empty(b, t, i, dtype=kinds[0], device=META)
                grads = torch.empty(b, t, o, dtype=kinds[1], device=META)
                signs = (torch.empty(256, 4096, dtype=sketch.sign_dtype(x), device=META) for x in (inputs, grads))
                out = torch.empty(b, rows, cols, device=META)
                for launch in next(sketch.plan(inputs, grads, *signs, out)):
                    name = f"grad_sketch{launch.kernel.__name__} {names} {rows}x{cols} {what}"
                    found.append(case_of(name, launch, capabilities=CAPABILITIES))
    return found
