"""Which code runs an op: ``with assay.backend("reference"): ...`` or the environment variable ASSAY_BACKEND."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

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


def choose(op: str, tensor: Tensor) -> str:
    """The backend for one call: ``"cpu"`` or ``"reference"``. ``tensor`` stands for the op's inputs."""
    name = _chosen.get()
    if name is None:
        name = _check(os.environ.get("ASSAY_BACKEND", "auto"), "ASSAY_BACKEND")
    native = tensor.device.type == "cpu" and tensor.dtype != torch.float64
    if name == "auto":
        if tensor.device.type != "cpu" and op not in _told:
            _told.add(op)
            _log.warning("%s has no kernel for %s tensors in this version: using plain torch", op, tensor.device.type)
        return "cpu" if native else "reference"
    if name == "cpu" and not native:
        raise ValueError(
            f"{op}: the cpu backend takes float32, bfloat16 and float16 CPU tensors, "
            f"got {tensor.dtype} on {tensor.device}; use backend 'auto' or 'reference'"
        )
    if name in ("triton", "cuda"):
        raise ValueError(f"{op}: there is no {name} kernel in this version; use backend 'auto', 'cpu' or 'reference'")
    return name
