"""Calls into ``libassay_cuda``: a library of its own, loaded when first used, absent from builds without nvcc."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from assay import _native

LIBRARY = Path(_native.__file__).with_name("libassay_cuda.so")

_ABI = 1
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class _EnsembleArgs(ctypes.Structure):
    """``assay::EnsembleArgs`` of csrc/assay.h."""

    _fields_ = (
        ("logits", ctypes.POINTER(ctypes.c_void_p)),
        ("row_strides", ctypes.POINTER(ctypes.c_int64)),
        ("col_strides", ctypes.POINTER(ctypes.c_int64)),
        ("dtype", ctypes.c_int32),
        ("K", ctypes.c_int64),
        ("N", ctypes.c_int64),
        ("C", ctypes.c_int64),
        ("labels", ctypes.c_void_p),
        ("ignore_index", ctypes.c_int64),
        ("weights", ctypes.POINTER(ctypes.c_double)),
        ("fields", ctypes.c_uint32),
        ("out", ctypes.c_void_p),
        ("prediction", ctypes.c_void_p),
        ("threads", ctypes.c_int32),
    )


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(LIBRARY))
    found = library.assay_cuda_abi_version()
    if found != _ABI:
        raise OSError(f"{LIBRARY.name} has interface {found}, expected {_ABI}; install assay again")
    library.assay_cuda_error_string.restype = ctypes.c_char_p
    library.assay_cuda_build_info.restype = ctypes.c_char_p
    args = ctypes.POINTER(_EnsembleArgs)
    library.assay_cuda_ensemble_workspace.argtypes = (args, ctypes.POINTER(ctypes.c_size_t))
    library.assay_cuda_ensemble.argtypes = (args, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    return library


def build_info() -> str:
    """What the library was built with and for, or why there is none."""
    if not LIBRARY.exists():
        return "not built"
    try:
        info: bytes = _library().assay_cuda_build_info()
    except OSError as error:
        return str(error)
    return info.decode()


def missing(device: int | None = None) -> str | None:
    """Why CUDA kernels cannot run on a device (the current one), and what to do; None if they can."""
    if not LIBRARY.exists():
        return "this build has no CUDA library; install assay where nvcc is, with -C cmake.define.ASSAY_CUDA=ON"
    if device is None:
        device = torch.cuda.current_device() if torch.cuda.is_available() else -1
    return _unusable(device)


@cache
def _unusable(device: int) -> str | None:
    try:
        library = _library()
    except OSError as error:
        return f"its CUDA library cannot be loaded: {error}"
    capability = ctypes.c_int32()
    with torch.cuda.device(device):  # −1: as it is
        code = library.assay_cuda_compute_capability(ctypes.byref(capability))
    if code:
        return f"no CUDA device can be used: {_name(code)}"
    if capability.value < 80:
        return f"device {device} has compute capability {capability.value / 10}; the CUDA library needs 8.0 or later"
    return None


def ensemble(
    logits: Sequence[Tensor], labels: Tensor | None, weights: Sequence[float], ignore_index: int, fields: int
) -> tuple[Tensor, Tensor]:
    """As ``_native.ensemble``, for tensors of one CUDA device, on its current stream; nothing waits for the device."""
    k, (n, c), first = len(logits), logits[0].shape, logits[0]
    out = first.new_empty(10, n, dtype=torch.float32)
    prediction = first.new_empty(n, dtype=torch.int64)
    args = _EnsembleArgs(
        (ctypes.c_void_p * k)(*(z.data_ptr() for z in logits)),
        (ctypes.c_int64 * k)(*(z.stride(0) for z in logits)),
        (ctypes.c_int64 * k)(*(z.stride(1) for z in logits)),
        _DTYPES[first.dtype],
        k,
        n,
        c,
        labels.data_ptr() if labels is not None else None,
        ignore_index,
        (ctypes.c_double * k)(*weights),
        fields,
        out.data_ptr(),
        prediction.data_ptr(),
        0,
    )
    library, size = _library(), ctypes.c_size_t()
    with torch.cuda.device(first.device):
        _check(library.assay_cuda_ensemble_workspace(ctypes.byref(args), ctypes.byref(size)))
        workspace = first.new_empty(size.value, dtype=torch.uint8)
        stream = torch.cuda.current_stream(first.device).cuda_stream
        _check(library.assay_cuda_ensemble(ctypes.byref(args), workspace.data_ptr() or None, size, stream))
    return out, prediction


def _check(error: int) -> None:
    if error:
        raise RuntimeError(f"ensemble_stats: the CUDA kernel could not be launched: {_name(error)}")


def _name(error: int) -> str:
    text: bytes = _library().assay_cuda_error_string(error)
    return text.decode()
