"""The fused output layer's launches as data: buffers, grids and the order of kernels.

A plan makes its next launch's buffers when that launch is taken from it, so that one model's slices go before the next
one's come.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from assay.kernels import head_gradient, head_mixture, head_sweep
from assay.kernels._common import Launch, Tile, ceil_div, round_up
from assay.kernels.fields import FIELDS, MIXTURE_FIELDS, has
from assay.kernels.head_tiles import GROUP_M, last_first, mix_tile, slices, sweep_tile, tiles_for
from assay.kernels.philox import OUTPUT_SIDE, ROWS_PER_COUNTER, plan_signs

MIN_SKETCH = 16  # what tl.dot takes
# The gradient's residuals, a panel of rows × a chunk of the vocabulary at a time: at least so many row blocks ...
PANEL_BLOCKS = 8
MAX_PANELS = 8  # ... but no more panels than that; with chunks of 8 % of the vocabulary, they are 1 % of the logits
CHUNK_PERCENT, CHUNK_TILES = 8, 16  # a chunk is no less than 16 tiles: launches cost more than what they would save
# A chunk is split until a panel's programs fill the 132 processors of an H100, on any card: bits follow from the shape.
# A split has 4 tiles of the chunk at least, for its sums are written and read again.
FILL, SPLIT_TILES = 132, 4
SPLIT_ROWS, SPLIT_COLUMNS = 16, 128
TOGETHER = True  # the second sweep of two models of one size runs both products in one loop, whose pipeline fills once
MERGE_ROWS = 128
MERGE_SKETCH_ROWS = 32


@dataclass(frozen=True)
class Models:
    """K output layers and their inputs: ``hidden[k]`` (N, D_k), ``weight[k]`` (C, D_k), ``bias[k]`` (C,) or None."""

    hidden: Sequence[Tensor]
    weight: Sequence[Tensor]
    bias: Sequence[Tensor | None]
    labels: Tensor | None
    ignore_index: int

    @classmethod
    def of(
        cls,
        hidden: Sequence[Tensor],
        weight: Sequence[Tensor],
        bias: Sequence[Tensor | None] | None,
        labels: Tensor | None,
        ignore_index: int,
    ) -> Models:
        bias = [None if b is None else b.contiguous() for b in bias or [None] * len(hidden)]
        return cls(hidden, weight, bias, None if labels is None else labels.contiguous(), ignore_index)

    @property
    def rows(self) -> int:
        return self.hidden[0].shape[0]

    @property
    def classes(self) -> int:
        return self.weight[0].shape[0]

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.hidden[0].new_empty(shape, dtype=dtype)

    def statistics(self) -> tuple[Tensor, Tensor]:
        """(10, N) float32 and (N,) int64, to be filled."""
        return self.empty(len(FIELDS) - 1, self.rows), self.empty(self.rows, dtype=torch.int64)

    def merged(self) -> Merged:
        count = len(self.hidden)
        model = self.empty(count, head_sweep.MODEL.value, self.rows)
        return Merged(model, self.empty(count, self.rows, dtype=torch.int32))


@dataclass(frozen=True)
class Merged:
    """What the first sweep leaves of each model: ``model`` (K, MODEL, N) float32 and ``vote`` (K, N) int32."""

    model: Tensor
    vote: Tensor


@dataclass(frozen=True)
class Kept:
    """What a first sweep keeps beside the log-sums and the label's logit."""

    moment: bool = False  # for the entropy
    top: bool = False  # the largest logit's index
    squares: bool = False  # Σ p²

    @property
    def any(self) -> bool:
        return self.moment or self.top or self.squares


@dataclass(frozen=True)
class Sketch:
    """Where up to 128 rows of a sketch go: ``left`` (N, rows), which are number ``block`` of such, times ``scale``."""

    left: Tensor
    block: int
    scale: float
    key: tuple[int, int]

    @classmethod
    def of(cls, left: Tensor, key: tuple[int, int]) -> list[Sketch]:
        """What fills ``left`` (N, rows), at most 128 of its columns at a time."""
        scale = left.shape[1] ** -0.5
        return [cls(part, i, scale, key) for i, part in enumerate(left.split(ROWS_PER_COUNTER, dim=1))]

    @property
    def padded(self) -> int:
        return max(MIN_SKETCH, triton.next_power_of_2(self.left.shape[1]))


