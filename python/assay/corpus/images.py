"""Images of a corpus: bytes, files beside a table, arrays of pixels; decoded in memory and within limits.

An image comes from a stranger. Its format is told by its first bytes and decoded by Pillow's reader of that one format,
called by name: the readers of other formats, some of which run programs, are out of reach. The size that a header
speaks of is checked before anything is decoded.
"""

from __future__ import annotations

import io
import posixpath
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from assay._lazy import require
from assay.corpus.errors import BadRow, ShardError
from assay.corpus.storage import Fingerprint, Store, is_of_file
from assay.corpus.tiff import TiffError, bare_tiff

MAX_PIXELS = 1 << 26
MAX_BYTES = 1 << 26

# The beginning of a file of each format, and the class of Pillow that reads it: those that read bytes in memory, and
# take no more of it than the size in their header asks for. Others run programs (EPS, WMF), contain further formats
# (ICO, ICNS, FPX), are pure Python (plain PNM, QOI), or leave it to the stream how much they take (JPEG 2000, AVIF).
_READERS = (
    (b"\x89PNG\r\n\x1a\n", "PNG", "PngImagePlugin", "PngImageFile"),
    (b"\xff\xd8\xff", "JPEG", "JpegImagePlugin", "JpegImageFile"),
    (b"GIF87a", "GIF", "GifImagePlugin", "GifImageFile"),
    (b"GIF89a", "GIF", "GifImagePlugin", "GifImageFile"),
    (b"BM", "BMP", "BmpImagePlugin", "BmpImageFile"),
    (b"II*\0", "TIFF", "TiffImagePlugin", "TiffImageFile"),
    (b"MM\0*", "TIFF", "TiffImagePlugin", "TiffImageFile"),
    (b"II+\0", "TIFF", "TiffImagePlugin", "TiffImageFile"),
    (b"MM\0+", "TIFF", "TiffImagePlugin", "TiffImageFile"),
    *((magic, "PNM", "PpmImagePlugin", "PpmImageFile") for magic in (b"P4", b"P5", b"P6")),
    (b"RIFF", "WEBP", "WebPImagePlugin", "WebPImageFile"),  # "WEBP" stands at byte 8
)
# What warnings.filterwarnings makes of it: all warnings of Pillow's modules are ignored.
_QUIET = ("ignore", None, Warning, re.compile(r"PIL\."), 0)
FORMATS = "PNG, JPEG, WebP, GIF, BMP, TIFF or binary PNM"
_MOST_SCANS = 500  # a progressive JPEG has about ten
_ORIENTATION = 0x0112  # of EXIF; the values are what turns the stored pixels upright
_UPRIGHT = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}


@dataclass(frozen=True)
class ImageLimits:
    """How large an image may be: in pixels, which are checked before they are decoded, and in bytes of its file."""

    pixels: int = MAX_PIXELS
    bytes: int = MAX_BYTES


def inner_path(folder: str, path: str) -> str | None:
    """Where a path leads from a ``folder`` of a corpus, relative to the corpus's root; None if it leads nowhere, or out
    of it."""
    inner = posixpath.normpath(posixpath.join(folder, path))
    outside = "://" in path or posixpath.isabs(path) or inner.split("/")[0] == ".."
    return None if not path or "\0" in path or outside else inner


