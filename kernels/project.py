"""project, Sparse: every bucket gathers its coordinates, in one order.

Buckets do not depend on the data. So the entries of a chunk of coordinates are sorted by bucket once, and kept; then a
bucket's sum over a run of the chunk (``TERMS`` entries of it, on average) is a loop of loads and additions of one
thread: no atomics, and an order that follows from D and dim. A tile of rows is transposed first, into a scratch that
an L2 cache holds, so that one load takes all rows of a coordinate; the vectors themselves are read once.

Triton has no gather from shared memory to speak of (``tl.gather`` becomes thousands of shuffles), hence the way through
the L2 cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from assay.kernels._common import Launch, ceil_div, run, unit_stride
from assay.kernels.philox import SPARSE, int32_key, philox4x32
from assay.kernels.slices import plan_sum

# Entries of a bucket in a run, on average: fewer would write sums as large as what is read, more would leave too few
# threads.
TERMS = 16
ROWS = 16  # of the vectors in a tile, at most
# A tile's rows of as many coordinates are transposed at a time: an L2 cache holds them.
SCRATCH_BYTES = 24 << 20
LANES, GATHER_WARPS = 128, 8  # buckets of a program
UNROLL = 4  # loads of a thread in flight
COLUMNS, TRANSPOSE_WARPS = 256, 4  # coordinates of a tile that is transposed
CODE_BLOCK = 256

# held(key, make): what ``make`` gives, from the last time if that is still there.
Held = Callable[[object, Callable[[], Tensor]], Tensor]


@triton.jit(do_not_specialize=["count", "first_block", "skip", "dim", "side", "key0", "key1"])
def _codes(out, count, first_block, skip, dim, side, key0, key1, BLOCK: tl.constexpr):
    """out (count,) int32, as bits: 2 bucket + (1 for a minus) of the entries from u = 4 first_block + skip on."""
    block = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    counter = block + first_block
    c0 = counter.to(tl.uint32)
    zero = tl.zeros_like(c0)
    k0, k1 = zero + key0.to(tl.uint32, bitcast=True), zero + key1.to(tl.uint32, bitcast=True)
    words = philox4x32(c0, (counter >> 32).to(tl.uint32), zero, zero + side, k0, k1)
    for i in tl.static_range(4):
        bucket = ((words[i] >> 1).to(tl.int64) * dim) >> 31
        code = 2 * bucket + (words[i] & 1).to(tl.int64)
        at = 4 * block + i - skip
        tl.store(out + at, code.to(tl.int32), mask=(at >= 0) & (at < count))


# Not specialised: the sizes that change from batch to batch and help no load.
@triton.jit(do_not_specialize=["rows", "row0", "count"])
def _transpose(vectors, out, rows, row0, row_stride, count, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """out (count, ROWS) = the rows of vectors (rows, count) from ``row0`` on, 0 where there are none."""
    row = row0 + tl.arange(0, ROWS).to(tl.int64)
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (c < count)[None, :]
    x = tl.load(vectors + row[:, None] * row_stride + c[None, :], mask=inside, other=0.0)
    at = out + c.to(tl.int64)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
    tl.store(at, tl.trans(x), mask=(c < count)[:, None])


@triton.jit(do_not_specialize=["rows", "row0", "lanes"])
def _gather(
    x,  # (.., ROWS): the rows of each coordinate
    order,  # (lanes + 1 + entries,) int32: where each lane's entries begin and end, then 2 coordinate + (1 for a minus)
    partial,  # (runs, rows, dim) float32
    rows,
    row0,
    lanes,  # runs · dim
    dim,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """A lane is a bucket of a run; its entries are added one after the other."""
    lane = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    begin = tl.load(order + lane, mask=lane < lanes, other=0)
    end = tl.load(order + lane + 1, mask=lane < lanes, other=0)
    entries = order + lanes + 1
    r = tl.arange(0, ROWS)
    sums = tl.zeros((LANES, ROWS), tl.float32)
    for j in range(0, tl.max(end - begin), UNROLL):
        for i in tl.static_range(UNROLL):
            at = begin + j + i
            entry = tl.load(entries + at, mask=at < end, other=0)
            coordinate = (entry >> 1).to(tl.int64)[:, None] * ROWS + r[None, :]
            value = tl.load(x + coordinate, mask=(at < end)[:, None], other=0.0).to(tl.float32)
            sums += value * (1 - 2 * (entry & 1)).to(tl.float32)[:, None]
    row = row0 + r
    to = partial + ((lane // dim)[:, None] * rows + row[None, :]) * dim + (lane % dim)[:, None]
    tl.store(to, sums, mask=(lane < lanes)[:, None] & (row < rows)[None, :])


def add_sparse(
    vectors: Tensor, first: int, key: tuple[int, int], dim: int, nonzeros: int, sums: Tensor, held: Held
) -> None:
    """sums (B, dim) float64, contiguous, += the signed sums of vectors (B, n), whose coordinates begin at ``first``."""
    for launches in plan(vectors, first, key, dim, nonzeros, sums, held):
        run(launches)


def plan(
    vectors: Tensor, first: int, key: tuple[int, int], dim: int, nonzeros: int, sums: Tensor, held: Held
) -> Iterator[list[Launch]]:
    """For each chunk of coordinates: the sums of its runs, a tile of rows at a time, and their addition."""
    vectors = unit_stride(vectors)
    rows = min(ROWS, triton.next_power_of_2(len(vectors)))
    length = run_length(vectors, dim, nonzeros)
    step = min(chunk(vectors) // length * length, vectors.shape[1])
    scratch = vectors.new_empty(step, rows) if rows > 1 else None
    for c in range(0, vectors.shape[1], step):
        part = vectors[:, c : c + step]
        n = part.shape[1]

        def make(begin: int = first + c, n: int = n) -> Tensor:
            return sort_entries(begin, n, length, key, dim, nonzeros, vectors.device)

        order = held(("sparse", key, dim, nonzeros, first + c, n, length), make)
        runs = ceil_div(n, length)
        partial = vectors.new_empty((runs, len(part), dim), dtype=torch.float32)
        launches = []
        for row0 in range(0, len(part), rows):
            if scratch is not None:
                launches.append(plan_transpose(part, scratch, row0))
            launches.append(plan_gather(part if scratch is None else scratch, order, partial, row0))
        yield [*launches, plan_sum(partial, sums)]


def chunk(vectors: Tensor) -> int:
    """Coordinates at a time, at most: by the type alone, as a row's bits are."""
    return SCRATCH_BYTES // (ROWS * vectors.element_size())


