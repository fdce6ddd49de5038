"""How the fused output layer is cut: tiles by device, dtype and what a program holds; slices by the vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from assay.kernels._common import HALF, Tile, aligned, ceil_div, generation


@dataclass(frozen=True)
class Tiles:
    """By what a program keeps in registers. Never by the number of rows: a row's bits must not depend on the batch."""

    logits: Tile  # one product, reduced at once
    labelled: Tile  # one product with labels, of which more is kept than the labels' loss
    more: Tile  # beside it a second product, up to 32 rows of a sketch (or both), or the mixture's two sums
    wide: Tile  # beside it up to 128 rows of a sketch
    gradient: Tile  # residual times weight


@dataclass(frozen=True)
class DescribedTiles:
    """The same where operands come by tensor descriptors, which leaves more registers."""

    narrow: Tile  # one product of short rows: two programs on a processor
    broad: Tile  # one of long rows
    biased: Tile  # one and a bias
    more: Tile  # a second product, or up to 32 rows of a sketch
    most: Tile  # both
    wide: Tile
    pair: Tile  # the mixture of two models: both their products ...
    biased_pair: Tile  # ... and their biases


# Hopper's as an H200 has measured them (benchmarks/results/gpu), a few spilled bytes or not; the others the largest
# that no supported Triton spills (tests/kernels), for what a product reads falls when its tile grows. Half precision
# runs on tensor cores; an unlisted generation gets Ampere's tiles, which stay under Ada's 99 KB of shared memory.
HALF_TILES = {
    8: Tiles(
        logits=Tile(128, 128, 32, 8, 4),
        labelled=Tile(128, 128, 32, 16, 4, registers=128),
        more=Tile(128, 64, 32, 8, 4),
        wide=Tile(64, 32, 32, 8, 4),
        gradient=Tile(128, 128, 32, 8, 4),
    ),
    9: Tiles(
        logits=Tile(128, 128, 64, 8, 3),
        labelled=Tile(128, 128, 64, 8, 3),
        more=Tile(128, 128, 64, 8, 3),
        wide=Tile(64, 64, 64, 8, 3),
        gradient=Tile(128, 128, 64, 8, 3),
    ),
    10: Tiles(
        logits=Tile(128, 128, 64, 8, 3),
        labelled=Tile(128, 128, 64, 8, 3),
        more=Tile(128, 64, 64, 8, 3),
        wide=Tile(64, 64, 64, 8, 3),
        gradient=Tile(128, 128, 64, 8, 3),
    ),
}
# float32 runs on the ordinary units, a register per operand.
FLOAT_TILES = Tiles(
    logits=Tile(128, 64, 16, 8, 3),
    labelled=Tile(128, 64, 16, 8, 3),
    more=Tile(64, 64, 16, 8, 3),
    wide=Tile(32, 32, 16, 8, 3),
    gradient=Tile(64, 64, 16, 4, 3),
)
# Rows that start at any address are loaded element by element, which takes more registers.
RAGGED_HALF_TILES = Tiles(
    logits=Tile(64, 64, 32, 8, 3),
    labelled=Tile(64, 64, 32, 8, 3),
    more=Tile(64, 32, 32, 8, 3),
    wide=Tile(32, 32, 32, 8, 3),
    gradient=Tile(64, 64, 32, 4, 3),
)
RAGGED_FLOAT_TILES = Tiles(
    logits=Tile(32, 64, 16, 4, 3),
    labelled=Tile(32, 64, 16, 4, 3),
    more=Tile(64, 64, 16, 8, 3),
    wide=Tile(32, 32, 16, 8, 3),
    gradient=Tile(32, 64, 16, 4, 3),
)
DESCRIBED_TILES = {
    9: DescribedTiles(
        narrow=Tile(128, 128, 64, 4, 3),
        broad=Tile(128, 256, 64, 8, 3),
        biased=Tile(128, 128, 64, 8, 3),
        more=Tile(128, 128, 64, 8, 3),
        most=Tile(128, 128, 64, 8, 3),
        wide=Tile(64, 64, 64, 8, 3),
        pair=Tile(128, 128, 64, 8, 3),
        biased_pair=Tile(128, 64, 64, 8, 3),
    ),
    10: DescribedTiles(
        narrow=Tile(128, 128, 64, 8, 3),
        broad=Tile(128, 128, 64, 8, 3),
        biased=Tile(128, 128, 64, 8, 3),
        more=Tile(128, 64, 64, 8, 3),
        most=Tile(128, 64, 64, 8, 3),
        wide=Tile(64, 64, 64, 8, 3),
        pair=Tile(128, 64, 64, 8, 3),
        biased_pair=Tile(128, 64, 64, 8, 3),
    ),
}
NARROW = 576  # up to here products are so short that a second program on a processor has to hide their epilogues
# Under the interpreter: small, so that small tests cross every edge.
INTERPRETED = Tiles(*[Tile(16, 32, 16, 4, 1)] * 5)
INTERPRETED_DESCRIBED = DescribedTiles(*[Tile(16, 32, 16, 4, 1)] * 8)
EVEN = 64  # a row is whole steps of every tile above
MAX_STRIDE = 1 << 40  # bytes from row to row that a tensor descriptor can hold
BLACKWELL_ROWS = 64  # what Blackwell's matrix units take at least; fewer go to those that Ampere has
GROUP_M = 8  # row blocks that run together: 1,024 rows of hidden states stay in L2, and share each weight tile
MAX_SLICES = 16
# A slice is long enough for its partial states to stay under 1 % of its bfloat16 logits: 100 · 4 / 2 columns a word.
COLUMNS_PER_WORD = 200