@dataclass(frozen=True)
class Beside:
    """Where a table lies whose values may be paths: ``folder`` is relative to the corpus's root, which is ``store``.

    ``files`` are those that were read, as they were then, by path relative to the root; None: they could not be.
    """

    store: Store
    folder: str
    files: dict[str, Fingerprint | None] = field(default_factory=dict, compare=False)

    def read(self, name: str, path: str, limit: int) -> bytes:
        """At most ``limit`` bytes and one of a file that the table names; BadRow if it leads out of the corpus or
        cannot be read, ShardError if it may be another time."""
        if "://" in path:
            raise BadRow(f"{name} is a URL; nothing is downloaded, expected the image's bytes or a path")
        inner = inner_path(self.folder, path)
        if inner is None:
            raise BadRow(f"{name} is the path {_shown(path)}; expected one relative to the table, inside the corpus")
        if self.store.is_local and not self.store.holds(self.store, inner):
            raise BadRow(f"{name} is the path {_shown(path)}, which leads out of the corpus by a link")
        try:
            with self.store.open(inner) as file:
                self._note(inner, self.store.fingerprint_of(inner, file))
                return file.read(limit + 1)
        except (OSError, ValueError) as error:  # fsspec's file systems raise ValueErrors, too
            if isinstance(error, OSError) and not is_of_file(error):
                raise ShardError(f"{name}: {_shown(path)} cannot be read: {error}; run again when it can") from error
            self._note(inner, None)
            raise BadRow(f"{name} is the path {_shown(path)}, which cannot be read ({type(error).__name__})") from error

    def _note(self, inner: str, found: Fingerprint | None) -> None:
        if self.files.setdefault(inner, found) != found:
            raise ShardError(f"{_shown(inner)}, which it names, changed while it was being scored; run again")


def decode_image(name: str, value: object, limits: ImageLimits, beside: Beside | None = None) -> Any:
    """A value of an image column as an upright ``PIL.Image`` in RGB.

    Args:
        name: the column, for the reasons.
        value: a file's bytes; a path; {bytes, path} as Hugging Face saves images, where the bytes come first; or pixels
            as integers from 0 to 255 of shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4).
        limits: what is refused.
        beside: where paths lead from; without it there are none.

    Of an animation or a TIFF of several pages the first frame counts. 16 bits become 8 by leaving out the lower ones;
    an opacity is dropped, as ``convert("RGB")`` does, which is what transformers' processors do; CMYK is converted
    without a colour profile.

    Raises:
        BadRow: it is none of these, larger than the limits, or damaged.
    """
    if value is None:
        raise BadRow(f"{name} is null")
    if isinstance(value, Mapping):
        value = _of_struct(name, value)
    if isinstance(value, str):
        if beside is None:
            raise BadRow(f"{name} is a path, and there is no folder that it could lead from")
        value = beside.read(name, value, limits.bytes)
    if isinstance(value, bytes | bytearray | memoryview):
        return _decoded(name, bytes(value), limits)
    if isinstance(value, list | np.ndarray):
        return _of_pixels(name, value, limits)
    raise BadRow(f"{name} is of type {type(value).__name__}, expected an image: bytes, a path or pixels")


def image_facts(name: str, data: bytes) -> tuple[str, int, int]:
    """Format, width and height by the header of an image's file; nothing is decoded. BadRow if it is none."""
    known, module, reader = _reader(name, data)
    plugin = _pillow(module)
    with _bad_rows(name, known):
        width, height = getattr(plugin, reader)(io.BytesIO(_bare(name, known, data, MAX_PIXELS))).size
        return known, width, height


def _bare(name: str, known: str, data: bytes, most_pixels: int) -> bytes:
    """A file that can be handed to its reader."""
    if known != "TIFF":
        return data
    try:
        return bare_tiff(data, most_pixels)
    except TiffError as error:
        raise BadRow(f"{name} is a TIFF, {error}") from error


def _of_struct(name: str, value: Mapping[Any, Any]) -> object:
    for key in ("bytes", "path"):
        if value.get(key) is not None:
            inner: object = value[key]
            if not isinstance(inner, bytes if key == "bytes" else str):
                raise BadRow(f"{name}.{key} is of type {type(inner).__name__}")
            return inner
    keys = ", ".join(sorted(_shown(str(key)) for key in list(value)[:5]))
    raise BadRow(f"{name} has neither bytes nor a path, only {keys or 'nothing'}")


