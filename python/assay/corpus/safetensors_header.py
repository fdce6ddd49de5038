"""The header of a safetensors file: where its tensors lie, believed only as far as the file goes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

MOST_HEADER_BYTES = 100_000_000
"""What the format allows."""
_MOST_AXES = 64
METADATA = "__metadata__"


@dataclass(frozen=True)
class TensorFacts:
    """A tensor's type as the format names it, its shape, and where it lies after the header."""

    dtype: str
    shape: tuple[int, ...]
    offsets: tuple[int, int]


@dataclass(frozen=True)
class Header:
    """The tensors by name, the file's own metadata, and where the first tensor begins."""

    tensors: Mapping[str, TensorFacts]
    metadata: Mapping[str, str]
    start: int


class HeaderError(ValueError):
    """It is no safetensors file, or not a whole one."""


def read_header(file: BinaryIO, size: int) -> Header:
    """The header of a file of ``size`` bytes, open at its beginning.

    Raises:
        HeaderError: it is none, is cut short, or names a tensor twice.
    """
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(MOST_HEADER_BYTES, size - 8):
        raise HeaderError(f"not a safetensors file, or cut short ({size:,} bytes)")
    try:
        header = json.loads(file.read(length), object_pairs_hook=_unique)
        metadata = header.pop(METADATA, {})
        tensors = {name: _facts(entry) for name, entry in header.items()}
    except HeaderError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise HeaderError(f"not a safetensors file ({type(error).__name__})") from error
    end = 8 + length + max((facts.offsets[1] for facts in tensors.values()), default=0)
    if size != end:
        what = "cut short" if size < end else "followed by something else"
        raise HeaderError(f"is {what}: {size:,} bytes, where its header speaks of {end:,}")
    return Header(tensors, metadata if isinstance(metadata, dict) else {}, 8 + length)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise HeaderError(f"names {twice[:80]} twice")
    return result


def _facts(entry: Mapping[str, Any]) -> TensorFacts:
    shape, (start, end) = tuple(entry["shape"]), entry["data_offsets"]
    if len(shape) > _MOST_AXES or not all(type(n) is int and 0 <= n < 1 << 63 for n in (*shape, start, end)):
        raise ValueError("a tensor of a shape that none has")
    return TensorFacts(str(entry["dtype"]), shape, (start, end))
