"""Sketches: random projections that keep inner products, E⟨s(x), s(y)⟩ = ⟨x, y⟩, generated where they are needed.

A sketch is data: which projection, not its numbers. Every random bit is a pure function of (seed, layer name,
coordinate) through Philox4x32-10 (``ops/philox.py``), so that a projection is the same on every backend, for every
batch, device and number of threads, and nothing of size D × k is ever stored. Stored sketches stay readable only as
long as no definition below changes; tests pin their bits.

The fourth word of a counter says what its bits are for: 0, 1 a Kronecker's output and input side, 2 Sparse,
3 Rademacher, 4, 5 a Mask's output and input side, 6 a Mask of flat vectors.
"""

from __future__ import annotations

import math
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from assay.ops._tensors import check_int
from assay.ops.philox import make_key, philox4x32

if TYPE_CHECKING:
    from typing_extensions import Self

OUTPUT_SIDE, INPUT_SIDE, SPARSE, RADEMACHER, MASK_OUTPUT, MASK_INPUT, MASK_FLAT = range(7)
_BITS = 128  # of one Philox block

# The matrix that projects one side of a gradient is held whole: rows × features of the layer, float32.
FACTOR_BYTES = 1 << 30
# Such matrices are kept from batch to batch; making them anew would cost more than the products they serve.
CACHE_BYTES = 256 << 20
# ... at least so much, or on a GPU this share of its memory.
GPU_SHARE = 32


class _Keyed:
    """What all sketches have: a key that follows from ``seed`` and ``name``."""

    seed: int
    name: str
    _key: tuple[int, int]  # set when constructed: torch.compile cannot trace the hash

    @property
    def key(self) -> tuple[int, int]:
        """The Philox key of (seed, name)."""
        return self._key

    def named(self, name: str) -> Self:
        """The same sketch for the layer called ``name``."""
        return replace(self, name=name)  # type: ignore[type-var]

    def _check(self, **limits: tuple[int, int]) -> None:
        """ValueError unless each field lies in [low, high), TypeError unless it is an int."""
        for field in (*limits, "seed"):
            what = "a 64-bit integer" if field == "seed" else "an int"
            number = check_int(f"{type(self).__name__}: {field}", getattr(self, field), what=what)
            object.__setattr__(self, field, number)
        if not isinstance(self.name, str):
            raise TypeError(f"{type(self).__name__}: name must be a string, got {self.name!r}")
        for field, (low, high) in limits.items():
            value = getattr(self, field)
            if value < low:
                raise ValueError(f"{type(self).__name__}: {field} must be at least {low}, got {value}")
            if value >= high:
                raise ValueError(f"{type(self).__name__}: {field} must be below {high}, got {value}")
        object.__setattr__(self, "_key", make_key(self.seed, self.name))


@dataclass(frozen=True)
class Kronecker(_Keyed):
    """Projects a gradient matrix Σ_t G_tᵀ A_t (O, I) from both sides: P_out (Σ_t G_tᵀ A_t) P_inᵀ, (rows, cols).

    P_out is (rows, O) with entries ±1/√rows, P_in is (cols, I) with entries ±1/√cols, so that
    E⟨s(x), s(y)⟩ = ⟨x, y⟩ (LoGra, 2405.13954, with random instead of learnt factors). Only the two factors of the
    gradient are projected; no matrix of the gradient's size, nor of size O·I × rows·cols, exists.

    The sign of entry (r, c) is bit r mod 32 of word ⌊r/32⌋ mod 4 of the Philox4x32-10 block at counter
    (c mod 2³², ⌊c/2³²⌋, ⌊r/128⌋, side), side 0 for P_out and 1 for P_in, under the key of (seed, name); a 1 is −1.

    Args:
        rows, cols: size of the sketch on the output and on the input side.
        seed: a 64-bit integer.
        name: of the layer that is sketched; layers of different names get independent projections.
    """

    rows: int
    cols: int
    seed: int = 0
    name: str = ""

    def __post_init__(self) -> None:
        self._check(rows=(1, 1 << 31), cols=(1, 1 << 31))

    @property
    def dim(self) -> int:
        """Numbers per sample and layer: rows · cols."""
        return self.rows * self.cols

    def output_side(self, features: int, device: torch.device | None = None) -> Tensor:
        """P_out, (rows, features) float32; the caller's own, made once and copied from then on."""
        return _own(self.rows, features, OUTPUT_SIDE, self.key, device)

    def input_side(self, features: int, device: torch.device | None = None) -> Tensor:
        """P_in, (cols, features) float32; the caller's own, made once and copied from then on."""
        return _own(self.cols, features, INPUT_SIDE, self.key, device)


