"""The fused output layer: statistics, gradients and losses of logits that are never stored.

Every model's hidden states and output matrix are swept once in vocabulary tiles (head_sweep). What needs the mixture of
several models takes a second sweep (head_mixture), the gradient into the network a second and a third (head_gradient).
Only partial states reach memory, one per row and slice of the vocabulary, and they are merged in the slices' order:
the same bits on every run, and for a row whatever its neighbours are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from assay.kernels import head_gradient, head_mixture, head_sweep, philox
from assay.kernels._common import HALF, Launch, ceil_div, generation, round_up
from assay.kernels.philox import ROWS_PER_COUNTER


@dataclass(frozen=True)
class Tile:
    """Rows × columns of a product, made from ``k`` terms at a time."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Tiles:
    """By what a program keeps in registers. Never by the number of rows: a row's bits must not depend on the batch."""

    logits: Tile  # one product, reduced at once
    direction: Tile  # two products beside each other
    sketch: Tile  # one product and up to 32 rows of a sketch ...
    wide_sketch: Tile  # ... or up to 128; also for two products and a sketch
    mixture: Tile  # one product and two sums over the models
    gradient: Tile  # residual times weight


HALF_TILES = {
    8: Tiles(
        logits=Tile(128, 128, 32, 8, 3),
        direction=Tile(128, 64, 32, 8, 3),
        sketch=Tile(128, 64, 32, 8, 3),
        wide_sketch=Tile(64, 64, 32, 8, 3),
        mixture=Tile(128, 64, 32, 8, 3),
        gradient=Tile(128, 128, 32, 8, 3),
    ),
    9: Tiles(
        logits=Tile(128, 128, 64, 4, 3),
        direction=Tile(128, 128, 64, 8, 3),
        sketch=Tile(128, 128, 64, 8, 3),
        wide_sketch=Tile(128, 64, 64, 8, 3),
        mixture=Tile(128, 128, 64, 8, 3),
        gradient=Tile(128, 128, 64, 4, 3),
    ),
    10: Tiles(
        logits=Tile(128, 128, 64, 4, 3),
        direction=Tile(128, 128, 64, 8, 3),
        sketch=Tile(128, 128, 64, 8, 3),
        wide_sketch=Tile(128, 64, 64, 8, 3),
        mixture=Tile(128, 128, 64, 8, 3),
        gradient=Tile(128, 128, 64, 4, 3),
    ),
}
# float32 runs on the ordinary units, a register per operand: small tiles everywhere.
FLOAT_TILES = Tiles(
    logits=Tile(64, 64, 16, 4, 3),
    direction=Tile(64, 32, 16, 4, 3),
    sketch=Tile(64, 64, 16, 4, 3),
    wide_sketch=Tile(32, 32, 16, 4, 3),
    mixture=Tile(64, 32, 16, 4, 3),
    gradient=Tile(64, 64, 16, 4, 3),
)
# Under the interpreter: small, so that small tests cross every edge.
INTERPRETED = Tiles(*[Tile(16, 32, 16, 4, 1)] * 6)
GROUP_M = 8  # row blocks that run together: 1,024 rows of hidden states stay in L2, and share each weight tile
MAX_SLICES = 16
# A slice is long enough for its partial states to stay under 1 % of its bfloat16 logits: 100 · 4 / 2 columns a word.
COLUMNS_PER_WORD = 200
MIN_SKETCH = 16  # what tl.dot takes
PANEL_BLOCKS = 8  # the gradient's residuals: at least so many row blocks ...
MAX_PANELS = 8  # ... and at most so many panels of rows
MERGE_ROWS = 128
MERGE_SKETCH_ROWS = 32
SIGN_BLOCK = 512

FIELDS = (
    "nll mean_nll margin agreement el2n entropy expected_entropy mutual_information confidence vote_entropy prediction"
).split()  # assay.ops.ensemble.FIELDS
LABEL_FIELDS = ("nll", "mean_nll", "margin", "agreement", "el2n")
MIXTURE_FIELDS = ("margin", "el2n", "entropy", "mutual_information", "confidence", "prediction")


@dataclass(frozen=True)
class Models:
    """K output layers and what they are applied to: ``hidden[k]`` (N, D_k), ``weight[k]`` (C, D_k), ``bias[k]`` (C,)."""

    hidden: Sequence[Tensor]
    weight: Sequence[Tensor]
    bias: Sequence[Tensor | None]
    labels: Tensor | None
    ignore_index: int

    @property
    def rows(self) -> int:
        return self.hidden[0].shape[0]

    @property
    def classes(self) -> int:
        return self.weight[0].shape[0]

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.hidden[0].new_empty(shape, dtype=dtype)


