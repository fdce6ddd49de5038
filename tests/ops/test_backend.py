"""Which code runs an op: a backend asked for by name runs, or says what there is instead."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import assay
from assay import ops
from assay.kernels._common import Launch
from tests.ops.test_tensors import GOOD, call

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there under Triton's interpreter
WITHOUT_GPU_KERNELS = ("linear_distillation",)
TRITON = [op for op in GOOD if op not in ("ensemble_stats", "grad_sketch", "project", *WITHOUT_GPU_KERNELS)]
SKETCHES: dict[str, Any] = {  # with a kernel
    "grad_sketch Kronecker": ("grad_sketch", assay.Kronecker(4, 3)),
    "grad_sketch Sparse": ("grad_sketch", assay.Sparse(9)),
    "grad_sketch wide Sparse": ("grad_sketch", assay.Sparse(8193)),
    "grad_sketch Rademacher": ("grad_sketch", assay.Rademacher(5)),
    "project Sparse": ("project", assay.Sparse(8192, 2)),
    "project wide Sparse": ("project", assay.Sparse(8193)),
    "project Rademacher": ("project", assay.Rademacher(5)),
}
WITHOUT: dict[str, Any] = {
    "grad_sketch Mask": ("grad_sketch", assay.Mask(2, 2)),
    "grad_sketch Mask, then": ("grad_sketch", assay.Mask(2, 2, assay.Kronecker(2, 2))),
    "project Mask": ("project", assay.Mask(2, 2)),
    "project Mask, then": ("project", assay.Mask(2, 2, assay.Sparse(5))),
    "project Mask of everything": ("project", assay.Mask(99, 99)),
}


def here(op: str) -> dict[str, Any]:
    return {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in GOOD[op].items()}


@pytest.mark.parametrize("case", [*TRITON, *SKETCHES])
def test_a_forced_kernel_is_launched(case: str, chosen: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    launches: list[Launch] = []
    run = Launch.run
    monkeypatch.setattr(Launch, "run", lambda launch, tensor: (launches.append(launch), run(launch, tensor)))
    op, sketch = SKETCHES.get(case, (case, None))
    with assay.backend("triton"):
        call(op, **(here(op) | ({} if sketch is None else {"sketch": sketch})))
    assert chosen == ["triton"]
    assert launches


@pytest.mark.parametrize("case", WITHOUT)
def test_a_sketch_without_a_kernel_is_an_error(case: str) -> None:
    op, sketch = WITHOUT[case]
    with (
        assay.backend("triton"),
        pytest.raises(ValueError, match=f"^{op}: .*no .*kernel .*use backend 'auto'") as raised,
    ):
        call(op, **(here(op) | {"sketch": sketch}))
    assert type(sketch).__name__ in str(raised.value)
    call(op, **(here(op) | {"sketch": sketch}))  # auto finds a way


def test_a_gradient_without_a_kernel_is_an_error_before_the_backward_pass() -> None:
    arguments = here("linear_cross_entropy")
    for name in ("weight", "bias"):
        needs = arguments | {name: arguments[name].clone().requires_grad_()}
        words = "linear_cross_entropy, with a gradient in weight or bias: there is no triton kernel for it, only for"
        with assay.backend("triton"), pytest.raises(ValueError, match=words):
            ops.linear_cross_entropy(**needs)
        ops.linear_cross_entropy(**needs).sum().backward()
        assert needs[name].grad.isfinite().all()
        with assay.backend("triton"), torch.no_grad():
            ops.linear_cross_entropy(**needs)


@pytest.mark.parametrize("op", GOOD)
def test_every_other_backend_is_an_error_that_says_what_there_is(op: str) -> None:
    exists, absent = ("cuda", "triton") if op == "ensemble_stats" else ("triton", "cuda")
    with assay.backend(absent), pytest.raises(ValueError, match=f"^{op}: .*{absent}.*use backend 'auto'"):
        call(op, **(GOOD[op] | ({"sketch": assay.Sparse(4)} if "sketch" in GOOD[op] else {})))
    double = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in GOOD[op].items()}
    double |= {"features": torch.randn(6, 5).double(), "scales": None} if op == "scan_scores" else {}
    if op in WITHOUT_GPU_KERNELS:
        words = f"^{op}: there is no kernel in {exists}, only in cpu; use backend 'auto' or 'reference'"
        with assay.backend(exists), pytest.raises(ValueError, match=words):
            call(op, **GOOD[op])
    for name in ("cpu",) if op in WITHOUT_GPU_KERNELS else ("cpu", exists):
        words = f"^{op}: the {name} backend takes float32, bfloat16 and float16.*float64"
        with assay.backend(name), pytest.raises(ValueError, match=words):
            call(op, **double)


@pytest.mark.parametrize("op", GOOD)
def test_the_choice_by_itself(op: str, chosen: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """On CPU tensors: native code, the reference where it is asked for, and there too through the environment."""
    call(op)
    with assay.backend("reference"):
        call(op)
    monkeypatch.setenv("ASSAY_BACKEND", "reference")
    call(op)
    assert chosen == ["cpu", "reference", "reference"]
    monkeypatch.setenv("ASSAY_BACKEND", "gpu")
    with pytest.raises(ValueError, match="ASSAY_BACKEND: unknown backend 'gpu'; expected one of auto, reference"):
        call(op)


def test_a_mask_s_features_are_drawn_by_the_backend_that_is_asked_for(chosen: list[str]) -> None:
    x = torch.randn(2, 50)
    native = ops.project(x, assay.Mask(2, 3))
    with assay.backend("reference"):
        assert torch.equal(ops.project(x, assay.Mask(2, 3)), native)
    assert chosen == ["cpu", "reference"]
    words = "keep: there is no kernel in cuda, only in cpu; use backend 'auto'"
    with assay.backend("cuda"), pytest.raises(ValueError, match=words):
        torch.ops.assay.keep(x, 3, 6, [1, 2])