def tiles_for(operands: Sequence[Tensor]) -> tuple[Tiles, bool]:
    """The tiles for matrices (.., D), and whether these are widened to float32 on load."""
    first = operands[0]
    if first.device.type == "cpu":
        return INTERPRETED, True
    regular = all(x.shape[1] % EVEN == 0 and aligned((x, x.stride(0))) for x in operands)
    if first.dtype in HALF and all(x.dtype == first.dtype for x in operands):
        return HALF_TILES.get(generation(first), HALF_TILES[8]) if regular else RAGGED_HALF_TILES, False
    return FLOAT_TILES if regular else RAGGED_FLOAT_TILES, True


def described_tiles(operands: Sequence[Tensor]) -> DescribedTiles | None:
    """The tiles for matrices (.., D) of half precision that tensor descriptors can load; None if they cannot.

    They need Hopper or newer, and rows at multiples of 16 bytes that do not overlap.
    """
    first = operands[0]
    fits = all(
        x.dtype == first.dtype
        and x.numel() > 0
        and x.data_ptr() % 16 == 0
        and x.stride(0) * x.element_size() % 16 == 0
        and x.shape[1] <= x.stride(0) < MAX_STRIDE // x.element_size()
        for x in operands
    )
    if not fits:
        return None
    if first.device.type == "cpu":
        return INTERPRETED_DESCRIBED
    return DESCRIBED_TILES.get(generation(first)) if first.dtype in HALF else None


def sweep_tile(
    operands: Sequence[Tensor], *, padded: int, direction: bool, bias: bool, labelled: bool, top: bool
) -> tuple[Tile, bool, bool]:
    """The tile for a first sweep, whether to widen, and whether to load by descriptors.

    By what a program holds: ``padded`` rows of a sketch, a second product, a bias, labels and more than their loss, the
    largest logit's index.
    """
    (plain, widen), described = tiles_for(operands), described_tiles(operands)
    if padded > 32:
        return (described or plain).wide, widen, described is not None
    if described is None:
        if padded or direction or (bias and top):
            return plain.more, widen, False
        return plain.labelled if labelled else plain.logits, widen, False
    if padded or direction:
        return described.most if padded and direction else described.more, widen, True
    if bias:
        return described.biased, widen, True
    return described.narrow if operands[0].shape[1] <= NARROW else described.broad, widen, True


def mix_tile(operands: Sequence[Tensor], *, bias: bool) -> tuple[Tile, bool, bool]:
    """As ``sweep_tile``, for the second sweep of the models whose hidden states and weights these are."""
    (plain, widen), described = tiles_for(operands), described_tiles(operands)
    if described is None or len(operands) != 4:
        return plain.more, widen, False
    return described.biased_pair if bias else described.pair, widen, True


def last_first(tile: Tile, hidden: Tensor, widen: bool) -> bool:
    """Whether ``head_sweep.total`` begins along a tile's last axis: where a thread may hold no two of the first."""
    return widen or (generation(hidden) >= 10 and tile.m >= BLACKWELL_ROWS)


def slices(classes: int, tile: Tile, words: int) -> tuple[int, int]:
    """How many slices the vocabulary is cut into, and how many tiles each has: from the shape alone."""
    most = max(1, min(MAX_SLICES, classes // (COLUMNS_PER_WORD * words)))
    tiles = ceil_div(classes, tile.n)
    per_slice = ceil_div(tiles, most)
    return ceil_div(tiles, per_slice), per_slice