@dataclass(frozen=True)
class Known:
    """What the first sweep leaves of each model: ``model`` (K, MODEL, N) float32 and ``vote`` (K, N) int32."""

    model: Tensor
    vote: Tensor


@dataclass(frozen=True)
class Wanted:
    """What a first sweep keeps beside the log-sums and the label's logit."""

    moment: bool = False  # for the entropy
    top: bool = False  # the largest logit's index
    squares: bool = False  # Σ p²


def statistics(
    hidden: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    labels: Tensor | None,
    share: Sequence[float],
    ignore_index: int,
    fields: int,
) -> tuple[Tensor, Tensor]:
    """(10, N) float32 statistics and (N,) predictions, as ``ops.ensemble`` defines them; checked by ops.head.

    Args:
        hidden, weight: K tensors (N, D_k) and (C, D_k), float32, bfloat16 or float16, the same for all; last stride 1.
        bias: K tensors (C,) or None.
        labels: (N,) int64 or None.
        share: K weights of the mixture, sum 1.
        fields: bit f set if field f is wanted. One that is not is NaN, a prediction −1.
    """
    models = Models(hidden, weight, bias, labels, ignore_index)
    fields = known_fields(fields, labels)
    wanted = wanted_by(fields, len(hidden))
    known = Known(models.empty(len(hidden), head_sweep.MODEL.value, models.rows), votes(models))
    for k in range(len(hidden)):
        sweep(models, k, known, wanted)
    return finish(models, known, share, fields)


def scores(
    hidden: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    labels: Tensor,
    share: Sequence[float],
    ignore_index: int,
    fields: int,
    directions: Sequence[Tensor] | None,
    keys: Sequence[tuple[int, int]],
    rows: int | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None]:
    """``statistics`` and, from the same first sweep, the factors of each model's gradient (p − onehot(y)) hᵀ.

    Args:
        directions: K tensors V_k (C, D_k), last stride 1; or None. In the hidden states' dtype they run on tensor
            cores, in another all is widened to float32.
        keys: the two 32-bit words of each model's Philox key.
        rows: of the sketch; None for no sketch.

    Returns:
        stats (10, N), prediction (N,), dot (K, N) = Σ_c (p_c − [c=y]) (V_k h)_c, sqnorm (K, N) = ‖p − onehot(y)‖²,
        left (K, N, rows) = P (p − onehot(y)) / √rows; dot and left None if not asked for. 0 in ignored rows.
    """
    models = Models(hidden, weight, bias, labels, ignore_index)
    count = len(hidden)
    wanted = wanted_by(fields, count)
    wanted = Wanted(wanted.moment, wanted.top, squares=True)
    known = Known(models.empty(count, head_sweep.MODEL.value, models.rows), votes(models))
    dot = models.empty(count, models.rows) if directions is not None else None
    sqnorm = models.empty(count, models.rows)
    left = models.empty(count, models.rows, rows) if rows else None
    for k in range(count):
        direction = (directions[k], dot[k]) if directions is not None else None
        sketch = Sketch(left[k][:, :ROWS_PER_COUNTER], 0, rows**-0.5, keys[k]) if rows else None
        sweep(models, k, known, wanted, direction, sqnorm[k], sketch)
        for block in range(1, ceil_div(rows or 0, ROWS_PER_COUNTER)):  # what is over 128 rows sweeps again
            part = left[k][:, block * ROWS_PER_COUNTER : (block + 1) * ROWS_PER_COUNTER]
            sweep(models, k, known, Wanted(), sketch=Sketch(part, block, rows**-0.5, keys[k]))
    return *finish(models, known, share, fields), dot, sqnorm, left


