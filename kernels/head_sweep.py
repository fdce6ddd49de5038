"""The output layer's first sweep: one model's logits in tiles that are never stored, reduced as they are made.

A program takes a block of rows through one slice of the vocabulary. What it keeps per row is the state of a softmax
over the columns other than the label's: m = max z, d = Σ e^(z−m), s = Σ (z−m)e^(z−m), q = Σ e^(2(z−m)) and Σ e^(z−m)
times whatever else is wanted. The label's own logit is kept beside it, so that 1 − p_y is a sum and never a
difference. `merge` puts the slices together in their order, and the label last.
"""

from __future__ import annotations

import triton
import triton.language as tl

from assay.kernels.philox import signs

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # an empty maximum: unlike −inf, it can be subtracted from itself
FLOOR = tl.constexpr(-200.0)  # e^FLOOR is 0 in float32; x·e^x with x no lower is never −inf · 0

# Words of a slice's state, (slices, STATE, rows). The maximum's index is an int32 and lies beside them.
MAX, SUM, MOMENT, SQUARES, DOT = (tl.constexpr(i) for i in range(5))
STATE = tl.constexpr(5)

# What is known of a model once its slices are merged, (models, MODEL, rows). Maximum and log-sum stay two words:
# under a large common offset their sum has no digits left for the log-sum. NaN where the row is not defined.
TOP, LOG_SUM, LOG_PY, NOT_Y, MARGIN, ERROR2, ENTROPY, CONFIDENCE = (tl.constexpr(i) for i in range(8))
MODEL = tl.constexpr(8)


@triton.jit
def place(rows, slices, BLOCK_M: tl.constexpr, GROUP_M: tl.constexpr):
    """Row block and slice of this program. Those that run together are few row blocks and all slices: their hidden
    states stay in L2, and a weight tile is read from memory once for GROUP_M row blocks."""
    pid = tl.program_id(0)
    group = pid // (GROUP_M * slices)
    size = tl.minimum(tl.cdiv(rows, BLOCK_M) - group * GROUP_M, GROUP_M)
    within = pid % (GROUP_M * slices)
    return group * GROUP_M + within % size, within // size


