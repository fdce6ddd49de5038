"""topk_scan: inner products of every row with a few queries, and each query's best rows from the same read.

A program takes a chunk of rows, block by block, and keeps the best of them in registers: sorted, as integers that hold
a row's whole rank, its score above its index. No two are equal, so the best are the same whatever the chunks, and the
merge of the chunks' candidates has no ties to settle.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from assay.kernels._common import Launch, ceil_div, generation, unit_stride
from assay.kernels.folding import FOLD, fold, unfolded

# Rows of a block, and how many of the best a program can keep: a sorted block's worth. Beyond that the scores are
# written, 4 bytes for a row that took d times 1, 2 or 4 to read, and ranked by torch.
BLOCK_ROWS = 128
MOST_KEPT = BLOCK_ROWS
# Programs of a launch that ranks: several waves on any card, long enough chunks that most blocks hold no better row
# (they are not sorted), and few candidates to merge. On an H200, 792 took 0.86 to 0.98 of 2,048's time.
RANKING_PROGRAMS = 792
# Scores that are there at a time where torch ranks them; their ranks take twice the memory.
PIECE_SCORES = 1 << 25
# A row's index is the low half of its rank, the lower one the larger.
MOST_ROWS = 2**32 - 1

SHORT_FOLD = FOLD // 2  # of TF32

NOTHING = tl.constexpr(-(2**63))  # behind the rank of every row
NAN_SCORE = tl.constexpr(-(2**31))  # behind the high half of −inf's


@dataclass(frozen=True)
class Tile:
    """BLOCK_ROWS rows against ``queries`` queries, from ``d`` columns at a time."""

    queries: int
    d: int
    warps: int
    stages: int


# The first that holds all queries, else several passes of the last; the later ones find a block's rows in L2. One query
# is multiplied lane by lane, at the speed of the memory: several steps in flight, at most 128 registers, so that one
# program reads while another sorts. More are matrix products, float32's on the ordinary units with a register per
# operand: short steps. One query's half-precision tiles were the fastest of eight on an H200 (d = 512 in float16; for
# short rows, d = 64 in float16 and 512 in int8); the others are chosen by registers and shared memory (make
# compile-table), not by a clock yet.
HALF_TILES = (Tile(1, 64, 4, 4), Tile(16, 32, 8, 4), Tile(32, 32, 8, 4))
SHORT_ROW, SHORT_ROW_TILE = 512, Tile(1, 32, 4, 6)  # up to so many bytes
FLOAT_TILES = (Tile(1, 32, 8, 4), Tile(16, 16, 8, 3))
SHORT_STEP = 32  # columns at a time, of one query, where they are masked


@triton.jit
def _ranks(score, row, inside):
    """int64 that compare as rows rank: by score, NaN last, then by index, the lower first; NOTHING where not inside."""
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)  # -0 ties with 0
    high = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    high = tl.where(score == score, high, NAN_SCORE)
    return tl.where(inside, (high.to(tl.int64) << 32) | (0xFFFFFFFF - row), NOTHING)


@triton.jit
def _keep(best, last, ranks, k):
    """The best of ``best``, which falls along a row, and ``ranks``, in any order; and the k-th of each row."""
    if tl.max(tl.max((ranks > last[:, None]).to(tl.int32), 1), 0) > 0:
        # Of a falling and a rising sequence the larger of each pair are the upper half of both, and bitonic.
        best = tl.bitonic_merge(tl.maximum(best, tl.sort(ranks, 1)), 1, descending=True)
        place = tl.arange(0, best.shape[1])
        last = tl.max(tl.where(place[None, :] == k - 1, best, NOTHING), 1)
    return best, last


@triton.jit
def _quarters(x):
    """Columns 4i, 4i + 1, 4i + 2 and 4i + 3 of x (…, D), each (…, D / 4). A thread's 16 bytes hold all four."""
    even, odd = tl.split(tl.reshape(x, x.shape[:-1] + [x.shape[-1] // 4, 2, 2]))  # noqa: RUF005 (Triton has no unpacking)
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _add_products(total, x_row, query, d0, d_size, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr):
    """total (BLOCK_N, BLOCK_D / 4) + the products of four neighbours each, one after the other: a quarter of the sums
    that a program would hold otherwise, and two steps less when they are added up."""
    d = d0 + tl.arange(0, BLOCK_D)
    if EVEN_D:
        x = tl.load(x_row[:, None] + d[None, :])
        q = tl.load(query + d)
    else:
        x = tl.load(x_row[:, None] + d[None, :], mask=(d < d_size)[None, :], other=0)
        q = tl.load(query + d, mask=d < d_size, other=0.0)
    x0, x1, x2, x3 = _quarters(x)
    q0, q1, q2, q3 = _quarters(q)
    total += x0.to(tl.float32) * q0[None, :]
    total += x1.to(tl.float32) * q1[None, :]
    total += x2.to(tl.float32) * q2[None, :]
    total += x3.to(tl.float32) * q3[None, :]
    return total


@triton.jit
def _dot(
    x_row,
    query,
    d_size,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LOG_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    STAGES: tl.constexpr,
    WHOLE: tl.constexpr,  # d_size ≤ BLOCK_D
):
    """(BLOCK_N,) inner products of the rows at ``x_row`` with one query, in an order of additions no layout changes."""
    total = tl.zeros((BLOCK_N, BLOCK_D // 4), tl.float32)
    if WHOLE:  # no loop: the caller's is the one whose loads run ahead
        total = _add_products(total, x_row, query, 0, d_size, BLOCK_D, EVEN_D)
    else:
        for d0 in tl.range(0, d_size, BLOCK_D, num_stages=STAGES):  # named here: else only loads of a tl.dot run ahead
            total = _add_products(total, x_row, query, d0, d_size, BLOCK_D, EVEN_D)
    # tl.sum's order follows from where the compiler puts the columns, and so from the rows' alignment.
    for halving in tl.static_range(LOG_D - 2):
        left, right = tl.split(tl.reshape(total, (BLOCK_N, BLOCK_D >> (halving + 3), 2)))
        total = left + right
    return tl.reshape(total, (BLOCK_N,))


@triton.jit
def _products(
    x_row,
    group,  # of BLOCK_M queries
    queries,
    queries_size,
    d_size,
    scale,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    SPLIT: tl.constexpr,
    FOLD: tl.constexpr,  # of the first terms: the second are small
):
    """(BLOCK_N, BLOCK_M) inner products of the rows at ``x_row`` with several queries, times the rows' scales."""
    # A query past the last is the last again: of a maximum it takes nothing away.
    query = tl.minimum(group * BLOCK_M + tl.arange(0, BLOCK_M), queries_size - 1)
    query = queries + query.to(tl.int64) * d_size
    low_query = query + queries_size.to(tl.int64) * d_size
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    part = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    rest = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for d0 in range(0, d_size, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        if EVEN_D:
            x = tl.load(x_row[:, None] + d[None, :]).to(tl.float32)
            q = tl.load(query[None, :] + d[:, None])
        else:
            x = tl.load(x_row[:, None] + d[None, :], mask=(d < d_size)[None, :], other=0).to(tl.float32)
            q = tl.load(query[None, :] + d[:, None], mask=(d < d_size)[:, None], other=0.0)
        if SPLIT:
            if EVEN_D:
                low = tl.load(low_query[None, :] + d[:, None])
            else:
                low = tl.load(low_query[None, :] + d[:, None], mask=(d < d_size)[:, None], other=0.0)
            part = tl.dot(x, q, part, input_precision="tf32")
            rest = tl.dot(x, low, rest, input_precision="tf32")
            total, part = fold(total, part, d0 + BLOCK_D, FOLD)
        else:
            total = tl.dot(x, q, total, input_precision="ieee")
    if SPLIT:
        total = unfolded(total, part, FOLD)
        # Of an infinite product the second term may have another sign, or be NaN.
        total = tl.where(tl.abs(total) < float("inf"), total + rest, total)
    return total if scale is None else total * scale[:, None]


# Not specialised: what changes from corpus to corpus and helps no load.
@triton.jit(do_not_specialize=["rows", "queries_size", "passes", "blocks", "k"])
def _scan(
    features,  # (rows, d_size), last stride 1
    scales,  # (rows,) float32 or None
    queries,  # (terms, queries_size, d_size) float32, dense
    out,  # scores (columns, rows) float32, or ranks (columns, chunks, k) int64
    rows,
    d_size,
    queries_size,
    stride,
    passes,  # of BLOCK_M queries
    blocks,  # of a chunk
    k,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LOG_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    STAGES: tl.constexpr,
    WHOLE: tl.constexpr,  # one query, and rows of a single step: blocks run ahead of each other
    SPLIT: tl.constexpr,  # queries in two terms of TF32, which the features are as they lie
    FOLD: tl.constexpr,
    MAXIMUM: tl.constexpr,  # over all queries; a program makes every pass. Else one, and neighbours share the rows
    RANK: tl.constexpr,
):
    COLUMNS: tl.constexpr = 1 if MAXIMUM else BLOCK_M
    groups = 1 if MAXIMUM else passes  # programs of a chunk
    chunk, group_of_program = tl.program_id(0) // groups, tl.program_id(0) % groups
    column = group_of_program * COLUMNS + tl.arange(0, COLUMNS)
    column_inside = column < (1 if MAXIMUM else queries_size)
    if RANK:
        best = tl.full((COLUMNS, BLOCK_N), NOTHING, tl.int64)
        last = tl.full((COLUMNS,), NOTHING, tl.int64)

    for block in tl.range(0, blocks, num_stages=STAGES if WHOLE else 1):
        row = (chunk.to(tl.int64) * blocks + block) * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = row < rows
        # Rows past the end read the last one and are dropped below: no masks in the loop over d.
        at = tl.minimum(row, rows - 1)
        x_row = features + at * stride
        scale = None if scales is None else tl.load(scales + at)
        if BLOCK_M == 1:
            score = _dot(x_row, queries, d_size, BLOCK_N, BLOCK_D, LOG_D, EVEN_D, STAGES, WHOLE)
            score = (score if scale is None else score * scale)[None, :]
        elif MAXIMUM:
            largest = tl.full((BLOCK_N,), float("-inf"), tl.float32)
            nans = tl.zeros((BLOCK_N,), tl.int32)
            for group in range(passes):
                product = _products(
                    x_row, group, queries, queries_size, d_size, scale, BLOCK_N, BLOCK_M, BLOCK_D, EVEN_D, SPLIT, FOLD
                )
                nan = product != product  # tl.max drops it
                largest = tl.maximum(largest, tl.max(tl.where(nan, float("-inf"), product), 1))
                nans = tl.maximum(nans, tl.max(nan.to(tl.int32), 1))
            score = tl.where(nans > 0, float("nan"), largest)[None, :]
        else:
            product = _products(
                x_row,
                group_of_program,
                queries,
                queries_size,
                d_size,
                scale,
                BLOCK_N,
                BLOCK_M,
                BLOCK_D,
                EVEN_D,
                SPLIT,
                FOLD,
            )
            score = tl.trans(product)
        kept = column_inside[:, None] & inside[None, :]
        if RANK:
            best, last = _keep(best, last, _ranks(score, row[None, :], kept), k)
        else:
            tl.store(out + column.to(tl.int64)[:, None] * rows + row[None, :], score, mask=kept)

    if RANK:
        place = tl.arange(0, BLOCK_N)
        chunks = tl.num_programs(0) // groups
        out_ptr = out + (column.to(tl.int64) * chunks + chunk)[:, None] * k + place[None, :]
        tl.store(out_ptr, best, mask=column_inside[:, None] & (place < k)[None, :])


def scan_scores(features: Tensor, scales: Tensor | None, queries: Tensor, maximum: bool) -> Tensor:
    """(N, d), (N,), (M, d) float32 -> (M, N) float32, or (1, N) with ``maximum``; checked by ops.scan_scores, N > 0."""
    launch, scores = plan(features, scales, queries, maximum)
    launch.run(features)
    return scores


def topk_scan(features: Tensor, scales: Tensor | None, queries: Tensor, k: int, maximum: bool) -> tuple[Tensor, Tensor]:
    """The same -> values float32 and indices int64, (M, k), or (1, k) with ``maximum``; 0 < k ≤ N."""
    n = len(features)
    if n > MOST_ROWS:
        raise ValueError(
            f"features: expected at most {MOST_ROWS} rows in one scan on a GPU, got {n}; scan them in parts"
        )
    features = unit_stride(features)
    if k <= MOST_KEPT:
        launch, ranks = plan(features, scales, queries, maximum, k)
        launch.run(features)
        return rows_of(ranks.flatten(1).topk(k).values)
    columns = 1 if maximum else len(queries)
    piece = max(1, PIECE_SCORES // columns)
    best = torch.empty(columns, 0, dtype=torch.int64, device=features.device)
    for start in range(0, n, piece):
        some = slice(start, start + piece)
        scores = scan_scores(features[some], None if scales is None else scales[some], queries, maximum)
        best = torch.cat([best, ranks_of(scores, start)], 1)
        best = best.topk(min(k, best.shape[1])).values
    return rows_of(best)


def plan(
    features: Tensor, scales: Tensor | None, queries: Tensor, maximum: bool, k: int = 0, cc: int | None = None
) -> tuple[Launch, Tensor]:
    """The launch and what it fills: scores (columns, N), or with ``k`` ranks (columns, chunks, k). Meta tensors do.

    ``cc``: the GPU's generation, where it is not the features'.
    """
    features, (n, d), m = unit_stride(features), features.shape, len(queries)
    maximum = maximum or m == 1
    split = m > 1 and features.dtype != torch.float32
    tile = tile_for(m, features.dtype, d)
    block_d = min(tile.d, max(16, triton.next_power_of_2(d)))
    if m == 1 and d > block_d and d % block_d:  # masked: twice the registers
        block_d = min(block_d, SHORT_STEP)
    passes, blocks = ceil_div(m, tile.queries), ceil_div(n, BLOCK_ROWS)
    programs = 1 if maximum else passes  # of a chunk
    chunk = ceil_div(blocks, max(1, RANKING_PROGRAMS // programs)) if k else 1
    chunks, columns = ceil_div(blocks, chunk), 1 if maximum else m
    if k:
        out = features.new_empty((columns, chunks, k), dtype=torch.int64)
    else:
        out = features.new_empty((columns, n), dtype=torch.float32)
    arguments = {
        "features": features,
        "scales": scales,
        "queries": terms(queries) if split else queries[None],
        "out": out,
        "rows": n,
        "d_size": d,
        "queries_size": m,
        "stride": features.stride(0),
        "passes": passes,
        "blocks": chunk,
        "k": k,
        "BLOCK_N": BLOCK_ROWS,
        "BLOCK_M": tile.queries,
        "BLOCK_D": block_d,
        "LOG_D": block_d.bit_length() - 1,
        "EVEN_D": d % block_d == 0,
        "STAGES": tile.stages,
        "WHOLE": m == 1 and d <= block_d,
        "SPLIT": split,
        "FOLD": SHORT_FOLD if split and folds(cc or generation(features), d % block_d == 0) else 0,
        "MAXIMUM": maximum,
        "RANK": k > 0,
    }
    return Launch(_scan, (chunks * programs,), arguments, tile.warps, tile.stages), out


def folds(generation: int, even: bool) -> bool:
    """Not on Ampere where columns are masked, too: no registers."""
    return generation > 8 or even


def tile_for(queries: int, dtype: torch.dtype, d: int) -> Tile:
    tiles = FLOAT_TILES if dtype == torch.float32 else HALF_TILES
    if queries == 1 and tiles is HALF_TILES and d * dtype.itemsize <= SHORT_ROW:
        return SHORT_ROW_TILE
    return next((tile for tile in tiles if tile.queries >= queries), tiles[-1])


def terms(queries: Tensor) -> Tensor:
    """Two terms of TF32's 11 bits, (2, M, d) float32, that add up to ``queries`` within 2⁻²² of each number.

    float16, bfloat16 and int8 features are TF32 as they are: such products are as good as float32's, on tensor cores.
    """
    bits = queries.view(torch.int32)
    high = (bits & ~0x1FFF).view(torch.float32)  # towards zero: what is finite stays so
    high = torch.where(queries.isnan(), torch.nan, high)  # of any payload
    low = torch.where(queries.isfinite(), queries - high, 0.0)
    low = ((low.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)  # to the nearest
    return torch.stack([high, low])


def ranks_of(scores: Tensor, start: int) -> Tensor:
    """``_ranks`` of (columns, rows) scores whose first row is ``start``."""
    bits = torch.where(scores == 0, 0.0, scores).view(torch.int32)
    high = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).masked_fill(scores.isnan(), NAN_SCORE.value)
    row = torch.arange(start, start + scores.shape[1], device=scores.device)
    return (high.long() << 32) | (MOST_ROWS - row)


def rows_of(ranks: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and row indices."""
    high = (ranks >> 32).int()
    values = torch.where(high < 0, high ^ 0x7FFFFFFF, high).view(torch.float32)  # NAN_SCORE becomes a NaN
    return values, MOST_ROWS - (ranks & MOST_ROWS)
