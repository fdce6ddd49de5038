"""The interpreter that the kernels' tests run on multiplies as tests/interpreter.py says, not as a BLAS likes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here, not interpreted")


@triton.jit
def _multiply(x, y, out, M: tl.constexpr, K: tl.constexpr, N: tl.constexpr):
    m, k, n = tl.arange(0, M), tl.arange(0, K), tl.arange(0, N)
    left, right = tl.load(x + m[:, None] * K + k[None, :]), tl.load(y + k[:, None] * N + n[None, :])
    product = tl.dot(left, right, tl.full((M, N), 0.5, tl.float32), input_precision="ieee")
    tl.store(out + m[:, None] * N + n[None, :], product)


def multiply(x: Tensor, y: Tensor) -> Tensor:
    out = torch.empty(len(x), y.shape[1])
    _multiply[(1,)](x, y, out, *x.shape, y.shape[1])
    return out


def test_an_element_s_bits_follow_from_its_row_and_column() -> None:
    x, y = torch.randn(64, 32), torch.randn(32, 16)
    whole = multiply(x, y)
    for start in (0, 16, 48):
        assert torch.equal(multiply(x[start : start + 16], y), whole[start : start + 16])
    assert torch.equal(multiply(x[5:6].repeat(64, 1), y), whole[5:6].expand(64, 16))
    assert torch.equal(multiply(x, y[:, :1].repeat(1, 16)), whole[:, :1].expand(64, 16))


def test_terms_are_added_in_their_order() -> None:
    x, y = torch.randn(16, 32), torch.randn(32, 16)
    total = np.float32(0)
    for left, right in zip(x[3].numpy(), y[:, 7].numpy(), strict=True):
        total += left * right
    assert multiply(x, y)[3, 7].item() == total + np.float32(0.5)


def test_a_type_without_arithmetic_is_refused() -> None:
    with pytest.raises(Exception, match="widen bf16 operands to float32"):
        multiply(torch.ones(16, 16).bfloat16(), torch.ones(16, 16).bfloat16())
