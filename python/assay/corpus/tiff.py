"""TIFF, looked at before Pillow and its libtiff see it: the tags of the first picture, and no others.

A TIFF is a web of offsets into itself: a file of a few bytes may ask for a strip of 2 GiB whatever its size in pixels,
name its strips a million times over, or lead to directories that are never shown. So the first directory is read here,
what it says of the pixels is checked, and a new one with only that is written behind the file's bytes, in place of all
directories there are.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass

WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, OFFSETS, SAMPLES = 256, 257, 258, 259, 262, 273, 277
ROWS, COUNTS, PLANES, PREDICTOR, COLOURS = 278, 279, 284, 317, 320
TILE_WIDTH, TILE_HEIGHT, TILE_OFFSETS, TILE_COUNTS, FORMAT, TABLES = 322, 323, 324, 325, 339, 347
# Fill order, orientation, options of fax codes, extra samples, how YCbCr is sampled: what else decides a pixel.
_OTHERS = (266, 274, 292, 293, 338, 530, 532)
_KEPT = {
    *(WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, OFFSETS, SAMPLES, ROWS, COUNTS, PLANES, PREDICTOR, COLOURS),
    *(TILE_WIDTH, TILE_HEIGHT, TILE_OFFSETS, TILE_COUNTS, FORMAT, TABLES, *_OTHERS),
}
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8}
_LETTERS = {1: "B", 3: "H", 4: "I"}
_LONG = 4
_JPEG, _YCBCR = 7, 6
# None, fax groups 3 and 4, LZW, JPEG, Deflate under its two numbers, PackBits.
_COMPRESSIONS = {1, 3, 4, 5, _JPEG, 8, 32946, 32773}
_PHOTOMETRIC = {0, 1, 2, 3, 5, _YCBCR}  # grey from white or black, RGB, palette, CMYK, YCbCr
_MOST_SAMPLES = 6
_MOST_TAGS = 1 << 10
_MOST_DATA = 1 << 16  # of a tag that lists no strips
_MOST_PIECES = 1 << 16
_LEAST_TILE = 1 << 22  # a tile of so many pixels is none too large, however small the picture


class TiffError(ValueError):
    """What is wrong with it, to go behind its name."""


@dataclass(frozen=True)
class _Entry:
    kind: int
    count: int
    raw: bytes
    """Its twelve bytes."""
    data: bytes
    """Its values' bytes."""


def bare_tiff(data: bytes, most_pixels: int) -> bytes:
    """The first picture of a TIFF, of at most ``most_pixels`` pixels, as a TIFF with no directory and no tag but those
    that its pixels need. TiffError if it is none that is read here."""
    entries, order = _first_directory(data)
    tags = {tag: struct.unpack(f"{order}{e.count}{_LETTERS[e.kind]}", e.data) for tag, e in _numbers(entries).items()}
    width, height = _one(tags, WIDTH), _one(tags, HEIGHT)
    if not width or not height:
        raise TiffError(f"of {width} × {height} pixels, which is no image")
    if width * height > most_pixels:
        raise TiffError(
            f"of {width:,} × {height:,} pixels, more than {most_pixels:,}; the limit is the task's max_pixels"
        )
    _check_pixels(tags)
    rows = _check_pieces(tags, width, height, len(data))
    kept = {tag: entry.raw for tag, entry in entries.items() if tag in _KEPT}
    if rows is not None:
        kept[ROWS] = struct.pack(f"{order}HHII", ROWS, _LONG, 1, rows)
    body = data + b"\0" * (len(data) % 2)
    table = b"".join(kept[tag] for tag in sorted(kept))
    directory = struct.pack(f"{order}H", len(kept)) + table + bytes(4)
    return data[:4] + struct.pack(f"{order}I", len(body)) + body[8:] + directory


