"""Long sums on tensor cores, which truncate theirs: here under an interpreter whose products do the same."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import assay
from assay import ops

if torch.cuda.is_available():
    pytest.skip("the GPU's own tensor cores: tests/gpu", allow_module_level=True)

from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

assert os.environ["TRITON_INTERPRET"] == "1"
YARDSTICK = 2e-6


TERMS = {torch.bfloat16: 16, torch.float16: 8}  # an H200 makes twice bfloat16's error of float16, whichever its way


def truncating(terms: int) -> Callable[..., TensorHandle]:
    """``d + a @ b`` as tensor cores add it up: ``terms`` and the sum so far, exactly, then towards 0; of TF32, 8."""

    def dot(builder: Any, a: Any, b: Any, d: Any, *precision: Any) -> TensorHandle:
        step = 8 if "TF32" in repr(precision) else terms
        left, right, total = a.data.astype(np.float64), b.data.astype(np.float64), d.data
        for k in range(0, left.shape[1], step):
            exact = total.astype(np.float64) + left[:, k : k + step] @ right[k : k + step]
            total = exact.astype(np.float32)
            total = np.where(np.abs(total) > np.abs(exact), np.nextafter(total, np.float32(0)), total)
        return TensorHandle(total, d.dtype.scalar)

    return dot


@pytest.fixture(autouse=True)
def _tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(InterpreterBuilder, "create_dot", truncating(TERMS[torch.bfloat16]))


@pytest.fixture(params=list(TERMS))
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """Of the factors, with its own tensor cores."""
    kind: torch.dtype = request.param
    monkeypatch.setattr(InterpreterBuilder, "create_dot", truncating(TERMS[kind]))
    return kind


def half(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Positive numbers, whose sums grow and lose something every time."""
    return torch.rand(shape).add_(0.5).to(dtype)


def relative_error(got: Tensor, exact: Tensor) -> float:
    return float(((got.double() - exact) / exact).abs().max())


@pytest.mark.parametrize(("t", "i", "o"), [(16, 4096, 64), (16, 64, 4096), (16, 1024, 1024), (4100, 9, 7)])
def test_grad_sqnorm(t: int, i: int, o: int, dtype: torch.dtype) -> None:
    """The Gram plan over either factor's features and over both, the product plan over positions."""
    a, g = half(1, t, i, dtype=dtype), half(1, t, o, dtype=dtype)
    exact = (g.double().mT @ a.double()).square().sum((1, 2))
    with assay.backend("triton"):
        assert relative_error(ops.grad_sqnorm(a, g), exact) < YARDSTICK


@pytest.mark.parametrize("t", [40, 128])  # tiles that go on with the next sample, and a sample's own
def test_grad_dot(t: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from assay.kernels import dot

    monkeypatch.setattr(dot, "PROGRAMS", 1)  # no more slices of K than its length asks for, as where a batch is large
    a, g, v = half(1, t, 16, dtype=dtype), half(1, t, 4096, dtype=dtype), half(4096, 16, dtype=dtype)
    exact = ((g.double().mT @ a.double()) * v.double()).sum((1, 2))
    with assay.backend("triton"):
        assert relative_error(ops.grad_dot(a, g, v), exact) < YARDSTICK


def test_scan_scores() -> None:
    x, q = half(3, 4096), half(2, 4096).float() + 1e-4
    with assay.backend("triton"):
        assert relative_error(ops.scan_scores(x, q, reduce="none"), q.double() @ x.double().T) < YARDSTICK


def test_right_factors_of_head_scores() -> None:
    sketch = assay.Kronecker(2, 2)
    signs = sketch.input_side(4096)[:1].sign()
    sizes = torch.randint(-9, 1, (2, 4096)).exp2()  # else such sums are exact
    hidden, weight = (half(2, 4096) * sizes * signs).bfloat16(), torch.zeros(3, 4096, dtype=torch.bfloat16)
    with assay.backend("triton"):
        got = ops.head_scores(hidden, weight, torch.tensor([0, 1]), sketch=sketch).right
    assert got is not None
    exact = hidden.double() @ sketch.input_side(4096)[0].double()
    assert relative_error(got[0, :, 0], exact) < YARDSTICK
