"""The output layer's second sweep, for the statistics of p̄ = Σ_k w_k p_k, and the last step from sums to statistics."""

from __future__ import annotations

import triton
import triton.language as tl

from assay.kernels.head_sweep import (
    CONFIDENCE,
    ENTROPY,
    ERROR2,
    FLOOR,
    LOG2E,
    LOG_PY,
    LOG_SUM,
    MARGIN,
    MODEL,
    TOP,
    below,
    folded,
    highest_and_index,
    is_column,
    parts_with_labels,
    place,
    product,
    product_of_blocks,
    tile_bias,
    total,
)

LN2 = tl.constexpr(0.6931471805599453)
TINY = tl.constexpr(1.1754943508222875e-38)  # the smallest normal float32: 0 · log TINY is 0 where 0 · log 0 is NaN

# Words of a slice's state, (slices, MIX, rows): over the columns other than the label's but for the two logarithms'.
PEAK, OTHERS, MIX_SQUARES, P_LOG_P, KL = (tl.constexpr(i) for i in range(5))
MIX = tl.constexpr(5)


@triton.jit
def pick(values, k):
    """values[k] of a tuple, for a k known only at run time: selects, where unrolling the models would repeat a GEMM."""
    value = values[0]
    for i in tl.static_range(1, len(values)):
        value = tl.where(k == i, values[i], value)
    return value


@triton.jit
def log2(x, QUICK: tl.constexpr):
    """log₂ of normal numbers; in one instruction, to 2⁻²² (absolute from ½ to 2, relative elsewhere), if QUICK: as good
    as the instruction that made x = 2^z, and a fifteenth of the library's function."""
    if QUICK:
        y = tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        y = tl.log2(x)
    return y


@triton.jit
def mixed_in(
    p,  # folded tiles: p̄ of the models before ...
    own,  # ... and Σ_k w_k p_k log₂ p_k; None of none
    z,  # (M, N), this model's logits but for ...
    bias,  # ... (classes,) or None
    share,
    known,  # addresses of the rows' first word of what is known of the model
    stride,
    c0,
    classes,
    M: tl.constexpr,
    N: tl.constexpr,
    WANT_KL: tl.constexpr,
):
    """p and own with one more model's."""
    z = folded(z, M, N)
    if bias is not None:
        z += tile_bias(bias, c0, classes, N)
    peak = tl.load(known + TOP * stride)[:, None, None, None]
    log2_sum = tl.load(known + LOG_SUM * stride)[:, None, None, None] * LOG2E
    z = (z - peak) * LOG2E - log2_sum
    weighted = share * tl.exp2(z)
    p = weighted if p is None else p + weighted
    if WANT_KL:
        more = weighted * tl.maximum(z, FLOOR)
        own = more if own is None else own + more
    return p, own


