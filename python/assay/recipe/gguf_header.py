"""What a GGUF file's header says: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md."""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass, field
from typing import Any

from assay._lazy import require
from assay.recipe.errors import EngineError
from assay.recipe.model_files import Stored, check_file, one_line, shortened

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_ENTRIES = 1 << 20
_MAX_AXES = 16  # four is what ggml has


@dataclass
class GgufHeader:
    """The numbers among a file's metadata, and its tensors."""

    values: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Stored] = field(default_factory=dict)


def read_gguf(path: str) -> GgufHeader:
    """A GGUF file's header.

    Raises:
        EngineError: it is none, is cut short, or names a tensor twice.
    """
    size = check_file(path)
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise EngineError(f"{path}: not a GGUF file")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                header, end = _Reader(data).header()
            except _Twice as twice:
                raise EngineError(f"{path}: names {shortened([str(twice)])} twice") from twice
            except (struct.error, ValueError, KeyError, OverflowError, RecursionError) as error:
                raise EngineError(f"{path}: not a GGUF file, or cut short ({one_line(error)})") from error
    if size < end:
        raise EngineError(f"{path}: is cut short: {size:,} bytes, where its header speaks of {end:,}")
    return header


class _Twice(ValueError):
    """A tensor's name that is there twice."""


class _Reader:
    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 4

    def header(self) -> tuple[GgufHeader, int]:
        """The header, and where the data of the last tensor ends."""
        header = GgufHeader()
        version, tensors, entries = self._unpack("I"), self._unpack("Q"), self._unpack("Q")
        if version not in (2, 3) or max(tensors, entries) > _MAX_ENTRIES:
            raise ValueError(f"version {version}, {tensors} tensors, {entries} entries")
        for _ in range(entries):
            name, kind = self._string(), self._unpack("I")
            value = self._value(kind)
            if isinstance(value, int | float):
                header.values[name] = value
        end = 0
        for _ in range(tensors):
            name = self._string()
            axes = self._unpack("I")
            if axes > _MAX_AXES:
                raise ValueError(f"{name!r} has {axes} axes")
            shape = tuple(self._unpack("Q") for _ in range(axes))
            kind, offset = self._unpack("I"), self._unpack("Q")
            if name in header.tensors:
                raise _Twice(name)
            header.tensors[name] = Stored(shape)
            end = max(end, offset + _nbytes(kind, math.prod(shape)))
        alignment = header.values.get("general.alignment", 32)
        if alignment < 1:
            raise ValueError(f"alignment {alignment}")
        return header, (-(-self._at // alignment) * alignment + end) if tensors else self._at

    def _unpack(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self._data, self._at)
        self._at += struct.calcsize(f"<{code}")
        return value

    def _string(self) -> str:
        length = self._unpack("Q")
        if length > len(self._data) - self._at:
            raise ValueError(f"a string of {length} bytes")
        self._at += length
        return self._data[self._at - length : self._at].decode("utf-8", "replace")

    def _value(self, kind: int, depth: int = 0) -> Any:
        """The value, if it is a number; others are passed over."""
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._unpack(_SCALARS[kind])
        inner, count = self._unpack("I"), self._unpack("Q")
        if count > len(self._data) or depth > 4:
            raise ValueError(f"an array of {count} values, nested {depth} deep")
        if inner in _SCALARS:
            self._at += count * struct.calcsize(f"<{_SCALARS[inner]}")
        else:
            for _ in range(count):
                self._value(inner, depth + 1)
        return None


def _nbytes(kind: int, numbers: int) -> int:
    constants = require("gguf.constants", "text")
    per_block, nbytes = constants.GGML_QUANT_SIZES[constants.GGMLQuantizationType(kind)]
    return -(-numbers // int(per_block)) * int(nbytes)
