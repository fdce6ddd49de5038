"""Images: what they become, and what strangers' bytes cannot do."""

from __future__ import annotations

import errno
import io
import re
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from assay.corpus.arrow_values import values_of
from assay.corpus.errors import BadRow, ShardError
from assay.corpus.images import Beside, ImageLimits, decode_image
from assay.corpus.storage import Store

Image = pytest.importorskip("PIL.Image")
ImageOps = pytest.importorskip("PIL.ImageOps")
LIMITS = ImageLimits(pixels=10_000, bytes=100_000)
RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)


def saved(image: Any, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def decoded(value: object, beside: Beside | None = None, limits: ImageLimits = LIMITS) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return np.asarray(decode_image("image", value, limits, beside))


def reason(value: object, beside: Beside | None = None) -> str:
    with pytest.raises(BadRow) as caught:
        decoded(value, beside)
    return str(caught.value)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "JPEG", "WEBP", "TIFF", "PPM"])
@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "LA", "CMYK"])
def test_every_format_and_mode_is_what_pillow_makes_of_it_in_rgb(kind: str, mode: str) -> None:
    image = Image.fromarray(COLOURS).convert(mode)
    try:
        data = saved(image, kind)
    except (OSError, ValueError):
        pytest.skip("the format has no such mode")
    found = decoded(data)
    assert (found.shape, found.dtype) == ((6, 9, 3), np.uint8)
    np.testing.assert_array_equal(found, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_a_palette_with_opacities_drops_them() -> None:
    image = Image.fromarray(COLOURS).quantize(16)
    data = saved(image, "PNG", transparency=bytes(range(0, 160, 10)))
    np.testing.assert_array_equal(decoded(data), np.asarray(image.convert("RGB")))


def test_sixteen_bits_keep_the_higher_eight() -> None:
    grey = np.array([[0, 255, 256, 65535], [300, 32768, 65280, 1]], np.uint16)
    for kind in ("PNG", "TIFF", "PPM"):
        data = saved(Image.fromarray(grey), kind)
        assert Image.open(io.BytesIO(data)).mode.startswith("I")
        np.testing.assert_array_equal(decoded(data)[:, :, 0], grey >> 8)


def test_an_animation_is_its_first_frame() -> None:
    frames = [Image.new("RGB", (5, 4), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        data = saved(
            frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
        )
        assert decoded(data)[0, 0].tolist() == [255, 0, 0], kind


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientation_is_applied(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(Image.fromarray(COLOURS), kind, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(decoded(data), np.asarray(expected.convert("RGB")))


def test_broken_metadata_is_no_fault_of_the_pixels() -> None:
    data = saved(Image.fromarray(COLOURS), "PNG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff" + bytes(9))
    np.testing.assert_array_equal(decoded(data), COLOURS)


def test_pixels_as_numbers() -> None:
    np.testing.assert_array_equal(decoded(COLOURS.tolist()), COLOURS)
    np.testing.assert_array_equal(decoded(COLOURS), COLOURS)
    grey = COLOURS[:, :, 0]
    for pixels in (grey, grey[:, :, None], grey.astype(np.int64).tolist()):
        np.testing.assert_array_equal(decoded(pixels), np.repeat(grey[:, :, None], 3, 2))
    np.testing.assert_array_equal(decoded(np.dstack([COLOURS, grey])), COLOURS)


def test_pixels_as_arrow_tensors() -> None:
    tensors = np.stack([COLOURS, COLOURS[::-1]])
    array = pa.FixedShapeTensorArray.from_numpy_ndarray(tensors)
    faults: dict[int, str] = {}
    for value, pixels in zip(values_of(pa.field("image", array.type), array, faults), tensors, strict=True):
        np.testing.assert_array_equal(decoded(value), pixels)
    assert not faults


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([[1, 2], [3]], "ragged"),
        ([1, 2, 3], r"has the shape \(3,\)"),
        ([[[1, 2]]], r"\(1, 1, 2\)"),
        ([[0.5, 1]], "integers"),
        ([[300, 1]], "integers"),
        ([[-1, 1]], "integers"),
        ([[None, 1]], "integers"),
        ([["a", "b"]], "integers"),
        ([[]], "no image"),
        (np.zeros((200, 200), np.uint8), "200 × 200 pixels, more than 10,000; the limit is the task's max_pixels"),
        (None, "is null"),
        (3, "is of type int"),
        (b"", "is empty"),
        (b"some text", "no image that is read here; expected PNG, JPEG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%touch x) (w) file\n", "no image"),
        (b"\x89PNG\r\n\x1a\n", "no PNG that can be decoded"),
        (b"RIFF\x10\0\0\0WEBPVP8 ", "no WEBP that can be decoded"),
        (b"BM" + bytes(60), "no BMP that can be decoded"),
        (b"P6 2 1 255\n" + bytes(5), "no PNM that can be decoded"),
        (b"P5 2 1 15\n" + bytes(2), "a PNM whose highest value is neither 255 nor 65,535"),
        (b"P3 1 1 255\n1 2 3\n", "no image"),
        (b"Pf 1 1 1\n" + bytes(4), "no image"),
        ({"bytes": None, "path": None}, "neither bytes nor a path"),
        ({"bytes": "text", "path": None}, "image.bytes is of type str"),
        ({"colour": 1}, "only 'colour'"),
        (b"x" * 100_001, "more than 100,000 bytes; the limit is the task's max_bytes"),
        (b"\xff\xd8\xff" + 501 * b"\xff\xda", "501 scans"),
    ],
)
def test_what_is_no_image_says_so(value: object, said: str) -> None:
    assert re.search(said, reason(value))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "WEBP", "PPM"])
def test_truncated_files_are_bad_rows(kind: str) -> None:
    data = saved(Image.fromarray(np.repeat(np.repeat(COLOURS, 8, 0), 8, 1)), kind)
    for share in (0.2, 0.5, 0.8):
        assert f"no {'PNM' if kind == 'PPM' else kind} that can be decoded" in reason(data[: int(len(data) * share)])


def png(width: int, height: int, body: bytes) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


def test_a_decompression_bomb_is_refused_by_its_header() -> None:
    assert "100,000 × 100,000 pixels" in reason(png(100_000, 100_000, bytes(1000)))
    small = ImageLimits(pixels=53, bytes=10_000)
    with pytest.raises(BadRow, match="9 × 6 pixels, more than 53"):
        decoded(saved(Image.fromarray(COLOURS), "PNG"), limits=small)
    assert decoded(saved(Image.fromarray(COLOURS), "PNG"), limits=ImageLimits(54, 10_000)).shape == (6, 9, 3)


def test_random_damage_is_a_bad_row_or_an_image() -> None:
    for kind in ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM"):
        data = bytearray(saved(Image.fromarray(COLOURS), kind))
        for _ in range(60):
            copy = bytearray(data)
            for place in RNG.integers(2, len(copy), 3):
                copy[place] = RNG.integers(256)
            try:
                found = decoded(bytes(copy))
            except BadRow:
                continue
            assert found.dtype == np.uint8
            assert found.shape[0] * found.shape[1] <= LIMITS.pixels


def test_paths_lead_to_files_of_the_corpus_and_no_others(tmp_path: Path) -> None:
    data = saved(Image.fromarray(COLOURS), "PNG")
    corpus = tmp_path / "corpus"
    for place in ("corpus/part/images/a.png", "corpus/b.png", "secret.png", "corpus2/c.png"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_bytes(data)
    (corpus / "link").symlink_to(tmp_path)
    (corpus / "inner").symlink_to(corpus / "part")
    beside = Beside(Store.at(str(corpus)), "part")
    for path in ("images/a.png", "./images/a.png", "../b.png", "../inner/images/a.png"):
        np.testing.assert_array_equal(decoded(path, beside), COLOURS)
        np.testing.assert_array_equal(decoded({"bytes": None, "path": path}, beside), COLOURS)
    assert decoded({"bytes": data, "path": "/nowhere.png"}).shape == (6, 9, 3)
    for path in (str(corpus / "b.png"), "../../secret.png", "../../corpus2/c.png", "", "a\0b"):
        assert "expected one relative to the table" in reason(path, beside)
    assert "out of the corpus by a link" in reason("../link/secret.png", beside)
    assert "is a URL" in reason("https://example.org/a.png", beside)
    assert "cannot be read (FileNotFoundError)" in reason("images/none.png", beside)
    assert "cannot be read (OSError)" in reason("images", beside) or "IsADirectory" in reason("images", beside)
    assert "no folder" in reason("images/a.png")


def test_trouble_that_may_pass_is_no_fault_of_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(store: Store, path: str) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(Store, "open", fail)
    with pytest.raises(ShardError, match=r"x: 'a\.png' cannot be read: .*Too many open files"):
        decode_image("x", "a.png", LIMITS, Beside(Store.at(str(tmp_path)), ""))


def test_pillows_search_for_a_reader_is_never_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """It imports every plug-in, those that run other programs among them."""

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("searched")

    data = {
        kind: saved(Image.fromarray(COLOURS), kind) for kind in ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM")
    }
    for name in ("open", "init", "preinit"):
        monkeypatch.setattr(Image, name, refuse)
    for image in data.values():
        assert decoded(image).shape == (6, 9, 3)


def test_a_filter_of_warnings_that_is_set_meanwhile_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Filters are every thread's, and images are decoded on one of their own."""
    plugin = pytest.importorskip("PIL.PngImagePlugin")
    load = plugin.PngImageFile.load

    def meanwhile(image: Any) -> Any:
        warnings.filterwarnings("ignore", "set meanwhile")
        return load(image)

    data = saved(Image.fromarray(COLOURS), "PNG")
    monkeypatch.setattr(plugin.PngImageFile, "load", meanwhile)
    with warnings.catch_warnings():
        decode_image("x", data, LIMITS)
        assert any(message and message.pattern == "set meanwhile" for _, message, *_ in warnings.filters)