@dataclass(frozen=True)
class Sparse(_Keyed):
    """Adds every coordinate, with a random sign, to ``nonzeros`` random ones of ``dim`` buckets, over √nonzeros.

    A count sketch for nonzeros = 1, a sparse Johnson-Lindenstrauss transform beyond (1012.1577): the cost of a
    projection does not grow with ``dim``, and little beyond reading the vectors once.

    Entry j of coordinate c: u = c · nonzeros + j, w = word u mod 4 of the Philox4x32-10 block at counter
    (⌊u/4⌋ mod 2³², ⌊u/4⌋ / 2³², 0, 2); bucket ⌊⌊w/2⌋ · dim / 2³¹⌋, sign −1 where w is odd.

    Args:
        dim: numbers per sample, below 2³¹.
        nonzeros: buckets per coordinate, drawn with replacement.
        seed, name: as in ``Kronecker``.
    """

    dim: int
    nonzeros: int = 1
    seed: int = 0
    name: str = ""

    def __post_init__(self) -> None:
        self._check(dim=(1, 1 << 31), nonzeros=(1, 1 << 16))


@dataclass(frozen=True)
class Rademacher(_Keyed):
    """A dense projection with entries ±1/√dim: the least variance for its size, at a cost that grows with it.

    The sign of entry (r, c), as in ``Kronecker``: bit r mod 32 of word ⌊r/32⌋ mod 4 of the Philox4x32-10 block at
    counter (c mod 2³², ⌊c/2³²⌋, ⌊r/128⌋, 3); a 1 is −1.

    Args:
        dim: numbers per sample.
        seed, name: as in ``Kronecker``.
    """

    dim: int
    seed: int = 0
    name: str = ""

    def __post_init__(self) -> None:
        self._check(dim=(1, 1 << 31))


@dataclass(frozen=True)
class Mask(_Keyed):
    """Keeps ``rows`` output and ``cols`` input features of each layer, then sketches what is left (GraSS, 2505.18976).

    Features are drawn without replacement: kept are those with the smallest word 0 of the Philox4x32-10 block at
    counter (c mod 2³², ⌊c/2³²⌋, 0, 4) for output and (…, 5) for input features, ties to the lower index, in the order
    of their indices. The gradient that is left is scaled by √(O/rows · I/cols). Of a layer with fewer features all are
    kept; without ``then`` their places are filled up with zeros. A flat vector keeps rows · cols of its D coordinates
    (counter (…, 6)), scaled by √(D/(rows · cols)).

    Args:
        rows, cols: features kept.
        then: a sketch of the masked gradient, whose coordinates are row by row those of a layer with the kept
            features; None: the masked gradient itself.
        seed, name: as in ``Kronecker``; ``named`` names ``then`` too.
    """

    rows: int
    cols: int
    then: Kronecker | Sparse | Rademacher | None = None
    seed: int = 0
    name: str = ""

    def __post_init__(self) -> None:
        self._check(rows=(1, 1 << 31), cols=(1, 1 << 31))
        if not isinstance(self.then, Kronecker | Sparse | Rademacher | None):
            raise TypeError(f"Mask: then must be Kronecker, Sparse, Rademacher or None, got {type(self.then).__name__}")

    @property
    def dim(self) -> int:
        """Numbers per sample and layer: those of ``then``, or rows · cols."""
        return self.then.dim if self.then is not None else self.rows * self.cols

    def named(self, name: str) -> Self:
        """The same sketch for the layer called ``name``."""
        return replace(self, name=name, then=None if self.then is None else self.then.named(name))


Sketch = Kronecker | Sparse | Rademacher | Mask


