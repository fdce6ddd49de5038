"""What the inner loops of the sketches' kernels issue, counted in the machine code: Triton's versions differ in it."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from tests.kernels.test_compile import compiling

# One tile of each, for Hopper: what is read at a time, and the most that its loop may take.
KERNELS = {
    ("sketch", "grad_sketch_fused bf16*bf16 16x16 even"): 100,  # per 64 × 64 numbers read, with what folds their sums
    ("sketch", "grad_sketch_fused bf16*bf16 64x64 even"): 130,
    ("sketch", "grad_sketch_project bf16*bf16 128x128 even"): 85,
    ("sketch", "grad_sketch_project f32*f32 64x64 even"): 230,  # 64 × 32
    ("rademacher", "project_dense bf16 even"): 340,  # 128 coordinates for 128 rows of the sketch
    ("rademacher", "project_dense f32 even"): 490,  # 64 for 256
    ("project", "project_gather bf16 B=16 D=1048576"): 160,  # 8 entries of a warp's 16 buckets
}
COUNT = """
import importlib, json, sys
from tests.kernels import aot, sass
for kind, name in json.loads(sys.argv[1]):
    case = next(c for c in importlib.import_module(f"tests.kernels.cases_{kind}").cases() if c.name == name)
    code = sass.parse(sass.disassemble(aot.compiled(case, 90).asm["cubin"]))
    print(json.dumps(max(code.innermost(), key=lambda loop: loop.total())))
"""


@pytest.mark.slow
def test_inner_loops_are_as_short_as_they_were() -> None:
    run = compiling("-c", COUNT, json.dumps(list(KERNELS)))
    assert run.returncode == 0, run.stderr
    loops = dict(zip(KERNELS, (Counter(json.loads(line)) for line in run.stdout.splitlines()), strict=True))
    for (_, name), loop in loops.items():
        assert 40 < sum(loop.values()) <= KERNELS[_, name], (name, loop)
    for name, copies in (("fused bf16*bf16 16x16", 8), ("fused bf16*bf16 64x64", 8), ("project bf16*bf16 128x128", 12)):
        loop = loops["sketch", f"grad_sketch_{name} even"]
        # Both operands go past the registers, in whole vectors, and straight to the tensor cores.
        assert loop["HGMMA"] == 4
        assert loop["LDGSTS"] <= copies
        assert loop["LDS"] <= 8
    dense = loops["rademacher", "project_dense bf16 even"]
    # 128 × 128 signs of 128 threads: a pair takes a shift and a mask; and a Philox block for each thread, once.
    assert dense["SHF"] <= 68
    assert dense["LOP3"] <= 100
    assert dense["IMAD"] <= 40
    assert not any(loop["LDL"] or loop["STL"] for loop in loops.values())
