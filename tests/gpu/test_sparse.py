"""project, Sparse, by the CUDA kernel: against float64, a row's bits its own, far offsets."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import assay
from assay.ops import _sparse as kernel
from assay.ops import project
from assay.ops.sketch import buckets
from tests.kernels.guarded import DEVICE, far_apart, fenced

BF16 = torch.bfloat16
FAR = 2**33 + 5


@pytest.fixture(autouse=True)
def _on_the_card(cuda: torch.device) -> None:
    """CUDA C++ is not interpreted."""


def added(x: Tensor, first: int, sketch: assay.Sparse) -> Tensor:
    sums = torch.zeros(len(x), sketch.dim, dtype=torch.float64, device=x.device)
    kernel.add_sparse(x, first, sketch.key, sketch.dim, sketch.nonzeros, sums, lambda _, make: make())
    return sums


def expected(x: Tensor, sketch: assay.Sparse, first: int = 0) -> Tensor:
    at, sign = buckets(x.shape[1], sketch.dim, sketch.nonzeros, sketch.key, first=first)
    out = torch.zeros(len(x), sketch.dim, dtype=torch.float64)
    for j in range(sketch.nonzeros):
        out.index_add_(1, at[:, j], x.cpu().double() * sign[:, j])
    return out


@pytest.mark.parametrize("gap", [0, 3, 16])  # rows of any address
@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16])
@pytest.mark.parametrize(("dim", "nonzeros"), [(256, 1), (512, 2), (1000, 1), (4096, 1)])
def test_against_float64(dim: int, nonzeros: int, dtype: torch.dtype, gap: int) -> None:
    sketch = assay.Sparse(dim, nonzeros, seed=5)
    for b, d in ((1, 1), (1, 20_001), (2, 8192), (17, 33_000), (3, 300_000)):
        x = fenced(torch.randn(b, d).to(dtype), gap)
        if not kernel.takes(x, dim, nonzeros):
            pytest.skip("more shared memory than this device has")
        error = (added(x, FAR, sketch).cpu() - expected(x, sketch, FAR)).abs()
        assert bool((error <= 2e-6 * x.double().norm(dim=1, keepdim=True).cpu()).all()), (b, d, float(error.max()))


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16])
@pytest.mark.parametrize("dim", [300, 700, 4000])
def test_a_row_s_bits_are_its_own(dim: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(19, 200_001, device=DEVICE).to(dtype)
    if not kernel.takes(x, dim, 1):
        pytest.skip("more shared memory than this device has")
    sketch = assay.Sparse(dim, seed=6)
    found = project(x, sketch)
    for rows in (slice(0, 1), slice(16, 18), slice(2, 5), slice(18, 19)):
        assert torch.equal(project(x[rows], sketch), found[rows])
        assert torch.equal(project(x[rows].contiguous(), sketch), found[rows])
    monkeypatch.setattr(kernel, "PARTIAL_BYTES", 1)  # 16 rows at a time
    assert torch.equal(project(x, sketch), found)


def test_other_rows_infinities_stay_theirs() -> None:
    x = torch.randn(18, 9000).to(BF16).to(DEVICE)
    sketch = assay.Sparse(512, seed=4)
    want, bad = project(x, sketch), x.clone()
    bad[3, 50], bad[17, 0] = torch.nan, torch.inf
    found = project(bad, sketch)
    at = buckets(9000, 512, 1, sketch.key)[0][:, 0]
    for row, column in ((3, 50), (17, 0)):
        assert found[row].isfinite().sum() == 511
        assert not found[row, at[column]].isfinite()
    good = [r for r in range(18) if r not in (3, 17)]
    assert torch.equal(found[good], want[good])


def test_offsets_beyond_two_to_the_31() -> None:
    x = torch.randn(3, 70, device=DEVICE).to(torch.float16)
    (far_x,) = far_apart(x)
    assert torch.equal(project(far_x, assay.Sparse(512)), project(x, assay.Sparse(512)))