def signs(
    size: int, features: int, side: int, key: tuple[int, int], device: torch.device | None = None, first: int = 0
) -> Tensor:
    """A matrix of signs under its key: (size, features) float32 with entries ±1/√size, columns from ``first`` on."""
    c = torch.arange(first, first + features, device=device)
    low, high, sides = c & 0xFFFFFFFF, c >> 32, torch.full_like(c, side)
    out = torch.empty(size, features, device=device)
    for row in range(size):
        if row % _BITS == 0:
            words = philox4x32((low, high, torch.full_like(c, row // _BITS), sides), key).unbind(-1)
        out[row] = 1 - 2 * (words[row % _BITS // 32] >> row % 32 & 1)
    return out.div_(math.sqrt(size))


def buckets(
    coordinates: int, dim: int, nonzeros: int, key: tuple[int, int], device: torch.device | None = None, first: int = 0
) -> tuple[Tensor, Tensor]:
    """A ``Sparse`` sketch's entries, coordinates from ``first`` on: buckets and signs, (coordinates, nonzeros)."""
    u = torch.arange(first * nonzeros, (first + coordinates) * nonzeros, device=device)
    block, zero = u >> 2, torch.zeros_like(u)
    words = philox4x32((block & 0xFFFFFFFF, block >> 32, zero, torch.full_like(u, SPARSE)), key)
    w = words.gather(-1, (u & 3)[:, None])[:, 0]
    return ((w >> 1) * dim >> 31).view(-1, nonzeros), (1 - 2 * (w & 1)).view(-1, nonzeros)


def factor(
    size: int,
    features: int,
    side: int,
    key: tuple[int, int],
    device: torch.device,
    layout: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """``signs``, kept for the next batch, in a layout of the backend's liking. Not to be written to."""

    def make() -> Tensor:
        matrix = signs(size, features, side, key, device)
        return matrix if layout is None else layout(matrix)

    return cached(("factor", key, side, size, features, layout), device, make)


def _own(size: int, features: int, side: int, key: tuple[int, int], device: torch.device | None) -> Tensor:
    """A copy of ``factor``; where a graph is traced, which can't look into a cache, what it holds is made in it."""
    if torch.compiler.is_compiling():
        return signs(size, features, side, key, device)
    return factor(size, features, side, key, torch.empty(0, device=device).device).clone()


@dataclass
class _Entry:
    tensor: Tensor
    pinned: bool = False  # a captured graph reads it, and may be replayed at any time


_held: OrderedDict[object, _Entry] = OrderedDict()
_held_bytes: Counter[torch.device] = Counter()
_lock = threading.Lock()


def cached(key: object, device: torch.device, make: Callable[[], Tensor]) -> Tensor:
    """A tensor on ``device`` out of the ones used last, or made: entries of a sketch that serve every batch.

    On a GPU one tensor serves all streams. What is to be held is waited for, once, so that whoever finds it may read
    it; and a reader on another stream is noted, so that its memory is not given away before that stream is done. A
    graph that is being captured reads what is held, which then stays: up to half of the memory that the cache may take,
    beyond which, as for what was never made before, the graph makes its own each time it is replayed.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            return _cached_on_gpu((key, torch.cuda.current_device()), make)
    with _lock:
        if key in _held:
            _held.move_to_end(key)
            return _held[key].tensor
    made = make()
    with _lock:
        _hold(key, made)
    return made


def _cached_on_gpu(key: object, make: Callable[[], Tensor]) -> Tensor:
    """The same on the current device."""
    stream, capturing = torch.cuda.current_stream(), torch.cuda.is_current_stream_capturing()
    with _lock:
        found = _held.get(key)
        if found is not None:
            _held.move_to_end(key)
            if not capturing:
                found.tensor.record_stream(stream)
                return found.tensor
            if found.pinned or _pinned_bytes(found.tensor.device) + found.tensor.nbytes <= _budget(stream) // 2:
                found.pinned = True
                return found.tensor
    made = make()
    if not capturing and made.nbytes <= _budget(stream):
        stream.synchronize()
        with _lock:
            _hold(key, made, _budget(stream))
    return made


def _hold(key: object, made: Tensor, budget: int | None = None) -> None:
    """Keep ``made``, and drop what was used longest ago on its device until ``budget`` holds all that is there."""
    budget = CACHE_BYTES if budget is None else budget
    if key in _held or made.nbytes > budget:  # another thread was faster
        return
    _held[key] = _Entry(made)
    _held_bytes[made.device] += made.nbytes
    while _held_bytes[made.device] > budget:
        loose = (k for k, entry in _held.items() if entry.tensor.device == made.device and not entry.pinned)
        if (oldest := next(loose, None)) is None:
            return
        _held_bytes[made.device] -= _held.pop(oldest).tensor.nbytes


def _pinned_bytes(device: torch.device) -> int:
    return sum(e.tensor.nbytes for e in _held.values() if e.tensor.device == device and e.pinned)


def _budget(stream: torch.cuda.Stream) -> int:
    """What a GPU keeps: of large models with wide sketches, the signs of all layers."""
    return max(CACHE_BYTES, torch.cuda.get_device_properties(stream.device).total_memory // GPU_SHARE)
