"""The launches over the output layer's inputs alone: every tile, every type, both kinds of address."""

from __future__ import annotations

import torch

from assay.kernels import head_hidden
from tests.kernels.aot import CAPABILITIES, Case, case_of

COLS = (5, 32, 128, 300)  # a padded one, one word of signs, all of a counter's, several blocks of those


def cases() -> list[Case]:
    found = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        kind = str(dtype).removeprefix("torch.")
        for size in (2048, 1040, 1023):  # whole steps; a last one that is not; rows at any address
            hidden = torch.empty(8192, size, dtype=dtype, device="meta")
            out = torch.empty(8192, device="meta")
            launches = {"norms": head_hidden.plan_sqnorm(hidden, out)}
            for cols in COLS if size == 2048 else COLS[2:3]:
                words = torch.empty(head_hidden.padded(cols) // 32 or 1, size, dtype=torch.int32, device="meta")
                launches[f"right{cols}"] = head_hidden.plan_right(hidden, words, cols)[0]
            for what, launch in launches.items():
                name = f"head.{launch.kernel.__name__} {kind} D={size} {what}"
                found.append(case_of(name, launch, capabilities=CAPABILITIES, aligned=size % 16 == 0))
    return found
