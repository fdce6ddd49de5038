"""Vectors -> their sketch, with entries of the projection generated where they are needed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from assay.ops import _backend, _native
from assay.ops._tensors import adjacent_columns, check_tensor, wide_dtype
from assay.ops.masking import keep, mask_scale
from assay.ops.sketch import MASK_FLAT, RADEMACHER, Kronecker, Mask, Rademacher, Sketch, Sparse, buckets, cached, signs

# Sums are held in double: this much of them at most.
SUM_BYTES = 8 << 30
# The reference holds this many entries of a projection at a time.
REFERENCE_ENTRIES = 1 << 22

# add(vectors, first, key, dim, nonzeros, sums): sums (B, dim) float64 += the unscaled projection of vectors (B, n),
# the first of whose coordinates is number ``first``.
Add = Callable[[Tensor, int, tuple[int, int], int, int, Tensor], None]


def project(vectors: Tensor, sketch: Sketch) -> Tensor:
    """The sketch of every row of ``vectors``.

    Coordinate c of a row is coordinate c of the sketch's definition (``assay.Sparse``, ``assay.Rademacher``); 64-bit,
    so that D may exceed 2³². The vectors are read once, nothing of size D × dim exists, and a row's result has the same
    bits whatever the other rows and, on the CPU, the instruction set and the number of threads: float32 sums over
    slices that follow from D and dim, added up in double in a fixed order. On a GPU (``kernels/project.py``,
    ``kernels/rademacher.py``) a Sparse sketch's entries are sorted when it is first used and kept from then on, 4 bytes
    each. Only Mask runs in plain torch there, and is an error under a GPU backend that is asked for by name.

    Args:
        vectors: (B, D) float32, bfloat16 or float16 (float64 runs the reference), any strides; adjacent columns are
            read as they are, others are copied first. Not differentiated.
        sketch: Sparse, Rademacher, or a Mask (with either ``then`` or none).

    Returns:
        (B, sketch.dim) float32 (float64 if ``vectors`` is).

    Raises:
        TypeError, ValueError: vectors that are no float matrix, a sketch that does not project vectors, or one so wide
            that its sums would not fit in memory.
    """
    check_tensor("vectors", vectors, (2,), "two dimensions, (B, D)")
    vectors = vectors.detach()
    if isinstance(sketch, Mask):
        _backend.need_no_gpu("project", "there is no kernel for a Mask")
        kept = keep(vectors, sketch.rows * sketch.cols, MASK_FLAT, sketch.key)
        scale = mask_scale(vectors.shape[1], sketch.rows * sketch.cols)
        if sketch.then is not None:
            return project(kept, sketch.then) * scale
        kept = kept.to(wide_dtype(vectors)) * scale
        return torch.nn.functional.pad(kept, (0, sketch.dim - kept.shape[1]))
    key, dim, nonzeros = entries(sketch, len(vectors))
    out: Tensor = _project(vectors, key, dim, nonzeros)
    return out


def entries(sketch: Sketch, rows: int) -> tuple[tuple[int, int], int, int]:
    """The key, dim and nonzeros (0: dense) of a sketch that projects coordinates, or an error."""
    if isinstance(sketch, Kronecker):
        raise TypeError(
            f"{sketch}: projects the two factors of a layer's gradient, not vectors; "
            "use ops.grad_sketch, or a Sparse or Rademacher sketch"
        )
    if not isinstance(sketch, Sparse | Rademacher):
        raise TypeError(f"sketch: expected Kronecker, Sparse, Rademacher or Mask, got {type(sketch).__name__}")
    if 8 * rows * sketch.dim > SUM_BYTES:
        raise ValueError(
            f"{sketch}: the sums of {rows} rows take {rows * sketch.dim / 2**27:.1f} GiB, more than "
            f"{SUM_BYTES / 2**30:g} GiB; take a smaller dim or fewer rows at a time"
        )
    return sketch.key, sketch.dim, sketch.nonzeros if isinstance(sketch, Sparse) else 0


def add_native(vectors: Tensor, first: int, key: tuple[int, int], dim: int, nonzeros: int, sums: Tensor) -> None:
    _native.project(adjacent_columns(vectors), first, key, dim, nonzeros, sums)


def add_triton(vectors: Tensor, first: int, key: tuple[int, int], dim: int, nonzeros: int, sums: Tensor) -> None:
    from assay.kernels import project, rademacher
    from assay.ops import _sparse

    if nonzeros:
        add = _sparse.add_sparse if _sparse.takes(vectors, dim, nonzeros) else project.add_sparse
        add(vectors, first, key, dim, nonzeros, sums, lambda what, make: cached(what, vectors.device, make))
    else:
        rademacher.add_dense(vectors, first, key, dim, sums)


def add_reference(vectors: Tensor, first: int, key: tuple[int, int], dim: int, nonzeros: int, sums: Tensor) -> None:
    """The definition in plain torch: chunks of coordinates in the vectors' own precision, or float32, then double."""
    wide, device = wide_dtype(vectors), vectors.device
    step = max(1, REFERENCE_ENTRIES // (nonzeros or dim))
    for c in range(0, vectors.shape[1], step):
        x = vectors[:, c : c + step].to(wide)
        n = x.shape[1]
        if nonzeros == 0:
            matrix = signs(dim, n, RADEMACHER, key, device, first + c).sign_().to(wide)
            sums += _by_rows(x, matrix) if device.type == "cpu" else x @ matrix.T
            continue
        at, sign = buckets(n, dim, nonzeros, key, device, first + c)
        # index_put_ adds in a fixed order on GPUs too; index_add_ does not
        part = x.new_zeros(dim, len(x))
        for j in range(nonzeros):
            part.index_put_((at[:, j],), x.T * sign[:, j, None], accumulate=True)
        sums += part.T


def _by_rows(x: Tensor, matrix: Tensor) -> Tensor:
    """(B, n), (dim, n) -> (B, dim): each sum from pairs of its own terms. A GEMM's order of additions is a matter of
    all its rows, and so were a row's bits."""
    out = x.new_empty(len(x), len(matrix))
    for row, sums in zip(x, out, strict=True):
        terms = matrix * row
        while terms.shape[1] > 1:
            half = terms.shape[1] // 2
            pairs = terms[:, :half] + terms[:, half : 2 * half]
            terms = torch.cat([pairs, terms[:, 2 * half :]], 1) if terms.shape[1] % 2 else pairs
        sums.copy_(terms[:, 0])
    return out


def scaled(sums: Tensor, dim: int, nonzeros: int, dtype: torch.dtype) -> Tensor:
    """The entries are ±1/√nonzeros, or ±1/√dim in a dense projection."""
    return sums.mul_(1 / math.sqrt(nonzeros or dim)).to(dtype)


def _add_up(add: Add, vectors: Tensor, key: Sequence[int], dim: int, nonzeros: int) -> Tensor:
    sums = vectors.new_zeros(len(vectors), dim, dtype=torch.float64)
    add(vectors, 0, (key[0], key[1]), dim, nonzeros, sums)
    return scaled(sums, dim, nonzeros, wide_dtype(vectors))


@_backend.op(
    "project",
    reference=partial(_add_up, add_reference),
    cpu=partial(_add_up, add_native),
    triton=partial(_add_up, add_triton),
)
def _project(vectors: Tensor, key: Sequence[int], dim: int, nonzeros: int) -> Tensor:
    return vectors.new_empty(len(vectors), dim, dtype=wide_dtype(vectors))
