"""grad_dot's launches, from its own tables: every tile, every pair of types, both kinds of address."""

from __future__ import annotations

import torch

from assay.kernels import dot
from assay.kernels._common import Launch
from assay.kernels.slices import plan_samples
from tests.kernels.aot import CAPABILITIES, Case, case_of

BF16, FP16, F32 = torch.bfloat16, torch.float16, torch.float32
TYPES = [  # of inputs, grads and direction
    (BF16, BF16, BF16),
    (FP16, FP16, FP16),
    (BF16, BF16, F32),  # three terms
    (F32, F32, F32),
    (FP16, FP16, F32),  # widened on load, as the next
    (F32, F32, BF16),
    (BF16, F32, BF16),  # on tensor cores, with a float32 epilogue
]
SHAPES = {  # (B, T, I, O); what takes them there
    "large": (8, 512, 1024, 2048),
    "sliced": (64, 512, 1024, 4096),  # more terms than one sum on tensor cores takes
    "flat": (64, 500, 1024, 4096),  # tiles of rows that go from one sample to the next
    "tail": (8, 512, 1040, 2064),  # K past the tile's multiple
    "wide": (8, 512, 2048, 1024),  # the other order, whose matrix is transposed
    "ragged": (8, 511, 1023, 1025),
    "narrow": (8, 512, 1024, 16),
    "narrow_ragged": (8, 511, 1023, 10),
    "few_rows": (8, 1, 1024, 4096),
    "few_rows_ragged": (8, 1, 1023, 4095),
}


def launch(
    shape: tuple[int, int, int, int], types: tuple[torch.dtype, torch.dtype, torch.dtype], generation: int
) -> Launch:
    b, t, i, o = shape
    inputs = torch.empty(b, t, i, dtype=types[0], device="meta")
    grads = torch.empty(b, t, o, dtype=types[1], device="meta")
    return dot.plan(inputs, grads, torch.empty(o, i, dtype=types[2], device="meta"), generation)[0]


def sums() -> list[tuple[str, Launch]]:
    """Of partial sums, by sample: few to each, many, so many that they are added up over slices first."""
    found = []
    for slices, b, size in ((4, 8192, 1), (16, 8, 256), (128, 8, 1000)):
        partial, out = torch.empty(slices, b * size, device="meta"), torch.empty(b, device="meta")
        found += [(f"grad_dot{x.kernel.__name__} {slices}*{b}*{size}", x) for x in plan_samples(partial, out)]
    return found


def cases() -> list[Case]:
    found = [case_of(name, launch) for name, launch in sums()]
    for cc in CAPABILITIES:
        for types in TYPES:
            names = [str(x).removeprefix("torch.").replace("loat", "") for x in types]
            for what, shape in SHAPES.items():
                if types not in ((BF16,) * 3, (F32,) * 3) and what not in ("large", "narrow", "few_rows"):
                    continue  # the same tables again
                name = f"grad_dot {'*'.join(names)} {what}"
                found.append(case_of(name, launch(shape, types, cc // 10), capabilities=(cc,)))
    return found
