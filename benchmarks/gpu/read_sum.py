"""A read-only sum: the fairest ceiling for kernels that read much and write next to nothing."""

import triton
import triton.language as tl


@triton.jit
def read_sum_kernel(x, partial, per_program, BLOCK: tl.constexpr):
    """Each program sums ``per_program`` elements, a multiple of BLOCK, and writes one number."""
    start = tl.program_id(0).to(tl.int64) * per_program
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(0, per_program, BLOCK):
        total += tl.load(x + start + i + tl.arange(0, BLOCK))
    tl.store(partial + tl.program_id(0), tl.sum(total))
