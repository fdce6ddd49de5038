"""Streams, devices, CUDA graphs, torch.compile and the fallback: what holds for every op."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import assay
from assay.ops import _backend, _cuda
from tests.gpu.harness import KERNELS, assert_same, backend, capture

Call = Callable[..., Any]


@dataclass
class Best:
    """What topk_scan returns, as ``assert_same`` takes it."""

    values: Tensor
    indices: Tensor


def calls(device: torch.device) -> dict[str, tuple[Call, list[Tensor]]]:
    """Every op, looked up when it is called, and the float tensors that it takes."""
    labels = torch.randint(1000, (16,), device=device)
    a, g, v = (torch.randn(s, device=device) for s in ((4, 33, 48), (4, 33, 40), (40, 48)))
    z = torch.randn(3, 16, 1000, device=device)
    h, w, d = (torch.randn(s, device=device) for s in ((2, 16, 64), (2, 1000, 64), (2, 1000, 64)))
    sketch, sparse = assay.Kronecker(4, 4), assay.Sparse(100, 2)
    x, q = torch.randn(700, 48, device=device), torch.randn(3, 48, device=device)
    return {
        "ensemble_stats": (lambda z: assay.ops.ensemble_stats(z, labels), [z]),
        "linear_ensemble_stats": (lambda h, w: assay.ops.linear_ensemble_stats(h, w, labels), [h, w]),
        "head_scores": (
            lambda h, w, d: assay.ops.head_scores(h, w, labels, directions=d, sketch=sketch),
            [h, w, d],
        ),
        "linear_cross_entropy": (lambda h, w: assay.ops.linear_cross_entropy(h[0], w[0], labels), [h, w]),
        "grad_dot": (lambda a, g, v: assay.ops.grad_dot(a, g, v), [a, g, v]),
        "grad_sqnorm": (lambda a, g: assay.ops.grad_sqnorm(a, g), [a, g]),
        "topk_scan": (lambda x, q: Best(*assay.ops.topk_scan(x, q, 20, reduce="none")), [x, q]),
        "scan_scores": (lambda x, q: assay.ops.scan_scores(x, q, reduce="max"), [x, q]),
        "grad_sketch": (lambda a, g: assay.ops.grad_sketch(a, g, sketch), [a, g]),
        "project": (lambda z: assay.ops.project(z[0], sparse), [z]),
    }


ops = pytest.mark.parametrize("op", KERNELS)


@ops
def test_cuda_graph_replays_on_new_data(op: str, device: torch.device) -> None:
    run, inputs = calls(device)[op]
    with backend(op):
        replay, result = capture(lambda: run(*inputs))
        for _ in range(2):
            for x in inputs:
                x.normal_()
            replay()
            assert_same(result, run(*inputs), "a replay against an eager call")


@ops
def test_torch_compile_fullgraph(op: str, device: torch.device) -> None:
    run, inputs = calls(device)[op]
    torch._dynamo.reset()  # the ops share one lambda, and Dynamo makes at most eight graphs of one
    compiled = torch.compile(
        lambda *x: run(*(y * 2 for y in x)),
        fullgraph=True,
        backend="inductor" if device.type == "cuda" else "aot_eager",
    )
    with backend(op):
        assert_same(compiled(*inputs), run(*(x * 2 for x in inputs)), "compiled against eager")


@ops
def test_runs_on_the_current_stream(op: str, cuda: torch.device) -> None:
    """The inputs arrive late, on a side stream: a kernel on any other stream would read what was there before."""
    run, inputs = calls(cuda)[op]
    final = [torch.randn_like(x) for x in inputs]
    side = torch.cuda.Stream()
    with backend(op):
        want = run(*final)
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(100_000_000)  # about 50 ms
            for x, y in zip(inputs, final, strict=True):
                x.copy_(y)
            got = run(*inputs)
        side.synchronize()
    assert_same(got, want, "on a side stream")


@ops
def test_runs_on_the_tensors_device(op: str, cuda: torch.device) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    other = torch.device("cuda", 1 - cuda.index if cuda.index < 2 else 0)
    run, inputs = calls(other)[op]
    with backend(op):
        got = run(*inputs)
        with torch.cuda.device(other):
            assert_same(got, run(*inputs), "while another device is current")


@ops
def test_auto_takes_the_kernel(op: str, cuda: torch.device) -> None:
    run, inputs = calls(cuda)[op]
    with backend(op):
        want = run(*inputs)
    with assay.backend("auto"):
        assert_same(run(*inputs), want, "auto against the kernel by name")


@ops
def test_fallback_says_what_to_do_once(
    op: str, cuda: torch.device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run, inputs = calls(cuda)[op]
    monkeypatch.setattr(_backend, "_told", set())
    if KERNELS[op] == "cuda":
        monkeypatch.setattr(_cuda, "missing", lambda device: "no CUDA library for this test; build it")
        reason = "no CUDA library for this test; build it"
    else:
        monkeypatch.setattr(_backend.importlib.util, "find_spec", lambda name: None)
        reason = "triton is not installed; pip install 'assay[gpu]'"
    with caplog.at_level(logging.WARNING, logger="assay"):
        got = run(*inputs)
        run(*inputs)
    assert [r.getMessage() for r in caplog.records] == [f"{op} runs in plain torch: {reason}"]
    with assay.backend("reference"):
        assert_same(got, run(*inputs), "the fallback against the reference")
    with assay.backend(KERNELS[op]), pytest.raises(RuntimeError, match="cannot run"):
        run(*inputs)