def run_length(vectors: Tensor, dim: int, nonzeros: int) -> int:
    """Coordinates of a run."""
    return min(chunk(vectors), max(1, TERMS * dim // nonzeros))


def sort_entries(
    first: int, count: int, length: int, key: tuple[int, int], dim: int, nonzeros: int, device: torch.device
) -> Tensor:
    """What ``_gather`` takes for ``count`` coordinates from number ``first`` on, in runs of ``length``.

    The entries lie run by run and bucket by bucket; those of a bucket are in their order.
    """
    lane, coordinate, minus = by_bucket(first, count, length, key, dim, nonzeros, device)
    lanes = ceil_div(count, length) * dim
    bounds = torch.searchsorted(lane, torch.arange(lanes + 1, device=device), out_int32=True)
    return torch.cat([bounds, (2 * coordinate + minus).int()])


def by_bucket(
    first: int, count: int, length: int, key: tuple[int, int], dim: int, nonzeros: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Of ``count`` coordinates from number ``first`` on, in runs of ``length``: every entry's lane
    (run · dim + bucket), its coordinate, and 1 for a minus, int64; lane by lane, and a lane's in their order."""
    codes = torch.empty(count * nonzeros, dtype=torch.int32, device=device)
    plan_codes(codes, first * nonzeros, key, dim).run(codes)
    wide = codes.long() & 0xFFFFFFFF
    coordinate = torch.arange(count, device=device).repeat_interleave(nonzeros, output_size=len(codes))
    lane, at = (coordinate // length * dim + (wide >> 1)).sort(stable=True)
    return lane, coordinate[at], (wide & 1)[at]


def plan_codes(codes: Tensor, first: int, key: tuple[int, int], dim: int) -> Launch:
    """Fills ``codes`` with the entries from number ``first`` on."""
    key0, key1 = int32_key(key)
    skip = first % 4
    arguments = {
        "out": codes,
        "count": len(codes),
        "first_block": first // 4,
        "skip": skip,
        "dim": dim,
        "side": SPARSE,
        "key0": key0,
        "key1": key1,
        "BLOCK": CODE_BLOCK,
    }
    return Launch(_codes, (ceil_div(skip + len(codes), 4 * CODE_BLOCK),), arguments, 4, 1)


def plan_transpose(vectors: Tensor, out: Tensor, row0: int) -> Launch:
    rows, count = vectors.shape
    arguments = {
        "vectors": vectors,
        "out": out,
        "rows": rows,
        "row0": row0,
        "row_stride": vectors.stride(0),
        "count": count,
        "ROWS": out.shape[1],
        "COLUMNS": COLUMNS,
    }
    return Launch(_transpose, (ceil_div(count, COLUMNS),), arguments, TRANSPOSE_WARPS, 1)


def plan_gather(x: Tensor, order: Tensor, partial: Tensor, row0: int) -> Launch:
    """``x``: (n, rows), or one row as it is, (1, n)."""
    runs, rows, dim = partial.shape
    arguments = {
        "x": x,
        "order": order,
        "partial": partial,
        "rows": rows,
        "row0": row0,
        "lanes": runs * dim,
        "dim": dim,
        "ROWS": 1 if len(x) == 1 else x.shape[1],
        "LANES": LANES,
        "UNROLL": UNROLL,
    }
    return Launch(_gather, (ceil_div(runs * dim, LANES),), arguments, GATHER_WARPS, 1)