@triton.jit(do_not_specialize=["models", "rows", "tiles", "slices", "ignore_index"])
def mix(
    hidden,  # per model (rows, size); None where there are ...
    weight,  # per model (classes, size)
    hidden_0,  # ... descriptors of two models' blocks (BLOCK_M, BLOCK_D) and (BLOCK_N, BLOCK_D), one by one: ...
    weight_0,
    hidden_1,  # ... not all versions of Triton launch with a tuple of them
    weight_1,
    bias,  # per model (classes,); or None
    labels,  # (rows,) int64 or None
    model,  # (models, MODEL, rows) float32
    state,  # (slices, MIX, rows) float32
    top,  # (slices, rows) int32
    at_label,  # (rows,) float32, p̄_y
    size,  # per model, as are ...
    hidden_row,
    weight_row,
    share,  # ... and the mixture's weights
    models,
    rows,
    classes,
    tiles,  # per slice
    slices,
    ignore_index,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_M: tl.constexpr,
    WANT_TOP: tl.constexpr,
    WANT_SQUARES: tl.constexpr,
    WANT_ENTROPY: tl.constexpr,
    WANT_KL: tl.constexpr,
    EVEN_D: tl.constexpr,
    WIDEN: tl.constexpr,
    LAST_FIRST: tl.constexpr,  # the order of a tile's sums
    TOGETHER: tl.constexpr,  # two models of one size: both products in one loop, whose pipeline fills once
):
    block, part = place(rows, slices, BLOCK_M, GROUP_M)
    row = block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = tl.minimum(row, rows - 1)
    stride = rows.to(tl.int64)
    begin = part * tiles * BLOCK_N
    end = tl.minimum(begin + tiles * BLOCK_N, classes)
    if labels is not None:
        y = tl.load(labels + inside)
        if tl.max((y != ignore_index).to(tl.int32), 0) == 0:
            return
        y = tl.where((row < rows) & (y >= begin) & (y < end), y, -1).to(tl.int32)
        part_32 = tl.cdiv(tiles, 32) * BLOCK_N
        labelled = parts_with_labels(y, begin, part_32, BLOCK_M)

    peak = tl.full((BLOCK_M,), -1.0, tl.float32)
    best = tl.zeros((BLOCK_M,), tl.int32)
    others = tl.zeros((BLOCK_M,), tl.float32)
    squares = tl.zeros((BLOCK_M,), tl.float32)
    p_log_p = tl.zeros((BLOCK_M,), tl.float32)
    kl = tl.zeros((BLOCK_M,), tl.float32)
    p_y = tl.zeros((BLOCK_M,), tl.float32)

    for c0 in range(begin, end, BLOCK_N):
        if hidden is None:
            # Both products before either is looked at: the first waits as it is, where p and own would be two tiles.
            first = block * BLOCK_M
            if TOGETHER:
                z, other = product_of_blocks(
                    hidden_0, weight_0, weight_1, hidden_1, first, c0, size[0], BLOCK_M, BLOCK_N, BLOCK_D, WIDEN
                )
            else:
                z, _ = product_of_blocks(
                    hidden_0, weight_0, None, None, first, c0, size[0], BLOCK_M, BLOCK_N, BLOCK_D, WIDEN
                )
                other, _ = product_of_blocks(
                    hidden_1, weight_1, None, None, first, c0, size[1], BLOCK_M, BLOCK_N, BLOCK_D, WIDEN
                )
            bias_0 = bias[0] if bias is not None else None
            bias_1 = bias[1] if bias is not None else None
            p, own = mixed_in(
                None, None, z, bias_0, share[0], model + inside, stride, c0, classes, BLOCK_M, BLOCK_N, WANT_KL
            )
            known = model + MODEL * stride + inside
            p, own = mixed_in(p, own, other, bias_1, share[1], known, stride, c0, classes, BLOCK_M, BLOCK_N, WANT_KL)
        else:
            column = tl.minimum(c0 + tl.arange(0, BLOCK_N), classes - 1).to(tl.int64)
            p = folded(tl.zeros((BLOCK_M, BLOCK_N), tl.float32), BLOCK_M, BLOCK_N)
            own = p
            for k in range(models):
                x_row = pick(hidden, k) + inside * pick(hidden_row, k)
                w_row = pick(weight, k) + column * pick(weight_row, k)
                z, _ = product(x_row, w_row, None, pick(size, k), BLOCK_M, BLOCK_N, BLOCK_D, EVEN_D, WIDEN)
                bias_k = pick(bias, k) if bias is not None else None
                known = model + k * MODEL * stride + inside
                p, own = mixed_in(
                    p, own, z, bias_k, pick(share, k), known, stride, c0, classes, BLOCK_M, BLOCK_N, WANT_KL
                )

        if c0 + BLOCK_N > classes:
            p = tl.where(below(classes - c0, BLOCK_N), p, 0.0)
            if WANT_KL:
                own = tl.where(below(classes - c0, BLOCK_N), own, 0.0)
        if WANT_ENTROPY or WANT_KL:
            plogp = p * log2(tl.maximum(p, TINY), not WIDEN)
            if WANT_ENTROPY:
                p_log_p += total(plogp, LAST_FIRST)
            if WANT_KL:
                kl += total(
                    own - plogp, LAST_FIRST
                )  # element by element: where the models agree, nothing is left to cancel
        if labels is not None:  # noqa: SIM102
            if ((labelled >> ((c0 - begin) // part_32)) & 1) != 0:
                is_y = is_column(y - c0, BLOCK_N)
                p_y += total(tl.where(is_y, p, 0.0), LAST_FIRST)
                p = tl.where(is_y, 0.0, p)
        if WANT_TOP:
            high, first = highest_and_index(p, BLOCK_M, BLOCK_N)
            best = tl.where(high > peak, c0 + first, best)
            peak = tl.maximum(peak, high)
        if WANT_SQUARES:
            others += total(p, LAST_FIRST)
            squares += total(p * p, LAST_FIRST)

    mask = row < rows
    out = state + part.to(tl.int64) * MIX * stride + row
    if labels is not None:
        tl.store(at_label + row, p_y, mask=y >= 0)
    if WANT_TOP:
        tl.store(out + PEAK * stride, peak, mask=mask)
        tl.store(top + part.to(tl.int64) * stride + row, best, mask=mask)
    if WANT_SQUARES:
        tl.store(out + OTHERS * stride, others, mask=mask)
        tl.store(out + MIX_SQUARES * stride, squares, mask=mask)
    if WANT_ENTROPY:
        tl.store(out + P_LOG_P * stride, p_log_p, mask=mask)
    if WANT_KL:
        tl.store(out + KL * stride, kl, mask=mask)


@triton.jit(do_not_specialize=["models", "rows", "slices", "ignore_index", "fields"])
def finish(
    model,  # (models, MODEL, rows)
    vote,  # (models, rows)
    state,  # (slices, MIX, rows); None if there was no second sweep
    top,
    at_label,
    labels,
    share,
    stats,  # (10, rows) float32
    prediction,  # (rows,) int64
    models,
    rows,
    slices,
    ignore_index,
    fields,  # bit f: field f is asked for; the others become NaN, a prediction −1
    BLOCK: tl.constexpr,
    KEPT_MOMENT: tl.constexpr,  # what the first sweep left: of the rest, ENTROPY, ...
    KEPT_TOP: tl.constexpr,  # ... vote and ...
    KEPT_SQUARES: tl.constexpr,  # ... ERROR2, nothing was written
    WANT_TOP: tl.constexpr,  # and what the second left
    WANT_SQUARES: tl.constexpr,
    WANT_ENTROPY: tl.constexpr,
    WANT_KL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = row < rows
    stride = rows.to(tl.int64)
    nan = float("nan")
    undefined = row < 0
    if labels is not None:
        y = tl.load(labels + row, mask=mask, other=ignore_index)
        undefined = y == ignore_index
    seen = mask & ~undefined  # neither sweep writes what is only its own for a block of ignored rows

    # The models one by one.
    high = tl.full((BLOCK,), float("-inf"), tl.float32)
    mean_nll = tl.zeros((BLOCK,), tl.float32)
    expected = tl.zeros((BLOCK,), tl.float32)
    agreement = tl.zeros((BLOCK,), tl.float32)
    vote_entropy = tl.zeros((BLOCK,), tl.float32)
    for k in range(models):
        w = pick(share, k)
        word = model + k * MODEL * stride + row
        log_sum = tl.load(word + LOG_SUM * stride, mask=mask, other=0.0)
        undefined = undefined | (log_sum != log_sum)
        if KEPT_MOMENT:
            expected += w * tl.load(word + ENTROPY * stride, mask=mask, other=0.0)
        if KEPT_TOP:
            choice = tl.load(vote + k * stride + row, mask=mask, other=0)
            support = tl.zeros((BLOCK,), tl.float32)
            for j in range(models):
                other = tl.load(vote + j * stride + row, mask=mask, other=0)
                support += tl.where(other == choice, pick(share, j), 0.0)
            if w > 0:
                vote_entropy -= w * tl.log(tl.minimum(support, 1.0))
            if labels is not None:
                agreement += tl.where(choice == y, w, 0.0)
        if labels is not None:
            log_py = tl.load(word + LOG_PY * stride, mask=mask, other=0.0)
            if w > 0:  # 0 · −inf is not 0
                mean_nll -= w * log_py
                high = tl.maximum(high, log_py)

    # −log Σ_k w_k p_k,y, relative to the largest p_k,y.
    if labels is not None:
        total = tl.zeros((BLOCK,), tl.float32)
        for k in range(models):
            log_py = tl.load(model + (k * MODEL + LOG_PY) * stride + row, mask=mask, other=0.0)
            w = pick(share, k)
            if w > 0:
                total += w * tl.exp2((log_py - high) * LOG2E)
        nll = tl.where(high == float("-inf"), float("inf"), -(high + tl.log(total)))
    else:
        nll = tl.full((BLOCK,), nan, tl.float32)
        mean_nll = nll
        agreement = nll

    # The mixture: from the second sweep; of one model it is the model itself.
    margin = tl.full((BLOCK,), nan, tl.float32)
    error2 = tl.full((BLOCK,), nan, tl.float32)
    best = tl.full((BLOCK,), -1, tl.int32)
    if state is not None:
        peak = tl.full((BLOCK,), -1.0, tl.float32)
        others = tl.zeros((BLOCK,), tl.float32)
        squares = tl.zeros((BLOCK,), tl.float32)
        p_log_p = tl.zeros((BLOCK,), tl.float32)
        kl = tl.zeros((BLOCK,), tl.float32)
        for part in range(slices):
            word = state + part * MIX * stride + row
            if WANT_TOP:
                high = tl.load(word + PEAK * stride, mask=seen, other=0.0)
                best = tl.where(high > peak, tl.load(top + part * stride + row, mask=seen, other=0), best)
                peak = tl.maximum(peak, high)
            if WANT_SQUARES:
                others += tl.load(word + OTHERS * stride, mask=seen, other=0.0)
                squares += tl.load(word + MIX_SQUARES * stride, mask=seen, other=0.0)
            if WANT_ENTROPY:
                p_log_p += tl.load(word + P_LOG_P * stride, mask=seen, other=0.0)
            if WANT_KL:
                kl += tl.load(word + KL * stride, mask=seen, other=0.0)
        confidence = peak
        if labels is not None:
            mix_y = tl.load(at_label + row, mask=seen & ~undefined, other=0.0)  # elsewhere none was written
            margin = mix_y - peak
            error2 = others * others + squares
            confidence = tl.maximum(peak, mix_y)
            best = tl.where((mix_y > peak) | ((mix_y == peak) & (y < best)), y.to(tl.int32), best)
        entropy = -p_log_p * LN2
        information = tl.maximum(kl * LN2, 0.0)
    else:
        word = model + row
        if labels is not None:
            margin = tl.load(word + MARGIN * stride, mask=mask, other=0.0)
            if KEPT_SQUARES:
                error2 = tl.load(word + ERROR2 * stride, mask=mask, other=0.0)
        confidence = tl.load(word + CONFIDENCE * stride, mask=mask, other=0.0)
        entropy = expected
        information = tl.zeros((BLOCK,), tl.float32)
        if KEPT_TOP:
            best = tl.load(vote + row, mask=mask, other=0)

    # In the order of fields.FIELDS, prediction last.
    values = (
        nll,
        mean_nll,
        margin,
        agreement,
        tl.sqrt(error2),
        entropy,
        expected,
        information,
        confidence,
        vote_entropy,
    )
    for i in tl.static_range(len(values)):
        asked = (fields >> i) & 1
        value = tl.where(undefined | (asked == 0), nan, values[i])
        tl.store(stats + i * stride + row, value, mask=mask)
    asked = (fields >> len(values)) & 1
    tl.store(prediction + row, tl.where(undefined | (asked == 0), -1, best).to(tl.int64), mask=mask)