def sweep(
    models: Models,
    k: int,
    merged: Merged,
    kept: Kept,
    direction: tuple[Tensor, Tensor] | None = None,
    sqnorm: Tensor | None = None,
    sketch: Sketch | None = None,
) -> Iterator[Launch]:
    """Sweep model ``k`` and merge its slices into ``merged``, ``direction[1]``, ``sqnorm`` and ``sketch.left``."""
    hidden, weight, bias = models.hidden[k], models.weight[k], models.bias[k]
    n, size = hidden.shape
    padded = sketch.padded if sketch else 0
    vector, along = direction or (None, None)
    operands = [hidden, weight] if vector is None else [hidden, weight, vector]
    tile, widen, described = sweep_tile(
        operands,
        padded=padded,
        direction=direction is not None,
        bias=bias is not None,
        labelled=models.labels is not None and kept.any,
        top=kept.top,
    )
    count, per_slice = slices(models.classes, tile, words=6 + (direction is not None) + padded)

    state = models.empty(count, head_sweep.STATE.value, n)
    top = models.empty(count, n, dtype=torch.int32)
    at_label = models.empty(2, n)
    folded = models.empty(count, n, padded) if sketch else None
    flags = {"WANT_MOMENT": kept.moment, "WANT_TOP": kept.top, "WANT_SQUARES": kept.squares}
    words = None
    if sketch:  # the signs, packed
        words = models.empty(ceil_div(padded, 32), models.classes, dtype=torch.int32)
        yield from plan_signs(words, OUTPUT_SIDE, sketch.key, sketch.block)
    yield from launch(
        head_sweep.sweep,
        ceil_div(n, tile.m) * count,
        tile,
        hidden=blocks_of(hidden, tile.m, tile.k) if described else hidden,
        weight=blocks_of(weight, tile.n, tile.k) if described else weight,
        bias=bias,
        direction=blocks_of(vector, tile.n, tile.k) if described and vector is not None else vector,
        labels=models.labels,
        state=state,
        top=top,
        at_label=at_label,
        words=words,
        sketch=folded,
        rows=n,
        classes=models.classes,
        size=size,
        hidden_row=hidden.stride(0),
        weight_row=weight.stride(0),
        direction_row=0 if vector is None else vector.stride(0),
        tiles=per_slice,
        slices=count,
        ignore_index=models.ignore_index,
        **blocks(tile),
        SKETCH=padded,
        **flags,
        EVEN_D=size % tile.k == 0,
        WIDEN=widen,
        LAST_FIRST=last_first(tile, hidden, widen),
        DESCRIBED=described,
    )
    yield from launch(
        head_sweep.merge,
        ceil_div(n, MERGE_ROWS),
        state=state,
        top=top,
        at_label=at_label,
        labels=models.labels,
        model=merged.model[k],
        vote=merged.vote[k],
        dot=along,
        sqnorm=sqnorm,
        rows=n,
        classes=models.classes,
        slices=count,
        ignore_index=models.ignore_index,
        BLOCK=MERGE_ROWS,
        **flags,
    )
    if sketch:
        yield from launch(
            head_sweep.merge_sketch,
            ceil_div(n, MERGE_SKETCH_ROWS),
            state=state,
            words=words,
            sketch=folded,
            model=merged.model[k],
            labels=models.labels,
            left=sketch.left,
            rows=n,
            classes=models.classes,
            left_row=sketch.left.stride(0),
            slices=count,
            ignore_index=models.ignore_index,
            sketch_rows=sketch.left.shape[1],
            scale=sketch.scale,
            BLOCK=MERGE_SKETCH_ROWS,
            SKETCH=padded,
        )