@triton.jit
def product(
    x_row,  # (M,) addresses of the rows of x, ...
    w_row,  # ... (N,) of w ...
    v_row,  # ... and of v, if there is one
    size,
    M: tl.constexpr,
    N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    WIDEN: tl.constexpr,  # multiply in float32: mixed types, and the interpreter, whose bfloat16 arithmetic is wrong
):
    """x wᵀ and x vᵀ, (M, N) float32, from one trip through x. Rows have unit stride."""
    z = tl.zeros((M, N), tl.float32)
    u = tl.zeros((M, N), tl.float32)
    for d0 in range(0, size, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        # Both sides are masked: what lies beyond a row's end may be NaN, and 0 · NaN is not 0.
        if EVEN_D:
            x = tl.load(x_row[:, None] + d[None, :])
            w = tl.load(w_row[:, None] + d[None, :])
        else:
            x = tl.load(x_row[:, None] + d[None, :], mask=(d < size)[None, :], other=0.0)
            w = tl.load(w_row[:, None] + d[None, :], mask=(d < size)[None, :], other=0.0)
        if WIDEN:
            x = x.to(tl.float32)
            w = w.to(tl.float32)
        z = tl.dot(x, tl.trans(w), z, input_precision="ieee")
        if v_row is not None:
            if EVEN_D:
                v = tl.load(v_row[:, None] + d[None, :])
            else:
                v = tl.load(v_row[:, None] + d[None, :], mask=(d < size)[None, :], other=0.0)
            if WIDEN:
                v = v.to(tl.float32)
            u = tl.dot(x, tl.trans(v), u, input_precision="ieee")
    return z, u


@triton.jit
def product_of_blocks(
    x_blocks,  # descriptors of blocks (M, BLOCK_D) of x, ...
    w_blocks,  # ... (N, BLOCK_D) of w ...
    v_blocks,  # ... and of v, if there is one ...
    y_blocks,  # ... with another factor than x: as those of x
    row,
    column,
    size,
    M: tl.constexpr,
    N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """``product`` of the blocks from a row of x and y and a row of w and v on. What lies outside of them is 0."""
    tl.assume(size > 0)
    z = tl.zeros((M, N), tl.float32)
    u = tl.zeros((M, N), tl.float32)
    for d in range(0, size, BLOCK_D):
        x = x_blocks.load([row, d])
        w = w_blocks.load([column, d])
        if WIDEN:
            x = x.to(tl.float32)
            w = w.to(tl.float32)
        z = tl.dot(x, tl.trans(w), z, input_precision="ieee")
        if v_blocks is not None:
            v = v_blocks.load([column, d])
            if WIDEN:
                v = v.to(tl.float32)
            if y_blocks is not None:
                x = y_blocks.load([row, d])
                if WIDEN:
                    x = x.to(tl.float32)
            u = tl.dot(x, tl.trans(v), u, input_precision="ieee")
    return z, u


# A tile's columns in three parts, (N / 8, 4, 2): as matrix units leave them, a thread holds two neighbours in every
# eight. What is reduced along the first and the last needs no other thread, and a column's number is the sum of a
# constant and of little that differs from thread to thread: no register per column.


@triton.jit
def folded(x, M: tl.constexpr, N: tl.constexpr):
    return tl.reshape(x, (M, N // 8, 4, 2))


# In which order, decides whether every thread that holds a row's sum holds the same bits. Between threads it goes by
# butterflies, a + b in one and b + a in the other; but where an addend is a product, and the addition with it one fused
# multiply-add, that is ab + r(cd) in one and cd + r(ab) in the other, r for rounded. So the first sums must be each
# thread's own. Ampere's and Hopper's matrix units leave a row in four threads, the last axis but for one in each: the
# first axis goes first, a multiply-add for each number. Elsewhere a thread holds neighbours, and of the first axis
# perhaps one number: Blackwell's units leave it whole eighths, ordinary ones (WIDEN) a few columns. There the last axis
# goes first. tests/kernels/butterfly.py looks for the others.


@triton.jit
def total(x, LAST_FIRST: tl.constexpr):
    """(M,): the sum over a folded tile's columns."""
    return tl.sum(tl.sum(tl.sum(x, 3), 2), 1) if LAST_FIRST else tl.sum(tl.sum(tl.sum(x, 1), 2), 1)


@triton.jit
def highest(x, LAST_FIRST: tl.constexpr):
    """(M,): the maximum, in the order of ``total``'s sums."""
    return tl.max(tl.max(tl.max(x, 3), 2), 1) if LAST_FIRST else tl.max(tl.max(tl.max(x, 1), 2), 1)


@triton.jit
def is_column(c, N: tl.constexpr):
    """(M, N/8, 4, 2) from (M,): which column is c."""
    c = c[:, None, None, None]
    eighth = 8 * tl.arange(0, N // 8)[None, :, None, None]
    within = 2 * tl.arange(0, 4)[None, None, :, None] + tl.arange(0, 2)[None, None, None, :]
    return ((c & -8) == eighth) & ((c & 7) == within)


@triton.jit
def parts_with_labels(y, begin, size, M: tl.constexpr):
    """Bit i is set where one of the labels, −1 for none, lies in the slice's i-th part of ``size`` columns."""
    bit = tl.full((M,), 1, tl.int32) << ((tl.maximum(y, begin) - begin) // size)
    return tl.reduce_or(tl.where(y >= 0, bit, 0), 0)


@triton.jit
def below(count, N: tl.constexpr):
    """(1, N/8, 4, 2): the first ``count`` columns."""
    eighth = 8 * tl.arange(0, N // 8)[None, :, None, None]
    within = 2 * tl.arange(0, 4)[None, None, :, None] + tl.arange(0, 2)[None, None, None, :]
    return eighth < count - within


@triton.jit
def better(high, index, M: tl.constexpr, PAIRS: tl.constexpr):
    """(M, PAIRS, 4) from twice as many: of two neighbours the higher, of equals the first."""
    a, b = tl.split(tl.permute(tl.reshape(high, (M, PAIRS, 2, 4)), (0, 1, 3, 2)))
    i, j = tl.split(tl.permute(tl.reshape(index, (M, PAIRS, 2, 4)), (0, 1, 3, 2)))
    return tl.maximum(a, b), tl.where(b > a, j, i)


@triton.jit
def best_of(x, M: tl.constexpr, N: tl.constexpr):
    """(M, 4) and (M, 4): the highest among a quarter's columns of x (M, N/8, 4, 2), and its lowest index but for what
    the quarter adds. A match play: each costs a comparison and a choice, and nothing is compared with all again."""
    a, b = tl.split(x)
    first = tl.zeros((M, N // 8, 4), tl.int32) + 8 * tl.arange(0, N // 8)[None, :, None]
    index = tl.where(b > a, first + 1, first)
    high = tl.maximum(a, b)
    if N >= 16:
        high, index = better(high, index, M, N // 16)
    if N >= 32:
        high, index = better(high, index, M, N // 32)
    if N >= 64:
        high, index = better(high, index, M, N // 64)
    if N >= 128:
        high, index = better(high, index, M, N // 128)
    tl.static_assert(N <= 128)
    return tl.reshape(high, (M, 4)), tl.reshape(index, (M, 4))


@triton.jit
def highest_and_index(z, M: tl.constexpr, N: tl.constexpr):
    """(M,) and (M,): the maximum of z (M, N/8, 4, 2) and the lowest column that has it."""
    # One half after the other: never are there more candidates than half of one in registers.
    left, right = tl.split(tl.permute(tl.reshape(z, (M, 2, N // 16, 4, 2)), (0, 2, 3, 4, 1)))
    high, index = best_of(left, M, N // 2)
    other, other_index = best_of(right, M, N // 2)
    index = tl.where(other > high, other_index + N // 2, index) + 2 * tl.arange(0, 4)[None, :]
    high = tl.maximum(high, other)
    peak = tl.max(high, 1)
    return peak, tl.min(tl.where(high == peak[:, None], index, N), 1)


@triton.jit
def tile_bias(bias, c0, classes, N: tl.constexpr):
    """(1, N/8, 4, 2) float32: the bias of a tile's columns, 0 past the end."""
    c = c0 + tl.arange(0, N)
    b = tl.load(bias + c, mask=c < classes, other=0.0) if c0 + N > classes else tl.load(bias + c)
    return folded(b, 1, N).to(tl.float32)


@triton.jit
def shift(bias, c, classes):
    """What to add to columns ``c`` of the logits: the bias, and −inf past the end, where nothing may count.

    A column past the end is a copy of the last one, so where it is NaN or +inf, the row is not defined anyway.
    """
    inside = c < classes
    if bias is None:
        added = tl.where(inside, 0.0, float("-inf"))
    else:
        added = tl.load(bias + c, mask=inside, other=float("-inf")).to(tl.float32)
    return added


# Two numbers a, b: high = bfloat16 of each, low = bfloat16 of what that leaves. Left to itself the compiler converts
# the first ones singly, at a quarter of the rate.
TWO_WORDS = tl.constexpr("""{
    .reg .b32 high_a, high_b;
    .reg .f32 rest_a, rest_b;
    cvt.rn.bf16x2.f32 $0, $3, $2;
    shl.b32 high_a, $0, 16;
    and.b32 high_b, $0, 0xffff0000;
    sub.rn.f32 rest_a, $2, high_a;
    sub.rn.f32 rest_b, $3, high_b;
    cvt.rn.bf16x2.f32 $1, rest_b, rest_a;
}""")


@triton.jit
def two_words(e):
    return tl.inline_asm_elementwise(TWO_WORDS, "=&r,=r,r,r", [e], (tl.bfloat16, tl.bfloat16), is_pure=True, pack=2)


@triton.jit
def times_signs(sketch, e, sign, WIDEN: tl.constexpr):
    """sketch + e·sign, (M, R). Two bfloat16 words hold 17 bits of e; its signs they hold exactly."""
    if WIDEN:
        sketch = tl.dot(e, sign, sketch, input_precision="ieee")
    else:
        high, low = two_words(e)
        sketch = tl.dot(high, sign.to(tl.bfloat16), sketch)
        sketch = tl.dot(low, sign.to(tl.bfloat16), sketch)
    return sketch


# Not specialised: what changes from batch to batch and helps no load.
@triton.jit(do_not_specialize=["rows", "tiles", "slices", "ignore_index"])
def sweep(
    hidden,  # (rows, size), or a descriptor of it in blocks (BLOCK_M, BLOCK_D)
    weight,  # (classes, size), or its descriptor in blocks (BLOCK_N, BLOCK_D)
    bias,  # (classes,) or None
    direction,  # as the weight; or None
    labels,  # (rows,) int64 or None
    state,  # (slices, STATE, rows) float32
    top,  # (slices, rows) int32, the maximum's lowest index
    at_label,  # (2, rows) float32: the label's logit and its dot with the direction
    words,  # (.., classes) int32, the sketch's signs, or None
    sketch,  # (slices, rows, SKETCH) float32 or None: Σ e^(z−m) times the signs
    rows,
    classes,
    size,
    hidden_row,
    weight_row,
    direction_row,
    tiles,  # per slice
    slices,
    ignore_index,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_M: tl.constexpr,
    SKETCH: tl.constexpr,  # the sketch's rows, padded to what tl.dot takes
    WANT_MOMENT: tl.constexpr,
    WANT_TOP: tl.constexpr,
    WANT_SQUARES: tl.constexpr,
    EVEN_D: tl.constexpr,
    WIDEN: tl.constexpr,
    LAST_FIRST: tl.constexpr,  # the order of a tile's sums
    DESCRIBED: tl.constexpr,  # by tensor descriptors
):
    block, part = place(rows, slices, BLOCK_M, GROUP_M)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = tl.minimum(row, rows - 1).to(
        tl.int64
    )  # rows and columns past the end read the last one again: no masks in the loop
    begin = part * tiles * BLOCK_N
    end = tl.minimum(begin + tiles * BLOCK_N, classes)
    if labels is not None:
        y = tl.load(labels + inside)
        if tl.max((y != ignore_index).to(tl.int32), 0) == 0:
            return  # nothing is predicted here: merge reads none of it
        y = tl.where((row < rows) & (y >= begin) & (y < end), y, -1).to(tl.int32)  # −1: in another slice, or in none
        part_32 = tl.cdiv(tiles, 32) * BLOCK_N
        labelled = parts_with_labels(y, begin, part_32, BLOCK_M)

    m = tl.full((BLOCK_M,), LOWEST, tl.float32)
    d = tl.zeros((BLOCK_M,), tl.float32)
    s = tl.zeros((BLOCK_M,), tl.float32)
    q = tl.zeros((BLOCK_M,), tl.float32)
    t = tl.zeros((BLOCK_M,), tl.float32)
    best = tl.zeros((BLOCK_M,), tl.int32)
    z_y = tl.zeros((BLOCK_M,), tl.float32)
    u_y = tl.zeros((BLOCK_M,), tl.float32)
    if sketch is not None:
        sketched = tl.zeros((BLOCK_M, SKETCH), tl.float32)

    for c0 in range(begin, end, BLOCK_N):
        if DESCRIBED:
            z, u = product_of_blocks(
                hidden, weight, direction, None, block * BLOCK_M, c0, size, BLOCK_M, BLOCK_N, BLOCK_D, WIDEN
            )
        else:
            column = tl.minimum(c0 + tl.arange(0, BLOCK_N), classes - 1).to(tl.int64)
            v_row = direction + column * direction_row if direction is not None else None
            x_row, w_row = hidden + inside * hidden_row, weight + column * weight_row
            z, u = product(x_row, w_row, v_row, size, BLOCK_M, BLOCK_N, BLOCK_D, EVEN_D, WIDEN)
        z = folded(z, BLOCK_M, BLOCK_N)
        u = folded(u, BLOCK_M, BLOCK_N)
        if bias is not None:
            z += tile_bias(bias, c0, classes, BLOCK_N)
        if c0 + BLOCK_N > classes:  # nothing past the end may count
            z = tl.where(below(classes - c0, BLOCK_N), z, float("-inf"))
        if labels is not None:  # noqa: SIM102
            if ((labelled >> ((c0 - begin) // part_32)) & 1) != 0:
                is_y = is_column(y - c0, BLOCK_N)  # never a padded column: y < end ≤ classes
                z_y += total(tl.where(is_y, z, 0.0), LAST_FIRST)
                if direction is not None:
                    u_y += total(tl.where(is_y, u, 0.0), LAST_FIRST)
                z = tl.where(is_y, float("-inf"), z)

        if WANT_TOP:
            peak, first = highest_and_index(z, BLOCK_M, BLOCK_N)
            best = tl.where(peak > m, c0 + first, best)
        else:
            peak = highest(z, LAST_FIRST)
        m_new = tl.maximum(m, peak)
        gap = tl.maximum(m - m_new, FLOOR)
        r = tl.exp2(gap * LOG2E)
        x = z - m_new[:, None, None, None]
        e = tl.exp2(x * LOG2E)  # NaN from a NaN or +inf logit: d carries it on, where max would drop it
        if WANT_MOMENT:
            s = r * (s + gap * d) + total(tl.maximum(x, FLOOR) * e, LAST_FIRST)
        d = d * r + total(e, LAST_FIRST)
        if WANT_SQUARES:
            q = q * (r * r) + total(e * e, LAST_FIRST)
        if direction is not None:
            t = t * r + total(e * u, LAST_FIRST)
        if sketch is not None:
            sign = signs(words, classes, tl.minimum(c0 + tl.arange(0, BLOCK_N), classes - 1), SKETCH)
            sketched = times_signs(sketched * r[:, None], tl.reshape(e, (BLOCK_M, BLOCK_N)), sign, WIDEN)
        m = m_new

    mask = row < rows
    out = state + part.to(tl.int64) * STATE * rows + row
    tl.store(out + MAX * rows.to(tl.int64), m, mask=mask)
    tl.store(out + SUM * rows.to(tl.int64), d, mask=mask)
    if WANT_MOMENT:
        tl.store(out + MOMENT * rows.to(tl.int64), s, mask=mask)
    if WANT_SQUARES:
        tl.store(out + SQUARES * rows.to(tl.int64), q, mask=mask)
    if WANT_TOP:
        tl.store(top + part.to(tl.int64) * rows + row, best, mask=mask)
    if labels is not None:
        tl.store(at_label + row, z_y, mask=y >= 0)
        if direction is not None:
            tl.store(at_label + rows + row, u_y, mask=y >= 0)
    if direction is not None:
        tl.store(out + DOT * rows.to(tl.int64), t, mask=mask)
    if sketch is not None:
        cell = (part.to(tl.int64) * rows + row)[:, None] * SKETCH + tl.arange(0, SKETCH)[None, :]
        tl.store(sketch + cell, sketched, mask=mask[:, None])


@triton.jit
def is_class(y, classes):
    """A label that is none may come unchecked out of a CUDA graph: its row is undefined, and nothing is read there."""
    return (y >= 0) & (y < classes)


@triton.jit(do_not_specialize=["rows", "classes", "slices", "ignore_index"])
def merge(
    state,
    top,
    at_label,
    labels,
    model,  # (MODEL, rows) float32
    vote,  # (rows,) int32: the lowest index of the largest logit, −1 where the row is not defined
    dot,  # (rows,) float32 or None
    sqnorm,  # (rows,) float32 or None
    rows,
    classes,
    slices,
    ignore_index,
    BLOCK: tl.constexpr,
    WANT_MOMENT: tl.constexpr,
    WANT_TOP: tl.constexpr,
    WANT_SQUARES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = row < rows
    stride = rows.to(tl.int64)
    known = mask
    if labels is not None:
        y = tl.load(labels + row, mask=mask, other=ignore_index)
        known = mask & (y != ignore_index)

    m = tl.full((BLOCK,), LOWEST, tl.float32)
    best = tl.zeros((BLOCK,), tl.int32)
    for part in range(slices):
        peak = tl.load(state + (part * STATE + MAX) * stride + row, mask=known, other=0.0)
        if WANT_TOP:
            best = tl.where(peak > m, tl.load(top + part * stride + row, mask=known, other=0), best)
        m = tl.maximum(m, peak)
    others = m
    if labels is not None:
        labelled = known & is_class(y, classes)
        z_y = tl.load(at_label + row, mask=labelled, other=float("nan"))
        if WANT_TOP:
            is_best = (z_y > m) | ((z_y == m) & (y < best))
            best = tl.where(is_best, y.to(tl.int32), best)
        m = tl.maximum(m, z_y)

    d = tl.zeros((BLOCK,), tl.float32)
    s = tl.zeros((BLOCK,), tl.float32)
    q = tl.zeros((BLOCK,), tl.float32)
    t = tl.zeros((BLOCK,), tl.float32)
    for part in range(slices):
        word = state + part * STATE * stride + row
        gap = tl.maximum(tl.load(word + MAX * stride, mask=known, other=0.0) - m, FLOOR)
        r = tl.exp2(gap * LOG2E)
        d_part = tl.load(word + SUM * stride, mask=known, other=0.0)
        if WANT_MOMENT:
            s += r * (tl.load(word + MOMENT * stride, mask=known, other=0.0) + gap * d_part)
        d += r * d_part
        if WANT_SQUARES:
            q += r * r * tl.load(word + SQUARES * stride, mask=known, other=0.0)
        if dot is not None:
            t += r * tl.load(word + DOT * stride, mask=known, other=0.0)
    total = d
    if labels is not None:
        x_y = z_y - m
        e_y = tl.exp2(x_y * LOG2E)
        total += e_y
        s += tl.maximum(x_y, FLOOR) * e_y

    defined = known & (total > 0.0)  # not where the sum is NaN, nor where every logit is −inf
    nan = float("nan")
    log_sum = tl.where(defined, tl.log(total), nan)
    inverse = tl.where(defined, 1.0 / total, nan)
    out = model + row
    tl.store(out + TOP * stride, m, mask=mask)
    tl.store(out + LOG_SUM * stride, log_sum, mask=mask)
    tl.store(out + CONFIDENCE * stride, inverse, mask=mask)
    if WANT_MOMENT:
        tl.store(out + ENTROPY * stride, log_sum - s * inverse, mask=mask)
    if WANT_TOP:
        tl.store(vote + row, tl.where(defined, best, -1), mask=mask)
    if labels is not None:
        not_y = d * inverse
        tl.store(out + LOG_PY * stride, x_y - log_sum, mask=mask)
        tl.store(out + NOT_Y * stride, not_y, mask=mask)
        other = tl.exp2(tl.maximum(others - m, FLOOR) * LOG2E)
        tl.store(out + MARGIN * stride, (e_y - other) * inverse, mask=mask)
        if WANT_SQUARES:
            error2 = not_y * not_y + q * inverse * inverse
            tl.store(out + ERROR2 * stride, error2, mask=mask)
            if sqnorm is not None:
                tl.store(sqnorm + row, tl.where(known, error2, 0.0), mask=mask)
        if dot is not None:
            u_y = tl.load(at_label + stride + row, mask=labelled, other=0.0)
            # Σ_{c≠y} p_c u_c − (1 − p_y) u_y
            tl.store(dot + row, tl.where(known, t * inverse - not_y * u_y, 0.0), mask=mask)


@triton.jit(do_not_specialize=["rows", "classes", "slices", "ignore_index", "sketch_rows"])
def merge_sketch(
    state,
    words,
    sketch,
    model,
    labels,
    left,  # (rows, ...) float32, this block's first column
    rows,
    classes,
    left_row,
    slices,
    ignore_index,
    sketch_rows,  # of this block
    scale,
    BLOCK: tl.constexpr,
    SKETCH: tl.constexpr,
):
    """scale · (Σ_{c≠y} p_c P_c − (1 − p_y) P_y)."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = row < rows
    stride = rows.to(tl.int64)
    y = tl.load(labels + row, mask=mask, other=ignore_index)
    known = mask & (y != ignore_index)
    m = tl.load(model + TOP * stride + row, mask=known, other=0.0)
    log_sum = tl.load(model + LOG_SUM * stride + row, mask=known, other=0.0)
    not_y = tl.load(model + NOT_Y * stride + row, mask=known, other=0.0)

    r = tl.arange(0, SKETCH)
    total = tl.zeros((BLOCK, SKETCH), tl.float32)
    for part in range(slices):
        peak = tl.load(state + (part * STATE + MAX) * stride + row, mask=known, other=0.0)
        share = tl.exp2((tl.maximum(peak - m, FLOOR) - log_sum) * LOG2E)
        cell = (part * stride + row)[:, None] * SKETCH + r[None, :]
        total += share[:, None] * tl.load(sketch + cell, mask=known[:, None], other=0.0)
    y = tl.where(known & is_class(y, classes), y, 0).to(tl.int32)
    total -= not_y[:, None] * signs(words, classes, y, SKETCH)
    total = tl.where(known[:, None], total * scale, 0.0)
    cell = row[:, None] * left_row + r[None, :]
    tl.store(left + cell, total, mask=mask[:, None] & (r < sketch_rows)[None, :])
