"""Which code runs an op: ``with assay.backend("reference"): ...`` or the environment variable ASSAY_BACKEND.

``op`` is how every op says what runs it where.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from assay.ops import _cuda
from assay.ops._exact import exact

if TYPE_CHECKING:
    from torch._ops import OpOverload

BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")
GPU_BACKENDS = ("triton", "cuda")

_chosen: ContextVar[str | None] = ContextVar("assay_backend", default=None)
_log = logging.getLogger("assay")
_told: set[str] = set()

Run = Callable[..., Any]


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run the ops inside the block with one backend: ``auto``, ``reference``, ``cpu``, ``triton`` or ``cuda``.

    ``auto`` takes the fastest that fits the tensors. A named backend that cannot run an op raises; it never falls back.
    Raises ValueError for an unknown name.
    """
    token = _chosen.set(_check(name, "assay.backend()"))
    try:
        yield
    finally:
        _chosen.reset(token)


def _check(name: str, where: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{where}: unknown backend {name!r}; expected one of {', '.join(BACKENDS)}")
    return name


def _asked_for() -> str:
    return _chosen.get() or _check(os.environ.get("ASSAY_BACKEND", "auto"), "ASSAY_BACKEND")


def op(
    name: str,
    *,
    reference: Run,
    cpu: Run,
    triton: Run | None = None,
    cuda: Run | None = None,
    operands: int | None = None,
    prepare: Run | None = None,
    lacks: Callable[..., str | None] | None = None,
    label: Callable[..., str] | None = None,
) -> Callable[[Run], OpOverload]:
    """The op assay::``name`` of ``torch.ops``, which writes to none of its arguments and has no derivative.

    What is decorated makes the empty result, and its signature is the op's. The choice falls when the op runs. float64
    has no kernels; where an operand has no elements there is nothing for one to do: both run the reference.

    Args:
        reference, cpu, triton, cuda: what runs it, in plain torch on any device, natively, or on a GPU (one of the two
            at most).
        operands: how many of the first arguments, tensors or lists of tensors, the choice depends on; None: all.
        prepare: arguments -> what the runs take in their place, after checks of values.
        lacks: arguments -> for what among them there is no GPU kernel, and for what there is; or None.
        label: arguments -> the public function's name, where it isn't ``name``.
    """
    runs = {
        backend: run
        for backend, run in (("reference", reference), ("cpu", cpu), ("triton", triton), ("cuda", cuda))
        if run is not None
    }

    @exact()
    def body(*arguments: Any) -> Any:
        tensors = _tensors(arguments[:operands])
        title = label(*arguments) if label else name
        chosen = choose(title, tensors, runs, (lambda: lacks(*arguments)) if lacks else lambda: None)
        if not all(t.numel() for t in tensors):
            chosen = "reference"
        return runs[chosen](*(prepare(*arguments) if prepare else arguments))

    def backward(*_: Any) -> Any:
        raise RuntimeError(f"assay::{name} has no derivative; expected inputs without gradients, or torch.no_grad()")

    def register(fake: Run) -> OpOverload:
        # As torch.library.custom_op does, but for the import of torch._dynamo in the first call: that takes seconds.
        whole = f"assay::{name}"
        schema = torch.library.infer_schema(fake, mutates_args=())
        torch.library.define(whole, schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(whole, "default", body)
        torch.library.register_fake(whole, fake)
        torch.library.register_autograd(whole, backward)
        made: OpOverload = getattr(torch.ops.assay, name).default
        return made

    return register


def _tensors(arguments: Sequence[Any]) -> list[Tensor]:
    nested = [a if isinstance(a, list | tuple) else [a] for a in arguments]
    return [t for group in nested for t in group if isinstance(t, Tensor)]


def choose(op: str, tensors: Sequence[Tensor], runs: Mapping[str, Run], lacks: Callable[[], str | None]) -> str:
    """The backend for one call, a key of ``runs``."""
    name, gpu = _asked_for(), next((b for b in GPU_BACKENDS if b in runs), None)
    device, double = tensors[0].device, any(t.dtype == torch.float64 for t in tensors)
    if name == "reference":
        return name
    if name == "auto":
        return "reference" if double else "cpu" if device.type == "cpu" else _on_gpu(op, device, gpu, lacks)
    if name == "cpu":
        if double or device.type != "cpu":
            raise _unfit(op, name, "CPU", tensors)
        return name
    if name != gpu:
        there = (
            f"its GPU kernel is {gpu}, there is none in {name}" if gpu else f"there is no kernel in {name}, only in cpu"
        )
        raise no_kernel(op, there, gpu)
    interpreted = name == "triton" and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    if double or (device.type != "cuda" and not interpreted):
        raise _unfit(op, name, "CUDA", tensors)
    if reason := _missing(gpu, device):
        raise RuntimeError(f"{op}: backend {name!r} cannot run: {reason}")
    if lack := lacks():
        raise no_kernel(op, lack)
    return name


def need_no_gpu(op: str, what: str) -> None:
    """ValueError if a GPU kernel is asked for by name: of ``what`` there is none. Not while a graph is traced, where
    the context is unknown and the ops that the graph will run speak for themselves."""
    if not torch.compiler.is_compiling() and (name := _asked_for()) in GPU_BACKENDS:
        raise no_kernel(op, f"{what} in {name}, only in cpu and reference")


def no_kernel(op: str, what: str, other: str | None = None) -> ValueError:
    return ValueError(f"{op}: {what}; use backend 'auto' or {other or 'reference'!r}")


def _unfit(op: str, name: str, device: str, tensors: Sequence[Tensor]) -> ValueError:
    odd = next((t for t in tensors if t.dtype == torch.float64), tensors[0])
    return ValueError(
        f"{op}: the {name} backend takes float32, bfloat16 and float16 {device} tensors, "
        f"got {odd.dtype} on {odd.device}; use backend 'auto' or 'reference'"
    )


def _on_gpu(op: str, device: torch.device, gpu: str | None, lacks: Callable[[], str | None]) -> str:
    """``gpu``, or ``"reference"``, which is said once, and what to do, unless there is no kernel to be had."""
    if gpu is None:
        return "reference"
    reason = _missing(gpu, device) if device.type == "cuda" else f"there are no kernels for {device.type} tensors"
    if reason is None:
        return "reference" if lacks() else gpu
    if op not in _told:
        _told.add(op)
        _log.warning("%s runs in plain torch: %s", op, reason)
    return "reference"


def _missing(gpu: str, device: torch.device) -> str | None:
    """Why this kind of GPU kernel cannot run on this device, and what to do; None if it can."""
    if gpu == "cuda":
        return _cuda.missing(device.index)
    return None if importlib.util.find_spec("triton") else "triton is not installed; pip install 'assay[gpu]'"