def finish(
    models: Models, merged: Merged, kept: Kept, share: Sequence[float], fields: int, stats: Tensor, prediction: Tensor
) -> Iterator[Launch]:
    """From what is known of each model, and a second sweep if the mixture is asked for, to the statistics."""
    n, count = models.rows, len(models.hidden)
    share = tuple(float(w) for w in share)
    state = top = at_label = None
    parts = 1
    if count > 1 and has(fields, *MIXTURE_FIELDS):
        launches, (state, top, at_label), parts = mix(models, merged, share, fields)
        yield from launches
    yield from launch(
        head_mixture.finish,
        ceil_div(n, MERGE_ROWS),
        model=merged.model,
        vote=merged.vote,
        state=state,
        top=top,
        at_label=at_label,
        labels=models.labels,
        share=share,
        stats=stats,
        prediction=prediction,
        models=count,
        rows=n,
        slices=parts,
        ignore_index=models.ignore_index,
        fields=fields,
        BLOCK=MERGE_ROWS,
        KEPT_MOMENT=kept.moment,
        KEPT_TOP=kept.top,
        KEPT_SQUARES=kept.squares,
        **mixture_flags(fields),
    )


def mixture_flags(fields: int) -> dict[str, bool]:
    """What the second sweep keeps."""
    return {
        "WANT_TOP": has(fields, "margin", "confidence", "prediction"),
        "WANT_SQUARES": has(fields, "el2n"),
        "WANT_ENTROPY": has(fields, "entropy"),
        "WANT_KL": has(fields, "mutual_information"),
    }


def mix(
    models: Models, merged: Merged, share: tuple[float, ...], fields: int
) -> tuple[Iterator[Launch], tuple[Tensor, Tensor, Tensor], int]:
    """The second sweep, (state, top, at_label) of the mixture that it fills, and its number of slices."""
    n = models.rows
    biased = any(b is not None for b in models.bias)
    tile, widen, described = mix_tile([*models.hidden, *models.weight], bias=biased)
    count, per_slice = slices(models.classes, tile, words=6)
    state = models.empty(count, head_mixture.MIX.value, n)
    top = models.empty(count, n, dtype=torch.int32)
    at_label = models.empty(n)
    bias = None
    if biased:  # in one dtype, and zeros where a model has none
        bias = tuple(models.empty(models.classes).zero_() if b is None else b.float() for b in models.bias)
    launches = launch(
        head_mixture.mix,
        ceil_div(n, tile.m) * count,
        tile,
        hidden=None if described else tuple(models.hidden),
        weight=None if described else tuple(models.weight),
        **pair(models, tile, described),
        bias=bias,
        labels=models.labels,
        model=merged.model,
        state=state,
        top=top,
        at_label=at_label,
        size=tuple(h.shape[1] for h in models.hidden),
        hidden_row=tuple(h.stride(0) for h in models.hidden),
        weight_row=tuple(w.stride(0) for w in models.weight),
        share=share,
        models=len(models.hidden),
        rows=n,
        classes=models.classes,
        tiles=per_slice,
        slices=count,
        ignore_index=models.ignore_index,
        **blocks(tile),
        **mixture_flags(fields),
        EVEN_D=all(h.shape[1] % tile.k == 0 for h in models.hidden),
        WIDEN=widen,
        LAST_FIRST=last_first(tile, models.hidden[0], widen),
        TOGETHER=TOGETHER and described and models.hidden[0].shape[1] == models.hidden[1].shape[1],
    )
    return launches, (state, top, at_label), count


def pair(models: Models, tile: Tile, described: bool) -> dict[str, TensorDescriptor | None]:
    """``mix``'s arguments hidden_0, weight_0, hidden_1 and weight_1: descriptors of two models' matrices, or None."""
    found: dict[str, TensorDescriptor | None] = {}
    for k in range(2):
        found[f"hidden_{k}"] = blocks_of(models.hidden[k], tile.m, tile.k) if described else None
        found[f"weight_{k}"] = blocks_of(models.weight[k], tile.n, tile.k) if described else None
    return found


