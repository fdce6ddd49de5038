"""An op has its own precision: under the caller's autocast every bit is as without."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import assay
from assay import ops

torch.manual_seed(0)
A, G, V = torch.randn(3, 9, 20), torch.randn(3, 9, 31), torch.randn(31, 20)
Y, Z, H, W = torch.randint(31, (9,)), torch.randn(2, 9, 31), torch.randn(2, 9, 20), torch.randn(2, 31, 20)
KRONECKER = assay.Kronecker(4, 3)
CALLS: dict[str, Callable[[], Any]] = {
    "ensemble_stats": lambda: ops.ensemble_stats(Z, Y),
    "linear_ensemble_stats": lambda: ops.linear_ensemble_stats(H, W, Y),
    "head_scores": lambda: ops.head_scores(H, W, Y, directions=W, sketch=KRONECKER),
    "linear_cross_entropy": lambda: ops.linear_cross_entropy(H[0], W[0], Y),
    "linear_distillation": lambda: ops.linear_distillation(H[0], W[0], H, W, reverse=True),
    "grad_dot": lambda: ops.grad_dot(A, G, V),
    "grad_sqnorm, Gram": lambda: ops.grad_sqnorm(A, G),
    "grad_sqnorm, product": lambda: ops.grad_sqnorm(A.expand(3, 9, 20).repeat(1, 90, 1), G.repeat(1, 90, 1)),
    "project": lambda: ops.project(V, assay.Rademacher(7)),
    "topk_scan": lambda: ops.topk_scan(V, H[0], 5, reduce="max"),
    "scan_scores": lambda: ops.scan_scores(V, H[0], reduce="none"),
} | {
    f"grad_sketch, {sketch}": lambda sketch=sketch: ops.grad_sketch(A, G, sketch)
    for sketch in (KRONECKER, assay.Sparse(50), assay.Rademacher(8), assay.Mask(5, 6), assay.Mask(9, 9, KRONECKER))
}


def tensors(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    values = [getattr(result, f.name) for f in fields(result)] if is_dataclass(result) else result
    return [] if values is None else [t for value in values for t in tensors(value)]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("call", CALLS)
def test_autocast_changes_nothing(call: str, backend: str) -> None:
    with assay.backend(backend):
        want = tensors(CALLS[call]())
        with torch.autocast("cpu", torch.bfloat16):
            got = tensors(CALLS[call]())
    assert want
    for a, b in zip(want, got, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
