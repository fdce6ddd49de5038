"""A kernel that is wrong on purpose: what compute-sanitizer must find, to be believed about the others."""

import triton
import triton.language as tl


@triton.jit
def copy_kernel(x, out, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    tl.store(out + index, tl.load(x + index))  # x has fewer than BLOCK elements