def _decoded(name: str, data: bytes, limits: ImageLimits) -> Any:
    if len(data) > limits.bytes:
        raise BadRow(f"{name} has more than {limits.bytes:,} bytes; the limit is the task's max_bytes")
    known, module, reader = _reader(name, data)
    if known == "JPEG" and (scans := data.count(b"\xff\xda")) > _MOST_SCANS:
        raise BadRow(f"{name} is a JPEG of {scans:,} scans, each as much work as a whole image")
    plugin = _pillow(module)
    with _bad_rows(name, known):
        image = getattr(plugin, reader)(io.BytesIO(_bare(name, known, data, limits.pixels)))
        if known == "PNM" and image.tile[0][0] != "raw":  # of other values Pillow makes pixels one by one, in Python
            raise BadRow(f"{name} is a PNM whose highest value is neither 255 nor 65,535 (of greys)")
        width, height = image.size
        _check_size(name, width, height, limits)
        image.load()
        return _upright(_in_rgb(name, image), image)


def _reader(name: str, data: bytes) -> tuple[str, str, str]:
    for start, known, module, reader in _READERS:
        if data.startswith(start) and (known != "WEBP" or data[8:12] == b"WEBP"):
            return known, module, reader
    what = "is empty" if not data else "is no image that is read here"
    raise BadRow(f"{name} {what}; expected {FORMATS}")


def _pillow(module: str) -> Any:
    """A module of Pillow's, without warnings of its own: of broken metadata, of palettes, of sizes that have limits of
    our own. For good, since a filter that comes and goes would be every thread's."""
    if not warnings.filters or warnings.filters[0] != _QUIET:
        warnings.filterwarnings("ignore", module=_QUIET[3].pattern)
    return require(f"PIL.{module}", "image")


@contextmanager
def _bad_rows(name: str, known: str) -> Iterator[None]:
    """Whatever Pillow raises of a damaged file is a fault of its row."""
    try:
        yield
    except BadRow:
        raise
    except Exception as error:  # its readers raise a dozen classes, SyntaxError, struct.error and zlib.error among them
        text = " ".join(str(error).split())[:100]
        raise BadRow(f"{name} is no {known} that can be decoded ({type(error).__name__}: {text})") from error


def _check_size(name: str, width: int, height: int, limits: ImageLimits) -> None:
    if width * height > limits.pixels:
        raise BadRow(
            f"{name} is {width:,} × {height:,} pixels, more than {limits.pixels:,}; the limit is the task's max_pixels"
        )
    if not width or not height:
        raise BadRow(f"{name} is {width} × {height} pixels, which is no image")


def _in_rgb(name: str, image: Any) -> Any:
    if image.mode.startswith("I"):  # Pillow cuts such numbers off at 255, or wraps them
        wide = np.asarray(image)
        image = _pillow("Image").fromarray((wide >> 8).clip(0, 255).astype(np.uint8))
    elif image.mode == "F":
        raise BadRow(f"{name} has pixels in floating point; expected 8 or 16 bits")
    return image.convert("RGB")


def _upright(image: Any, opened: Any) -> Any:
    try:
        turn = _UPRIGHT.get(opened.getexif().get(_ORIENTATION))
    except Exception:  # of broken metadata, which says nothing; the pixels are there all the same
        return image
    return image if turn is None else image.transpose(_pillow("Image").Transpose[turn])


def _of_pixels(name: str, value: object, limits: ImageLimits) -> Any:
    expected = "expected integers from 0 to 255 in the shape (height, width, 3)"
    try:
        pixels: npt.NDArray[Any] = np.asarray(value)
    except ValueError as error:
        raise BadRow(f"{name} is ragged; {expected}") from error
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] not in (1, 3, 4)):
        raise BadRow(f"{name} has the shape {pixels.shape}; {expected}")
    _check_size(name, pixels.shape[1], pixels.shape[0], limits)
    if pixels.dtype.kind not in "iu" or pixels.min() < 0 or pixels.max() > 255:
        raise BadRow(f"{name} holds something else; {expected}")
    narrow = np.ascontiguousarray(pixels, dtype=np.uint8)
    image = _pillow("Image").fromarray(narrow[:, :, 0] if narrow.ndim == 3 and narrow.shape[2] == 1 else narrow)
    return image.convert("RGB")


def _shown(path: str) -> str:
    return repr(path if len(path) <= 80 else f"{path[:60]}…{path[-15:]}")