def into_network(models: Models, merged: Merged, total: Tensor) -> Iterator[Launch]:
    """total (N, D) += Wᵀ(p − onehot(y)) of the one model, its residuals made and used in pieces of 1 % of the logits.

    The pieces are panels of rows times chunks of the vocabulary: the more rows to a panel, the less often the weight is
    read; the wider the chunk, the less often the sum is.
    """
    (hidden,), (weight,), (bias,) = models.hidden, models.weight, models.bias
    n, size = hidden.shape
    tiles, widen = tiles_for([hidden, weight])
    first, second = tiles.logits, tiles.gradient
    panels = max(1, min(MAX_PANELS, n // (PANEL_BLOCKS * first.m)))
    panel = round_up(ceil_div(n, panels), first.m)
    chunk = max(CHUNK_TILES, models.classes * CHUNK_PERCENT // 100 // first.n) * first.n
    chunk = min(round_up(models.classes, first.n), chunk)
    d_tiles = ceil_div(size, second.n)
    splits = max(1, min(FILL // (PANEL_BLOCKS * d_tiles), chunk // (SPLIT_TILES * first.n)))
    split = round_up(ceil_div(chunk, splits), second.k)
    splits, rows = ceil_div(chunk, split), min(panel, n)
    pieces = models.empty(rows, chunk, dtype=torch.float32 if widen else hidden.dtype)
    partial = models.empty(splits - 1, rows, size) if splits > 1 else None
    for row in range(0, n, panel):
        row_end = min(row + panel, n)
        for c in range(0, models.classes, chunk):
            c_end = min(c + chunk, models.classes)
            piece = {"row_begin": row, "row_end": row_end, "c_begin": c, "c_end": c_end}
            n_tiles = ceil_div(c_end - c, first.n)
            yield from launch(
                head_gradient.residual,
                ceil_div(row_end - row, first.m) * n_tiles,
                first,
                hidden=hidden,
                weight=weight,
                bias=bias,
                labels=models.labels,
                model=merged.model[0],
                out=pieces,
                rows=n,
                size=size,
                hidden_row=hidden.stride(0),
                weight_row=weight.stride(0),
                out_row=chunk,
                **piece,
                n_tiles=n_tiles,
                ignore_index=models.ignore_index,
                **blocks(first),
                EVEN_D=size % first.k == 0,
                WIDEN=widen,
            )
            yield from launch(
                head_gradient.accumulate,
                ceil_div(row_end - row, second.m) * d_tiles * splits,
                second,
                residual=pieces,
                weight=weight,
                labels=models.labels,
                total=total,
                partial=partial,
                rows=rows,
                size=size,
                residual_row=chunk,
                weight_row=weight.stride(0),
                **piece,
                d_tiles=d_tiles,
                splits=splits,
                split=split,
                ignore_index=models.ignore_index,
                BLOCK_M=second.m,
                BLOCK_N=second.n,
                BLOCK_K=second.k,
                GROUP_M=GROUP_M,
                WIDEN=widen,
            )
        if partial is not None:
            yield from launch(
                head_gradient.add_splits,
                ceil_div(row_end - row, SPLIT_ROWS) * ceil_div(size, SPLIT_COLUMNS),
                partial=partial,
                labels=models.labels,
                total=total,
                rows=rows,
                size=size,
                row_begin=row,
                row_end=row_end,
                splits=splits,
                ignore_index=models.ignore_index,
                BLOCK_M=SPLIT_ROWS,
                BLOCK=SPLIT_COLUMNS,
            )


def launch(
    kernel: triton.JITFunction, programs: int, tile: Tile | None = None, **arguments: object
) -> Iterator[Launch]:
    """One launch; none for no programs."""
    if programs:
        options = (tile.warps, tile.stages, tile.registers) if tile else (4, 1)
        yield Launch(kernel, (programs,), arguments, *options)


def blocks_of(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A descriptor of the matrix ``x`` that loads blocks (rows, columns) of it.

    Made here, not in the kernel: there each program would write one to global memory first, which an allocator of the
    caller's would have to provide. A CUDA graph keeps it as it keeps an address.
    """
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, columns])


def blocks(tile: Tile) -> dict[str, int]:
    return {"BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_D": tile.k, "GROUP_M": GROUP_M}
