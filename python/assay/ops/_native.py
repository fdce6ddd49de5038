"""Calls into ``assay._native``: addresses, strides and dtype codes. Callers have checked everything."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from assay import _native

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def isa() -> str:
    """The instruction set that ASSAY_ISA forces, or ``""`` for the best that the processor has."""
    name = os.environ.get("ASSAY_ISA", "")
    if name:
        usable = [n for n, supported in _native.instruction_sets() if supported]
        if name not in usable:
            raise ValueError(f"ASSAY_ISA={name}: not usable here; this build and processor run {', '.join(usable)}")
    return name


def threads() -> int:
    """As many as torch uses, unless ASSAY_NUM_THREADS says fewer."""
    limit = os.environ.get("ASSAY_NUM_THREADS")
    return max(1, min(torch.get_num_threads(), int(limit))) if limit else torch.get_num_threads()


def ensemble(
    logits: Sequence[Tensor], labels: Tensor | None, weights: Sequence[float], ignore_index: int, fields: int
) -> tuple[Tensor, Tensor]:
    """K tensors (N, C) of one dtype -> the float fields (10, N) float32 and the prediction (N,) int64."""
    arguments, out, prediction = ensemble_arguments(logits, labels, weights, ignore_index, fields)
    _native.ensemble(isa=isa(), **arguments, threads=threads())
    return out, prediction


def ensemble_arguments(
    logits: Sequence[Tensor], labels: Tensor | None, weights: Sequence[float], ignore_index: int, fields: int
) -> tuple[dict[str, Any], Tensor, Tensor]:
    """What both native modules take, and the results that it points to."""
    (n, c), first = logits[0].shape, logits[0]
    out = first.new_empty(10, n, dtype=torch.float32)
    prediction = first.new_empty(n, dtype=torch.int64)
    arguments = {
        "logits": [z.data_ptr() for z in logits],
        "row_strides": [z.stride(0) for z in logits],
        "col_strides": [z.stride(1) for z in logits],
        "dtype": DTYPES[first.dtype],
        "N": n,
        "C": c,
        "labels": _address(labels),
        "ignore_index": ignore_index,
        "weights": list(weights),
        "fields": fields,
        "out": out.data_ptr(),
        "prediction": prediction.data_ptr(),
    }
    return arguments, out, prediction


def multiply_reduce(x: Tensor, y: Tensor, out: NDArray[np.float64], abs_out: NDArray[np.float64] | None = None) -> None:
    """out[r] = Σ_c x[r,c]·y[r,c], and abs_out[r] = Σ_c |x[r,c]·y[r,c]|, for (R, C) tensors with adjacent columns."""
    (rows, cols), absolute = x.shape, abs_out.ctypes.data if abs_out is not None else 0
    _native.multiply_reduce(isa(), *_operand(x), *_operand(y), rows, cols, out.ctypes.data, absolute, threads())


def _operand(x: Tensor) -> tuple[int, int, int]:
    """Address, dtype and row stride."""
    return x.data_ptr(), DTYPES[x.dtype], x.stride(0)


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


# Lanes of the widest instruction set: `linear` wants its rows padded to a multiple.
LANES = 16


def pack_rows(hidden: Tensor) -> Tensor:
    """(rows, D) of any dtype and strides -> (D, padded rows) float32, as ``linear`` reads it."""
    rows, features = hidden.shape
    packed = torch.zeros(features, -(-rows // LANES) * LANES)
    packed[:, :rows] = hidden.T
    return packed


def pack_pairs(hidden: Tensor) -> Tensor:
    """(rows, D) -> (⌈D/2⌉, padded rows, 2) bfloat16, as ``linear`` reads it where ``multiplies_pairs``."""
    packed = pack_rows(hidden)
    packed = torch.nn.functional.pad(packed, (0, 0, 0, packed.shape[0] % 2))
    return packed.view(-1, 2, packed.shape[1]).mT.bfloat16().contiguous()


def multiplies_pairs() -> bool:
    """Whether ``linear`` multiplies bfloat16 by bfloat16, a pair of features at a time, as they lie in the weight."""
    return _native.multiplies_pairs(isa())


def linear(packed: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out = hidden weightᵀ + bias: ``pack_rows(hidden)``, (C, D) with adjacent columns, (C,) float32, (rows, C).

    Or ``pack_pairs(hidden)`` with a bfloat16 weight, where ``multiplies_pairs``.
    """
    (address, dtype, stride), (c, d) = _operand(weight), weight.shape
    rows, result = (packed.data_ptr(), len(out), packed.shape[1]), (out.data_ptr(), out.stride(0), threads())
    _native.linear(isa(), *rows, address, dtype, c, d, stride, _address(bias), *result, packed.dtype == torch.bfloat16)


def residual(logits: Tensor, labels: Tensor, ignore_index: int) -> NDArray[np.float64]:
    """Logits (R, C) float32 become softmax − onehot(label) in place, 0 in ignored rows; returns squared norms (R,)."""
    (rows, c), sqnorm = logits.shape, np.zeros(len(logits))
    target = (labels.data_ptr(), ignore_index, sqnorm.ctypes.data)
    _native.residual(isa(), logits.data_ptr(), rows, c, logits.stride(0), *target, threads())
    return sqnorm


def philox(key: tuple[int, int], first: int, n: int, c2: int, c3: int) -> Tensor:
    """Words (n, 4), int32 with their unsigned bits, at counters (c mod 2³², ⌊c/2³²⌋, c2, c3), c from ``first`` on."""
    out = torch.empty(n, 4, dtype=torch.int32)
    _native.philox(isa(), *key, first, n, c2, c3, out.data_ptr(), threads())
    return out


def project(vectors: Tensor, first: int, key: tuple[int, int], dim: int, nonzeros: int, out: Tensor) -> None:
    """out (B, dim) float64 += the unscaled projection of (B, n) with adjacent columns, coordinates from ``first`` on.

    ``nonzeros`` entries per coordinate; 0: a dense projection.
    """
    (address, dtype, stride), (rows, n) = _operand(vectors), vectors.shape
    _native.project(isa(), address, dtype, rows, n, stride, first, *key, dim, nonzeros, out.data_ptr(), threads())


def scan(features: Tensor, scales: Tensor | None, queries: Tensor, maximum: bool) -> Tensor:
    """Scores (M, N), or (1, N) with ``maximum``: (N, D) with adjacent columns, (N,) and (M, D) float32, contiguous."""
    scores = torch.empty(1 if maximum else len(queries), len(features))
    _scan(features, scales, queries, maximum, (scores.data_ptr(), 0, 0, 0, threads()))
    return scores


def topk_scan(features: Tensor, scales: Tensor | None, queries: Tensor, maximum: bool, k: int) -> tuple[Tensor, Tensor]:
    """Of such scores the ``k`` best and their columns, (M, k) or (1, k), best first. Every thread gathers its own k."""
    shape = (threads(), 1 if maximum else len(queries), k)
    values = torch.full(shape, torch.nan)
    indices = torch.full(shape, torch.iinfo(torch.int64).max)
    _scan(features, scales, queries, maximum, (0, k, values.data_ptr(), indices.data_ptr(), shape[0]))
    return values[0].clone(), indices[0].clone()


def _scan(
    features: Tensor, scales: Tensor | None, queries: Tensor, maximum: bool, out: tuple[int, int, int, int, int]
) -> None:
    (n, d), dtype = features.shape, 0 if scales is not None else DTYPES[features.dtype]
    rows = (features.data_ptr(), dtype, _address(scales), n, d, features.stride(0))
    _native.scan(isa(), *rows, queries.data_ptr(), len(queries), maximum, *out)
