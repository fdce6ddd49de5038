"""TIFF: pictures written by hand and by Pillow, and what strangers' tags cannot do."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
import pytest

from assay.corpus.errors import BadRow
from assay.corpus.images import ImageLimits, decode_image, image_facts
from assay.corpus.tiff import TiffError, bare_tiff

Image = pytest.importorskip("PIL.Image")
LIMITS = ImageLimits(pixels=10_000, bytes=1_000_000)
COLOURS = np.random.default_rng(0).integers(0, 256, (20, 33, 3), dtype=np.uint8)
HEIGHT, WIDTH = COLOURS.shape[:2]
LONG, SHORT = 4, 3


def tiff(pieces: list[bytes], order: str = "<", tiled: bool = False, **tags: Any) -> bytes:
    """By hand: 20 × 33 pixels in RGB, with these strips or tiles; ``t273=…`` replaces a tag, None leaves it out."""
    body, offsets = bytearray((b"II*\0" if order == "<" else b"MM\0*") + bytes(4)), []
    for piece in pieces:
        offsets.append(len(body))
        body += piece
    values: dict[int, Any] = {256: WIDTH, 257: HEIGHT, 258: [8, 8, 8], 259: 1, 262: 2, 277: 3}
    values |= {324: offsets, 325: [len(p) for p in pieces]} if tiled else {273: offsets, 279: [len(p) for p in pieces]}
    values |= {int(name[1:]): value for name, value in tags.items()}
    entries = b""
    for tag, value in sorted((tag, value) for tag, value in values.items() if value is not None):
        kind, numbers = LONG, value if isinstance(value, list) else [value]
        raw = value[2] if isinstance(value, tuple) else struct.pack(f"{order}{len(numbers)}I", *numbers)
        kind, count = value[:2] if isinstance(value, tuple) else (kind, len(numbers))
        if len(raw) > 4:
            body += raw
            raw = struct.pack(f"{order}I", len(body) - len(raw))
        entries += struct.pack(f"{order}HHI", tag, kind, count) + raw.ljust(4, b"\0")
    body[4:8] = struct.pack(f"{order}I", len(body))
    return bytes(body) + struct.pack(f"{order}H", len(entries) // 12) + entries + bytes(4)


def decoded(data: bytes) -> Any:
    return np.asarray(decode_image("x", data, LIMITS))


def reason(data: bytes) -> str:
    with pytest.raises(BadRow) as caught:
        decoded(data)
    return str(caught.value)


def strips(rows: int = 7) -> list[bytes]:
    return [COLOURS[i : i + rows].tobytes() for i in range(0, HEIGHT, rows)]


@pytest.mark.parametrize("order", ["<", ">"])
def test_strips_tiles_and_planes_are_the_pixels_that_were_written(order: str) -> None:
    np.testing.assert_array_equal(decoded(tiff(strips(), order, t278=7)), COLOURS)
    np.testing.assert_array_equal(decoded(tiff([COLOURS.tobytes()], order)), COLOURS)
    for rows in (2**32 - 1, 10**6):
        np.testing.assert_array_equal(decoded(tiff([COLOURS.tobytes()], order, t278=rows)), COLOURS)
    padded = np.pad(COLOURS, ((0, 12), (0, 15), (0, 0)))
    tiles = [padded[i : i + 16, j : j + 16].tobytes() for i in (0, 16) for j in (0, 16, 32)]
    np.testing.assert_array_equal(decoded(tiff(tiles, order, tiled=True, t322=16, t323=16)), COLOURS)
    planes = [COLOURS[:, :, c].tobytes() for c in range(3)]
    np.testing.assert_array_equal(decoded(tiff(planes, order, t284=2)), COLOURS)
    wide = (COLOURS.astype(np.uint16) * 256 + 77).astype(f"{order}u2").tobytes()
    np.testing.assert_array_equal(decoded(tiff([wide], order, t258=[16, 16, 16])), COLOURS)


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_deflate", "tiff_adobe_deflate", "packbits", "jpeg"])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK"])
def test_what_libtiff_unpacks_is_what_pillow_makes_of_it(compression: str, mode: str) -> None:
    if (compression, mode) == ("jpeg", "P"):
        mode = "L"
    file = io.BytesIO()
    Image.fromarray(COLOURS).convert(mode).save(file, "TIFF", compression=compression)
    expected = np.asarray(Image.open(io.BytesIO(file.getvalue())).convert("RGB"))
    np.testing.assert_array_equal(decoded(file.getvalue()), expected)
    half = file.getvalue()[: len(file.getvalue()) // 2]
    assert "TIFF" in reason(half)


@pytest.mark.parametrize("compression", ["group3", "group4"])
def test_faxes(compression: str) -> None:
    file = io.BytesIO()
    image = Image.fromarray(COLOURS).convert("1")
    image.save(file, "TIFF", compression=compression)
    np.testing.assert_array_equal(decoded(file.getvalue())[:, :, 0] > 0, np.asarray(image))


def test_facts_are_read_off_the_first_picture() -> None:
    file = io.BytesIO()
    Image.fromarray(COLOURS).save(file, "TIFF", save_all=True, append_images=[Image.new("RGB", (500, 400))])
    assert image_facts("x", file.getvalue()) == ("TIFF", WIDTH, HEIGHT)
    np.testing.assert_array_equal(decoded(file.getvalue()), COLOURS)


WHOLE = [COLOURS.tobytes()]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"II*\0", "cut short"),
        (b"II*\0\x08\0\0\0\0\0", "it has no directory"),
        (b"II+\0" + bytes(12), "a BigTIFF"),
        (tiff(WHOLE, t256=70_000, t257=70_000), "of 70,000 × 70,000 pixels, more than 10,000; the limit is the task's"),
        (tiff(WHOLE, t257=0), "which is no image"),
        (tiff(WHOLE, t257=None), "tag 257 has 0 values"),
        (tiff(WHOLE, t257=[20, 20]), "tag 257 has 2 values"),
        (tiff(WHOLE, t257=(2, 4, b"20\0\0")), "tag 257 holds no numbers"),
        (tiff(WHOLE, t258=(SHORT, 10**9, b"\x08\0\x08\0")), "tag 258 is there twice, or leads nowhere"),
        (tiff(WHOLE, t320=[0] * 20_000), "tag 320 has 80,000 bytes"),
        (tiff(WHOLE, t273=[8] * 70_000, t279=[1] * 70_000), "tag 273 has 280,000 bytes"),
        (tiff(WHOLE, t273=[8, 8]), "2 pieces of 1 sizes, expected 1"),
        (tiff(strips()[:2], t278=7), "2 pieces of 2 sizes, expected 3"),
        (tiff(WHOLE, t273=0), "pieces that are left out"),
        (tiff(WHOLE, t279=0), "pieces that are left out"),
        (tiff(WHOLE, t279=10**6), "cut short"),
        (tiff(WHOLE, tiled=True, t322=1 << 16, t323=1 << 16), "in tiles of 65,536 × 65,536 pixels"),
        (tiff(WHOLE, tiled=True, t322=0, t323=16), "in tiles of 0 × 16 pixels"),
        (tiff(WHOLE, t259=34661), "compressed by method 34661"),
        (tiff(WHOLE, t259=6), "compressed by method 6"),
        (tiff(WHOLE, t258=[32] * 3), r"of [32] bits in the format [1]"),
        (tiff(WHOLE, t258=[8, 8, 16]), r"of [8, 16] bits"),
        (tiff(WHOLE, t339=[3, 3, 3]), r"in the format [3]"),
        (tiff(WHOLE, t277=60_000), "60000 samples a pixel"),
        (tiff(WHOLE, t262=8), "of colours 8"),
        (tiff(WHOLE, t262=6), "of colours 6"),
        (tiff(WHOLE, t262=0, t258=16, t277=1), "of colours 0"),
        (tiff(WHOLE, t284=3, t262=1), "no TIFF that can be decoded"),
    ],
)
def test_what_is_not_read_says_why(data: bytes, said: str) -> None:
    assert said in reason(data)


def test_nothing_of_a_tiff_is_left_but_what_its_pixels_need() -> None:
    """A directory of EXIF that asks for much, further pictures and broken metadata are never looked at."""
    data = tiff(WHOLE, t34665=10**9, t700=(1, 2**31, b"\0\0\0\0"), t34675=(7, 2**31, b"\xff\xff\xff\xff"))
    bare = bare_tiff(data, 10_000)
    assert list(entries_of(bare)) == [256, 257, 258, 259, 262, 273, 277, 278, 279]
    assert bare.endswith(bytes(4))
    np.testing.assert_array_equal(decoded(data), COLOURS)


def entries_of(data: bytes) -> dict[int, int]:
    """A directory's tags, and what stands in the place of their values."""
    (start,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, start)
    assert start + 2 + 12 * count + 4 == len(data)
    return {tag: value for tag, _, _, value in struct.iter_unpack("<HHII", data[start + 2 : -4])}


@pytest.mark.parametrize("rows", [2**32 - 1, 20_000_000, None])
def test_a_strip_has_no_more_rows_than_the_picture(rows: int | None) -> None:
    """A reader that takes a file at its word makes room for all of them."""
    assert entries_of(bare_tiff(tiff(WHOLE, t278=rows), 10_000))[278] == HEIGHT


def test_random_tags_are_an_error_or_a_tiff() -> None:
    rng, whole = np.random.default_rng(1), tiff(strips(), t278=7)
    directory = whole.index(struct.pack("<HHI", 256, LONG, 1)) - 2
    read = 0
    for _ in range(300):
        data = bytearray(whole)
        for place in rng.integers(directory, len(data), 2):
            data[place] = rng.integers(256)
        try:
            bare_tiff(bytes(data), 10_000)
        except TiffError:
            continue
        try:
            found = decoded(bytes(data))
        except BadRow:
            continue
        read += 1
        assert found.shape[0] * found.shape[1] <= LIMITS.pixels
    assert read
