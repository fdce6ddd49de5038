"""project, Sparse, in CUDA C++ (csrc/cuda/sparse.h): what its launches take, and which sketches it takes.

Every chunk's entries are sorted by bucket once and kept, 2 bytes each. The kernel holds a chunk's values in shared
memory, where every bucket gathers its own; Triton's way there (``project.py``) is the L2 cache. That is what runs where
this kernel is not built, or its limits or a device's shared memory don't take the sketch: by dim, nonzeros and dtype
alone, as a row's bits are.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from assay.kernels._common import ceil_div, round_up, unit_stride
from assay.kernels.project import Held, by_bucket
from assay.ops import _cuda

# Of a bucket in a slice, which is a float32 sum: entries on average, and fewer where that makes SLICES slices.
MOST_TERMS, LEAST_TERMS, SLICES = 64, 16, 128
ALIGNED = 8192  # a slice is whole chunks
# A thread owns a bucket: fewer would leave most of a block idle.
LEAST_DIM = 256
# A block of threads takes a piece of so many slices that there are at most as many pieces: two waves of a large card.
PIECES = 256
# The pieces' sums, in double, at most: some rows at a time.
PARTIAL_BYTES = 256 << 20
ROW_STEP = 16  # rows of a block of threads
# Coordinates at a time, in the order that is kept, and while it is sorted.
SPAN, SORT_SPAN = 1 << 26, 1 << 21


def takes(vectors: Tensor, dim: int, nonzeros: int) -> bool:
    """Whether the kernel is built, and takes such a sketch on the vectors' device."""
    if dim < LEAST_DIM or not vectors.is_cuda or _cuda.missing(vectors.device.index):
        return False
    return _cuda.sparse_chunk(vectors, dim, nonzeros, one_row=True) > 0


def add_sparse(
    vectors: Tensor, first: int, key: tuple[int, int], dim: int, nonzeros: int, sums: Tensor, held: Held
) -> None:
    """``project.add_sparse``, for sketches that ``takes``."""
    vectors = unit_stride(vectors)
    for c in range(0, vectors.shape[1], SPAN):
        span = vectors[:, c : c + SPAN]
        length, per_piece = cut(span.shape[1], dim, nonzeros)
        pieces = ceil_div(span.shape[1], length * per_piece)
        step = max(1, PARTIAL_BYTES // (8 * pieces * dim * ROW_STEP)) * ROW_STEP
        for row in range(0, len(span), step):
            rows = span[row : row + step]
            one = len(rows) == 1
            chunk = _cuda.sparse_chunk(vectors, dim, nonzeros, one_row=one)
            what = (first + c, span.shape[1], chunk, key, dim, nonzeros, one)
            order = held(("sparse chunks", *what), partial(sort_entries, *what, vectors.device))
            work = sums.new_empty(pieces, len(rows), dim)
            _cuda.sparse(rows, order, nonzeros, length, per_piece, work, sums[row : row + step])


def cut(count: int, dim: int, nonzeros: int) -> tuple[int, int]:
    """Coordinates of a slice, and slices of a piece: by D, dim and nonzeros alone, as a row's bits are."""
    terms = max(LEAST_TERMS * dim // nonzeros, min(MOST_TERMS * dim // nonzeros, ceil_div(count, SLICES)))
    length = round_up(max(1, terms), ALIGNED)
    return length, ceil_div(ceil_div(count, length), PIECES)


def sort_entries(
    first: int, count: int, chunk: int, key: tuple[int, int], dim: int, nonzeros: int, one: bool, device: torch.device
) -> Tensor:
    """(chunks, width) int16, as bits: where each of a chunk's buckets begins, and where the last one ends, up to a
    multiple of 8 numbers; then 2 place + (1 for a minus) of its entries, bucket by bucket and in their order.

    A coordinate's place is where its values lie in shared memory: itself for ``one`` row, else its unit of 16 bytes.
    """
    head = round_up(dim + 1, 8)
    out = torch.zeros(ceil_div(count, chunk), head + chunk * nonzeros, dtype=torch.int16, device=device)
    for c in range(0, count, SORT_SPAN):
        n = min(SORT_SPAN, count - c)
        bucket, coordinate, minus = by_bucket(first + c, n, chunk, key, dim, nonzeros, device)
        place = coordinate % chunk
        if not one:
            place ^= place >> 3 & 1  # sparse_place, csrc/cuda/sparse.h
        entries = place.new_zeros(ceil_div(n, chunk) * chunk * nonzeros)
        entries[: n * nonzeros] = 2 * place + minus
        part = out[c // chunk : ceil_div(c + n, chunk)]
        number = torch.arange(len(part), device=device)[:, None]
        bounds = torch.searchsorted(bucket, number * dim + torch.arange(dim + 1, device=device))
        part[:, : dim + 1] = _bits(bounds - number * (chunk * nonzeros))
        part[:, head:] = _bits(entries.view(len(part), -1))
    return out


def _bits(x: Tensor) -> Tensor:
    """Numbers below 2¹⁶ as int16 of the same bits."""
    return torch.where(x < 1 << 15, x, x - (1 << 16)).to(torch.int16)
