"""Kernels that are wrong on purpose. The first is what compute-sanitizer must find, to be believed about the others."""

import triton
import triton.language as tl


@triton.jit
def copy_kernel(x, out, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    tl.store(out + index, tl.load(x + index))  # x has fewer than BLOCK elements


@triton.jit
def does_not_compile(x):
    tl.store(x + tl.arange(0, 3), 0.0)  # no power of two: a rehearsal's kernel that does not compile
