"""Calls into ``assay._cuda``: an extension of its own, loaded when first used, absent from builds without nvcc."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from assay.ops import _native


def built() -> bool:
    return importlib.util.find_spec("assay._cuda") is not None


def build_info() -> str:
    """What the kernels were built with and for, or why there are none."""
    if not built():
        return "not built"
    try:
        from assay import _cuda as kernels

        return kernels.build_info()
    except ImportError as error:
        return str(error)


def missing(device: int | None = None) -> str | None:
    """Why CUDA kernels cannot run on a device (the current one), and what to do; None if they can."""
    if not built():
        return "this build has no CUDA kernels; install assay where nvcc is, with -C cmake.define.ASSAY_CUDA=ON"
    if device is None:
        device = torch.cuda.current_device() if torch.cuda.is_available() else -1
    return _unusable(device)


@cache
def _unusable(device: int) -> str | None:
    try:
        from assay import _cuda as kernels
    except ImportError as error:
        return f"its CUDA kernels cannot be loaded: {error}"
    try:
        with torch.cuda.device(device):  # −1: as it is
            capability = kernels.compute_capability()
    except RuntimeError as error:
        return f"no CUDA device can be used: {error}"
    if capability < 80:
        return f"device {device} has compute capability {capability / 10}; the CUDA kernels need 8.0 or later"
    return None


def ensemble(
    logits: Sequence[Tensor], labels: Tensor | None, weights: Sequence[float], ignore_index: int, fields: int
) -> tuple[Tensor, Tensor]:
    """As ``_native.ensemble``, for tensors of one CUDA device, on its current stream; nothing waits for the device."""
    from assay import _cuda as kernels

    arguments, out, prediction = _native.ensemble_arguments(logits, labels, weights, ignore_index, fields)
    workspaces = []  # held until the launch is queued: what the allocator gives it to then comes after it

    def allocate(size: int) -> int:
        workspaces.append(out.new_empty(size, dtype=torch.uint8))
        return workspaces[0].data_ptr()

    with torch.cuda.device(out.device):
        stream = torch.cuda.current_stream(out.device).cuda_stream
        kernels.ensemble(**arguments, allocate=allocate, stream=stream)
    return out, prediction


def sparse_chunk(vectors: Tensor, dim: int, nonzeros: int, *, one_row: bool) -> int:
    """Coordinates of a chunk of what ``sparse`` takes, or 0 where the vectors' device doesn't take such a sketch."""
    from assay import _cuda as kernels

    with torch.cuda.device(vectors.device):
        return kernels.sparse_chunk(dim, nonzeros, _native.DTYPES[vectors.dtype], one_row)


def sparse(
    vectors: Tensor,
    order: Tensor,
    nonzeros: int,
    slice_length: int,
    slices_of_piece: int,
    partial: Tensor,
    sums: Tensor,
) -> None:
    """sums (B, dim) float64, contiguous, += the signed sums of vectors (B, n), last stride 1; see ops/_sparse.py.

    ``partial``: (pieces, B, dim) float64, to work in.
    """
    from assay import _cuda as kernels

    (rows, count), dim = vectors.shape, sums.shape[1]
    with torch.cuda.device(vectors.device):
        stream = torch.cuda.current_stream(vectors.device).cuda_stream
        kernels.sparse(
            vectors.data_ptr(),
            _native.DTYPES[vectors.dtype],
            rows,
            vectors.stride(0),
            count,
            order.data_ptr(),
            dim,
            nonzeros,
            slice_length,
            slices_of_piece,
            partial.data_ptr(),
            sums.data_ptr(),
            stream,
        )
