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
    more: Tile  # beside it a second product, up to 32 rows of a sketch (or both), or the mixture's two sums
    wide: Tile  # beside it up to 128 rows of a sketch
    gradient: Tile  # residual times weight


# The largest tiles that no supported Triton spills (tests/kernels): what a product reads falls as its tile grows. Not
# yet tuned on a card. Half precision runs on tensor cores; an unlisted generation gets Ampere's tiles, which stay under
# the 99 KB of shared memory that Ada has.
HALF_TILES = {
    8: Tiles(Tile(128, 128, 32, 8, 4), Tile(128, 64, 32, 8, 4), Tile(64, 32, 32, 8, 4), Tile(128, 128, 32, 8, 4)),
    9: Tiles(Tile(128, 128, 64, 8, 3), Tile(128, 64, 64, 8, 3), Tile(64, 64, 64, 8, 3), Tile(128, 128, 64, 8, 3)),
    10: Tiles(Tile(128, 128, 64, 8, 3), Tile(128, 64, 64, 8, 3), Tile(64, 64, 64, 8, 3), Tile(128, 128, 64, 8, 3)),
}
# float32 runs on the ordinary units, a register per operand.
FLOAT_TILES = Tiles(Tile(128, 64, 16, 8, 3), Tile(64, 64, 16, 8, 3), Tile(32, 32, 16, 8, 3), Tile(64, 64, 16, 4, 3))
# Rows that start at any address are loaded element by element, which takes more registers.
RAGGED_HALF_TILES = Tiles(
    Tile(64, 64, 32, 8, 3), Tile(64, 32, 32, 8, 3), Tile(32, 32, 32, 8, 3), Tile(64, 64, 32, 4, 3)
)
RAGGED_FLOAT_TILES = Tiles(
    Tile(32, 64, 16, 4, 3), Tile(64, 64, 16, 8, 3), Tile(32, 32, 16, 8, 3), Tile(32, 64, 16, 4, 3)
)
# Under the interpreter: small, so that small tests cross every edge.
INTERPRETED = Tiles(*[Tile(16, 32, 16, 4, 1)] * 4)
EVEN = 64  # a row is whole steps of every tile above
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


def slices(classes: int, tile: Tile, words: int) -> tuple[int, int]:
    """How many slices the vocabulary is cut into, and how many tiles each has: from the shape alone."""
    most = max(1, min(MAX_SLICES, classes // (COLUMNS_PER_WORD * words)))
    tiles = ceil_div(classes, tile.n)
    per_slice = ceil_div(tiles, most)
    return ceil_div(tiles, per_slice), per_slice
