"""Partial sums per sample: in float64, in one order, whatever else is in the batch."""

from __future__ import annotations

import pytest
import torch

from assay.kernels import slices
from assay.kernels._common import run
from assay.kernels.slices import plan_samples
from tests.kernels.guarded import DEVICE, fence_intact, fenced

F32, F64 = torch.float32, torch.float64


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize(
    ("count", "samples", "size"),
    [(1, 1, 1), (1, 2049, 1), (3, 70, 1), (5, 3, 7), (2, 2, 1025), (64, 2, 33), (41, 2, 400)],
)
def test_sums_of_samples(count: int, samples: int, size: int, dtype: torch.dtype) -> None:
    """One number to a sample, several samples to a program, one past a block, so many that there are two launches."""
    partial = torch.randn(count, samples * size, dtype=dtype, device=DEVICE)
    out = fenced(torch.full((samples,), torch.nan), 0)
    launches = plan_samples(partial, out)
    assert len(launches) == 1 + (count > 1 and count * size > slices.LONG_SAMPLE)
    run(launches)
    assert fence_intact(out)
    exact = partial.double().view(count, samples, size).sum((0, 2))
    torch.testing.assert_close(out.double(), exact, rtol=1e-7, atol=1e-12)
    alone = torch.empty(1, device=DEVICE)
    run(plan_samples(partial.view(count, samples, size)[:, -1].contiguous(), alone))
    assert torch.equal(alone, out[-1:])


def test_nothing_is_lost_to_a_large_number_that_is_taken_back() -> None:
    partial = torch.tensor([1e9, 1.0, -1e9, 1.0], device=DEVICE).repeat(2)
    out = torch.empty(2, device=DEVICE)
    run(plan_samples(partial, out))
    assert out.tolist() == [2.0, 2.0]