def losses(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Per-row −log p_y (N,) and, if asked for, Wᵀ(p − onehot(y)) (N, D); float32, 0 in ignored rows."""
    models = Models([hidden], [weight], [bias], labels, ignore_index)
    known = Known(models.empty(1, head_sweep.MODEL.value, models.rows), votes(models))
    sweep(models, 0, known, Wanted())
    log_py = known.model[0, head_sweep.LOG_PY.value]
    nll = torch.where(labels == ignore_index, 0.0, -log_py)
    return nll, into_network(models, known) if gradient else None


# ---- the launches


@dataclass(frozen=True)
class Sketch:
    """Where up to 128 rows of a sketch go: ``left`` (N, rows), which are number ``block`` of such, times ``scale``."""

    left: Tensor
    block: int
    scale: float
    key: tuple[int, int]

    @property
    def padded(self) -> int:
        return max(MIN_SKETCH, triton.next_power_of_2(self.left.shape[1]))

    def words(self, models: Models) -> Tensor:
        """The signs, packed: (padded / 32, C) int32."""
        out = models.empty(ceil_div(self.padded, 32), models.classes, dtype=torch.int32)
        key0, key1 = (word - (1 << 32) if word >> 31 else word for word in self.key)  # int32: one type for every key
        launch(
            philox.sign_words,
            ceil_div(models.classes, SIGN_BLOCK),
            out=out,
            count=models.classes,
            block=self.block,
            side=philox.OUTPUT_SIDE,
            key0=key0,
            key1=key1,
            WORDS=len(out),
            BLOCK=SIGN_BLOCK,
        )
        return out


def sweep(
    models: Models,
    k: int,
    known: Known,
    wanted: Wanted,
    direction: tuple[Tensor, Tensor] | None = None,
    sqnorm: Tensor | None = None,
    sketch: Sketch | None = None,
) -> None:
    """Sweep model ``k`` and merge its slices into ``known``, ``direction[1]``, ``sqnorm`` and ``sketch.left``."""
    hidden, weight, bias = models.hidden[k], models.weight[k], models.bias[k]
    n, size = hidden.shape
    padded = sketch.padded if sketch else 0
    vector, along = direction or (None, None)
    operands = [hidden, weight] if vector is None else [hidden, weight, vector]
    tiles, widen = tiles_for(operands)
    tile = tiles.wide_sketch if padded > 32 or (padded and direction) else tiles.sketch if padded else tiles.logits
    tile = tiles.direction if direction and not padded else tile
    count, per_slice = slices(models.classes, tile, words=6 + (direction is not None) + padded)

    state = models.empty(count, head_sweep.STATE.value, n)
    top = models.empty(count, n, dtype=torch.int32)
    at_label = models.empty(2, n)
    folded = models.empty(count, n, padded) if sketch else None
    flags = {"WANT_MOMENT": wanted.moment, "WANT_TOP": wanted.top, "WANT_SQUARES": wanted.squares}
    words = sketch.words(models) if sketch else None
    launch(
        head_sweep.sweep,
        ceil_div(n, tile.m) * count,
        tile,
        hidden=hidden,
        weight=weight,
        bias=bias,
        direction=vector,
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
    )
    launch(
        head_sweep.merge,
        ceil_div(n, MERGE_ROWS),
        state=state,
        top=top,
        at_label=at_label,
        labels=models.labels,
        model=known.model[k],
        vote=known.vote[k],
        dot=along,
        sqnorm=sqnorm,
        rows=n,
        slices=count,
        ignore_index=models.ignore_index,
        BLOCK=MERGE_ROWS,
        **flags,
    )
    if sketch:
        launch(
            head_sweep.merge_sketch,
            ceil_div(n, MERGE_SKETCH_ROWS),
            state=state,
            words=words,
            sketch=folded,
            model=known.model[k],
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


def finish(models: Models, known: Known, share: Sequence[float], fields: int) -> tuple[Tensor, Tensor]:
    """From what is known of each model, and a second sweep if the mixture is asked for, to the statistics."""
    n, count = models.rows, len(models.hidden)
    share = tuple(float(w) for w in share)
    mixed, parts = None, 1
    if count > 1 and any(has(fields, f) for f in MIXTURE_FIELDS):
        mixed, parts = mix(models, known, share, fields)
    state, top, at_label = mixed or (None, None, None)
    stats = models.empty(len(FIELDS) - 1, n)
    prediction = models.empty(n, dtype=torch.int64)
    launch(
        head_mixture.finish,
        ceil_div(n, MERGE_ROWS),
        model=known.model,
        vote=known.vote,
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
    )
    return stats, prediction


def mix(
    models: Models, known: Known, share: tuple[float, ...], fields: int
) -> tuple[tuple[Tensor, Tensor, Tensor], int]:
    """The second sweep: (state, top, at_label) of the mixture, and its number of slices."""
    n = models.rows
    tiles, widen = tiles_for([*models.hidden, *models.weight])
    tile = tiles.mixture
    count, per_slice = slices(models.classes, tile, words=6)
    state = models.empty(count, head_mixture.MIX.value, n)
    top = models.empty(count, n, dtype=torch.int32)
    at_label = models.empty(n)
    bias = None
    if any(b is not None for b in models.bias):  # in one dtype, and zeros where a model has none
        bias = tuple(models.empty(models.classes).zero_() if b is None else b.float() for b in models.bias)
    launch(
        head_mixture.mix,
        ceil_div(n, tile.m) * count,
        tile,
        hidden=tuple(models.hidden),
        weight=tuple(models.weight),
        bias=bias,
        labels=models.labels,
        model=known.model,
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
        WANT_TOP=any(has(fields, f) for f in ("margin", "confidence", "prediction")),
        WANT_SQUARES=has(fields, "el2n"),
        WANT_ENTROPY=has(fields, "entropy"),
        WANT_KL=has(fields, "mutual_information"),
        EVEN_D=all(h.shape[1] % tile.k == 0 for h in models.hidden),
        WIDEN=widen,
    )
    return (state, top, at_label), count


def into_network(models: Models, known: Known) -> Tensor:
    """Wᵀ(p − onehot(y)) (N, D) of the one model, its residuals made and used up in pieces of 1 % of the logits.

    The pieces are panels of rows times chunks of the vocabulary: the more rows to a panel, the less often the weight is
    read; the wider the chunk, the less often the sum is.
    """
    (hidden,), (weight,), (bias,) = models.hidden, models.weight, models.bias
    n, size = hidden.shape
    tiles, widen = tiles_for([hidden, weight])
    first, second = tiles.logits, tiles.gradient
    panels = max(1, min(MAX_PANELS, n // (PANEL_BLOCKS * first.m)))
    panel = round_up(ceil_div(n, panels), first.m)
    chunk = min(round_up(models.classes, first.n), max(1, models.classes * panels // 100 // first.n) * first.n)
    pieces = models.empty(min(panel, n), chunk, dtype=torch.float32 if widen else hidden.dtype)
    total = hidden.new_zeros((n, size), dtype=torch.float32)
    for row in range(0, n, panel):
        row_end = min(row + panel, n)
        row_blocks = ceil_div(row_end - row, first.m)
        for c in range(0, models.classes, chunk):
            c_end = min(c + chunk, models.classes)
            piece = {"row_begin": row, "row_end": row_end, "c_begin": c, "c_end": c_end}
            n_tiles, d_tiles = ceil_div(c_end - c, first.n), ceil_div(size, second.n)
            launch(
                head_gradient.residual,
                row_blocks * n_tiles,
                first,
                hidden=hidden,
                weight=weight,
                bias=bias,
                labels=models.labels,
                model=known.model[0],
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
            launch(
                head_gradient.accumulate,
                row_blocks * d_tiles,
                second,
                residual=pieces,
                weight=weight,
                labels=models.labels,
                total=total,
                size=size,
                residual_row=chunk,
                weight_row=weight.stride(0),
                **piece,
                d_tiles=d_tiles,
                ignore_index=models.ignore_index,
                BLOCK_M=second.m,
                BLOCK_N=second.n,
                BLOCK_K=second.k,
                GROUP_M=GROUP_M,
                WIDEN=widen,
            )
    return total


def launch(kernel: triton.JITFunction, programs: int, tile: Tile | None = None, **arguments: object) -> None:
    """Launch beside the first tensor among the arguments; nothing to do for no programs."""
    tensor = next(a for a in arguments.values() if isinstance(a, Tensor))
    if programs:
        warps, stages = (tile.warps, tile.stages) if tile else (4, 1)
        Launch(kernel, (programs,), arguments, warps, stages).run(tensor)


def blocks(tile: Tile) -> dict[str, int]:
    return {"BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_D": tile.k, "GROUP_M": GROUP_M}


def tiles_for(operands: Sequence[Tensor]) -> tuple[Tiles, bool]:
    """The tiles, and whether operands are widened to float32 on load."""
    first = operands[0]
    if not first.is_cuda and not first.is_meta:
        return INTERPRETED, True
    if first.dtype in HALF and all(x.dtype == first.dtype for x in operands):
        return HALF_TILES.get(generation(first), HALF_TILES[8]), False
    return FLOAT_TILES, True


def slices(classes: int, tile: Tile, words: int) -> tuple[int, int]:
    """How many slices the vocabulary is cut into, and how many tiles each has: from the shape alone."""
    wanted = max(1, min(MAX_SLICES, classes // (COLUMNS_PER_WORD * words)))
    tiles = ceil_div(classes, tile.n)
    per_slice = ceil_div(tiles, wanted)
    return ceil_div(tiles, per_slice), per_slice


def votes(models: Models) -> Tensor:
    return models.empty(len(models.hidden), models.rows, dtype=torch.int32)


def has(fields: int, name: str) -> bool:
    return bool(fields >> FIELDS.index(name) & 1)


def known_fields(fields: int, labels: Tensor | None) -> int:
    """Without labels the label fields are NaN, and nothing is computed for them."""
    return fields if labels is not None else fields & ~sum(1 << FIELDS.index(f) for f in LABEL_FIELDS)


def wanted_by(fields: int, count: int) -> Wanted:
    alone = count == 1  # one model is its own mixture
    return Wanted(
        moment=has(fields, "expected_entropy") or (alone and has(fields, "entropy")),
        top=any(has(fields, f) for f in ("agreement", "vote_entropy")) or (alone and has(fields, "prediction")),
        squares=alone and has(fields, "el2n"),
    )
