"""The poison itself: it lies where launchers ask for empty memory, and a load of it fails."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from assay.kernels.head_launch import Models
from tests.kernels.scratch import PATTERN, fill

HALVES = (torch.float16, torch.bfloat16)

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here, not interpreted")


@triton.jit
def _copy(x, out, count, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at, mask=at < count, other=0), mask=at < count)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64, torch.int32, torch.int64])
def test_reading_what_nothing_wrote_fails(dtype: torch.dtype) -> None:
    x = torch.zeros(8, dtype=dtype)
    fill(x[5:])
    assert x.is_floating_point() <= bool(x[5:].isnan().all())
    _copy[(1,)](x, torch.zeros(8, dtype=dtype), 5, BLOCK=8)  # the mask keeps the rest out
    with pytest.raises(Exception, match="scratch memory that nothing had written"):
        _copy[(1,)](x, torch.zeros(8, dtype=dtype), 6, BLOCK=8)


def test_launchers_scratch_is_poisoned_and_the_tests_own_is_not() -> None:
    models = Models.of([torch.zeros(2, 4)], [torch.zeros(3, 4)], None, None, -100)
    words = models.empty(5, dtype=torch.int32)
    assert words.tolist() == [PATTERN[4] - (1 << 32)] * 5
    assert bool(models.merged().model.isnan().all())
    torch.empty(1 << 32)  # of the tests' own memory no page is touched
