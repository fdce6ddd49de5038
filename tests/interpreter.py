"""Triton's interpreter with matrix products whose bits are nobody's but the operands'.

It takes them from NumPy's BLAS, where the bits of a row follow from the processor, from the number of rows and from the
row's place among them. Tests of what our kernels promise (a row's bits depend on no other row, on no stride) cannot
rest on that: here a product adds its terms in their order, one rounding each, every element by itself.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_AT_ONCE = 1 << 16  # numbers that stay in cache


def create_dot(builder: InterpreterBuilder, a: Any, b: Any, d: Any, *precision: Any) -> TensorHandle:
    """``d + a @ b`` of float32, float16 or integer handles: (M, K), (K, N), (M, N)."""
    for operand in (a, b):
        if operand.dtype in (tl.bfloat16, tl.float8e4nv, tl.float8e5):  # held as integers: their arithmetic is wrong
            raise TypeError(f"tl.dot under the interpreter: widen {operand.dtype} operands to float32 first")
    left, right = a.data.T.astype(d.data.dtype), b.data.astype(d.data.dtype)
    product = np.zeros_like(d.data)
    step = max(1, _AT_ONCE // product.size)
    for start in range(0, len(left), step):  # a reduction over the first axis adds one term after the other
        some = slice(start, start + step)
        terms = np.empty((len(left[some]) + 1, *product.shape), product.dtype)
        terms[0] = product
        np.multiply(left[some, :, None], right[some, None, :], out=terms[1:])
        product = np.add.reduce(terms, axis=0)
    return TensorHandle(product + d.data, d.dtype.scalar)


def install() -> None:
    """Let every kernel that this process interprets multiply so."""
    InterpreterBuilder.create_dot = create_dot