def _first_directory(data: bytes) -> tuple[dict[int, _Entry], str]:
    """The entries of the first picture by their tags, and the order of bytes as `struct` has it."""
    order = "<" if data[:2] == b"II" else ">"
    if data[2:4] in (b"+\0", b"\0+"):
        raise TiffError("a BigTIFF, which is not read here")
    try:
        (start,) = struct.unpack_from(f"{order}I", data, 4)
        (count,) = struct.unpack_from(f"{order}H", data, start)
        if start < 8 or not 0 < count <= _MOST_TAGS:
            raise TiffError("damaged: it has no directory")
        entries: dict[int, _Entry] = {}
        for place in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, number = struct.unpack_from(f"{order}HHI", data, place)
            if tag not in _KEPT:
                continue
            size = _SIZES.get(kind, 0) * number
            (at,) = (place + 8,) if size <= 4 else struct.unpack_from(f"{order}I", data, place + 8)
            if tag in entries or not size or at + size > len(data) or len(data) < place + 12:
                raise TiffError(f"damaged: its tag {tag} is there twice, or leads nowhere")
            entries[tag] = _Entry(kind, number, data[place : place + 12], data[at : at + size])
    except struct.error as error:
        raise TiffError("cut short") from error
    return entries, order


def _numbers(entries: Mapping[int, _Entry]) -> dict[int, _Entry]:
    """The entries that hold numbers; all that are looked at must."""
    pieces = {OFFSETS, COUNTS, TILE_OFFSETS, TILE_COUNTS}
    for tag, entry in entries.items():
        if len(entry.data) > (_MOST_DATA if tag not in pieces else _MOST_PIECES * _SIZES[entry.kind]):
            raise TiffError(f"damaged: its tag {tag} has {len(entry.data):,} bytes")
        if tag not in (TABLES, *_OTHERS) and entry.kind not in _LETTERS:
            raise TiffError(f"damaged: its tag {tag} holds no numbers")
    return {tag: entry for tag, entry in entries.items() if entry.kind in _LETTERS}


def _one(tags: Mapping[int, tuple[int, ...]], tag: int, default: int | None = None) -> int:
    values = tags.get(tag, () if default is None else (default,))
    if len(values) != 1:
        raise TiffError(f"damaged: its tag {tag} has {len(values)} values, expected one")
    return values[0]


def _check_pixels(tags: Mapping[int, tuple[int, ...]]) -> None:
    """TiffError for what Pillow does not read, or reads as something else."""
    bits, formats = set(tags.get(BITS, (1,))), set(tags.get(FORMAT, (1,)))
    compression, photometric = _one(tags, COMPRESSION, 1), _one(tags, PHOTOMETRIC)
    if compression not in _COMPRESSIONS:
        raise TiffError(f"compressed by method {compression}, which is not read here; save it uncompressed or as LZW")
    if len(bits) != 1 or not bits < {1, 2, 4, 8, 16} or formats != {1}:
        raise TiffError(
            f"of {sorted(bits)} bits in the format {sorted(formats)}; expected 8 or 16 bits, without a sign"
        )
    if _one(tags, SAMPLES, 1) > _MOST_SAMPLES:
        raise TiffError(f"of {_one(tags, SAMPLES)} samples a pixel; expected grey, RGB, CMYK or a palette")
    known = photometric in _PHOTOMETRIC and (photometric != _YCBCR or compression == _JPEG)
    if not known or (photometric == 0 and bits == {16}):  # Pillow would not turn such greys round
        raise TiffError(f"of colours {photometric}, which are not read here; save it as grey or RGB")


def _check_pieces(tags: Mapping[int, tuple[int, ...]], width: int, height: int, size: int) -> int | None:
    """The strips or tiles cover the picture once, are in the file and ask for no more memory than it. The rows of a
    strip, no more than there are; None of tiles."""
    planes = _one(tags, SAMPLES, 1) if _one(tags, PLANES, 1) == 2 else 1
    rows = None
    if TILE_OFFSETS in tags:
        across, down = _one(tags, TILE_WIDTH), _one(tags, TILE_HEIGHT)
        if OFFSETS in tags or not 0 < across * down <= max(width * height, _LEAST_TILE):
            raise TiffError(f"in tiles of {across:,} × {down:,} pixels, which is more than it can be")
        offsets, counts = tags[TILE_OFFSETS], tags.get(TILE_COUNTS, ())
        wanted = -(-width // across) * -(-height // down) * planes
    else:
        rows = min(_one(tags, ROWS, height), height) or height
        offsets, counts = tags.get(OFFSETS, ()), tags.get(COUNTS, ())
        wanted = -(-height // rows) * planes
    if len(offsets) != wanted or len(counts) != wanted:
        raise TiffError(f"damaged: {len(offsets):,} pieces of {len(counts):,} sizes, expected {wanted:,}")
    if any(at < 8 or not own or at + own > size for at, own in zip(offsets, counts, strict=True)):
        raise TiffError("cut short, or has pieces that are left out")
    return rows
