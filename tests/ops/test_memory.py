"""What an op holds beside its arguments and results: no copy of an argument in float32, and none in any other type.

Counted are the allocator's own bytes, in the code that runs on a GPU (here under Triton's interpreter, whose scratch is
NumPy's and stands for registers) and in the CPU's. An argument that is counted is much larger than what else there is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import assay
from assay import ops
from assay.kernels import project as project_kernels
from assay.kernels import sketch as sketch_kernels
from assay.ops import _distillation_backends, _head_backends, dot, sqnorm
from tests.grid import checkered
from tests.ops.test_autocast import tensors

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu measures a GPU's own memory")
F32, BF16 = torch.float32, torch.bfloat16
BLOCKS: list[tuple[Any, str, int]] = [  # what is widened a block at a time: blocks far below the arguments here
    (dot, "CHUNK_BYTES", 1 << 14),
    (dot, "WIDEN_BYTES", 1 << 14),
    (dot, "MIN_ROWS", 1),
    (dot, "MIN_COLUMNS", 1),
    (sqnorm, "TILE_BYTES", 1 << 14),
    (sqnorm, "WIDEN_BYTES", 1 << 14),
    (_head_backends, "MAX_ROWS", 16),
    (_distillation_backends, "MAX_ROWS", 16),
    (_distillation_backends, "WIDEN_BYTES", 1 << 14),
    (project_kernels, "SCRATCH_BYTES", 1 << 14),
    (sketch_kernels, "SCRATCH_BYTES", 1 << 14),
]
KRONECKER = assay.Kronecker(2, 2)


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most that ``run`` held at a time, its results not counted."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        result = run()
    held = peak = 0
    for event in watched.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    results = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors(result)}
    return peak - sum(results.values())


def test_the_count_sees_what_an_operator_allocates_inside() -> None:
    x = torch.ones(1000, 1000)
    assert 8_000_000 <= peak_bytes(lambda: x.sum(0, dtype=torch.float64)) < 8_200_000
    assert peak_bytes(lambda: x.sum(0)) < 100_000
    assert 4_000_000 <= peak_bytes(lambda: (x + 1).sum()) < 4_100_000


def head(n: int, c: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(n, d).to(dtype), torch.randn(c, d).to(dtype), torch.randint(c, (n,))


def factors(b: int, t: int, i: int, o: int, dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(b, t, i).to(dtype), torch.randn(b, t, o).to(dtype)]


def cases(dtype: torch.dtype, scale: int) -> dict[str, tuple[Callable[[Tensor], Any], Tensor]]:
    """A call, and the argument of which no copy may be made."""
    hidden, few, labels = head(64 * scale, 3, 512, dtype)
    teacher = hidden.to(F32 if dtype == BF16 else BF16)
    row, weight, label = head(2, 256 * scale, 128, dtype)
    wide, narrow = factors(4 * scale, 2, 4096, 4, dtype)
    other = F32 if dtype == BF16 else BF16
    direction, left = torch.randn(512, 64 * scale).to(dtype), factors(1, 2, 64 * scale, 512, dtype)
    along = torch.ones(4, 4096, dtype=dtype)
    flat = torch.randn(4 * scale, 8192).to(dtype)
    return {
        "head_scores, hidden": (
            lambda h: ops.head_scores(h, few, labels, directions=few, sketch=KRONECKER),
            hidden,
        ),
        "head_scores, hidden of another type": (
            lambda h: ops.head_scores(h, few.to(other), labels, directions=few, sketch=KRONECKER),
            hidden,
        ),
        "head_scores, weight": (lambda w: ops.head_scores(row, w, label, directions=w), weight),
        "head_scores, weight of another type": (lambda w: ops.head_scores(row.to(other), w, label), weight),
        "linear_ensemble_stats": (lambda w: ops.linear_ensemble_stats([row, row], [w, w], label), weight),
        "linear_cross_entropy": (lambda w: ops.linear_cross_entropy(row.float(), w, label), weight),
        "linear_distillation": (lambda h: ops.linear_distillation(h, few, teacher, few), hidden),
        "linear_distillation, weight": (lambda w: ops.linear_distillation(row.float(), w, [row, row], [w, w]), weight),
        "grad_dot": (lambda a: ops.grad_dot(a, narrow, along), wide),
        "grad_dot, direction": (lambda v: ops.grad_dot(*left, v), direction),
        "grad_sqnorm, Gram": (lambda a: ops.grad_sqnorm(a, narrow), wide),
        "grad_sqnorm, product": (lambda a: ops.grad_sqnorm(a, a), factors(4 * scale, 1024, 8, 1, dtype)[0]),
        "grad_sqnorm, one position": (lambda a: ops.grad_sqnorm(a[:, 0], narrow[:, 0]), wide),
        "grad_sketch, Kronecker": (lambda a: ops.grad_sketch(a, narrow, KRONECKER), wide),
        "project": (lambda x: ops.project(x, assay.Sparse(16)), flat),
        "topk_scan": (lambda x: ops.topk_scan(x, few.float(), 5, reduce="max"), hidden),
        "scan_scores": (lambda x: ops.scan_scores(x, few.float()[:1]), hidden),
        "ensemble_stats": (lambda z: ops.ensemble_stats(z, labels[: 4 * scale]), flat),
    }


NAMES = list(cases(BF16, 1))
LONG = {("project", "triton"), ("grad_sqnorm, Gram", "triton")}  # in the interpreter
CASES = [
    pytest.param(*case.values, marks=[*case.marks, *([pytest.mark.slow] if case.values[::2] in LONG else [])])
    for case in checkered(NAMES, [BF16, F32], ["cpu", "triton"])
]


@pytest.mark.parametrize(("name", "dtype", "backend"), CASES)
def test_no_copy_of_an_argument(name: str, dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "triton" and name.startswith(("ensemble_stats", "linear_distillation")):
        pytest.skip("its GPU kernel is CUDA C++, or it has none")
    for module, constant, value in BLOCKS:
        monkeypatch.setattr(module, constant, value)
    call, argument = cases(dtype, 4 if backend == "cpu" else 1)[name]  # the interpreter is slow
    with assay.backend(backend):
        call(argument)  # what stays (a sketch's signs and sorted entries) is not the call's
        held = peak_bytes(lambda: call(argument))
    assert held < 0.75 * argument.nbytes, f"{held:,} bytes beside an argument of {argument.nbytes:,}"
