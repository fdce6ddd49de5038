"""Which code runs an op: ``with assay.backend("reference"): ...`` or the environment variable ASSAY_BACKEND."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from assay.ops import _cuda

if TYPE_CHECKING:
    from torch._library.custom_ops import CustomOpDef  # torch.library has it, but not in its __all__

BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")

_chosen: ContextVar[str | None] = ContextVar("assay_backend", default=None)
_log = logging.getLogger("assay")
_told: set[str] = set()


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


@contextmanager
def exact() -> Iterator[None]:
    """Without the caller's autocast: an op's products have the precision that the op promises."""
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def custom_op(name: str) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """``torch.library.custom_op`` of a function that writes to none of its arguments, run as ``exact`` says."""

    def register(body: Callable[..., Any]) -> CustomOpDef:
        schema = torch.library.infer_schema(body, mutates_args=())
        return torch.library.custom_op(name, exact()(body), mutates_args=(), schema=schema)

    return register


def choose(op: str, tensor: Tensor, gpu: Literal["triton", "cuda"]) -> str:
    """The backend for one call: ``"cpu"``, ``"reference"``, or ``gpu``, the kind of GPU kernel that the op has.

    ``tensor`` stands for the op's inputs. float64 has no kernels: it runs the reference.
    """
    name = _chosen.get()
    if name is None:
        name = _check(os.environ.get("ASSAY_BACKEND", "auto"), "ASSAY_BACKEND")
    if name == "reference":
        return name
    device, double = tensor.device.type, tensor.dtype == torch.float64
    if name == "auto":
        return "reference" if double else "cpu" if device == "cpu" else _on_gpu(op, tensor.device, gpu)
    if name == "cpu":
        if double or device != "cpu":
            raise _unfit(op, name, "CPU", tensor)
        return name
    if name != gpu:
        raise ValueError(f"{op}: its GPU kernel is {gpu}, there is none in {name}; use backend 'auto' or {gpu!r}")
    interpreted = name == "triton" and device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    if double or (device != "cuda" and not interpreted):
        raise _unfit(op, name, "CUDA", tensor)
    if reason := _missing(gpu, tensor.device):
        raise RuntimeError(f"{op}: backend {name!r} cannot run: {reason}")
    return name


def _unfit(op: str, name: str, device: str, tensor: Tensor) -> ValueError:
    return ValueError(
        f"{op}: the {name} backend takes float32, bfloat16 and float16 {device} tensors, "
        f"got {tensor.dtype} on {tensor.device}; use backend 'auto' or 'reference'"
    )


def _on_gpu(op: str, device: torch.device, gpu: str) -> str:
    """``gpu``, or ``"reference"`` with one logged line that says why and what to do."""
    reason = _missing(gpu, device) if device.type == "cuda" else f"there are no kernels for {device.type} tensors"
    if reason is None:
        return gpu
    if op not in _told:
        _told.add(op)
        _log.warning("%s runs in plain torch: %s", op, reason)
    return "reference"


def _missing(gpu: str, device: torch.device) -> str | None:
    """Why this kind of GPU kernel cannot run on this device, and what to do; None if it can."""
    if gpu == "cuda":
        return _cuda.missing(device.index)
    return None if importlib.util.find_spec("triton") else "triton is not installed; pip install 'assay[gpu]'"
