"""The formats of shards, one file each. To add one, write its file and list it here."""

from __future__ import annotations

import os

from assay.corpus.compression import COMPRESSIONS, Compression
from assay.corpus.format import Format, Source
from assay.corpus.formats import arrow, csv, images, json_lines, npy, parquet, safetensors, webdataset

__all__ = ["FORMATS", "SUFFIXES", "Format", "Source", "format_of"]

FORMATS: tuple[Format, ...] = (
    *(parquet.FORMAT, arrow.FORMAT, json_lines.FORMAT, csv.FORMAT, webdataset.FORMAT),
    *(npy.FORMAT, safetensors.FORMAT, images.FORMAT),
)

_BY_SUFFIX = {suffix: form for form in FORMATS for suffix in form.suffixes}


def format_of(path: str) -> tuple[Format, Compression | None] | None:
    """What a file's name says about its format and compression; None if nothing that can be read."""
    stem, suffix = os.path.splitext(path.lower())
    compression = COMPRESSIONS.get(suffix)
    if compression:
        suffix = os.path.splitext(stem)[1]
    form = _BY_SUFFIX.get(suffix)
    if form is None or (compression and not form.compressible):
        return None
    return form, compression


def _suffixes() -> str:
    plain = [suffix for form in FORMATS if not form.compressible for suffix in form.suffixes]
    packed = [suffix for form in FORMATS if form.compressible for suffix in form.suffixes]
    return f"{', '.join([*plain, *packed])} ({', '.join(packed)} also with {', '.join(COMPRESSIONS)})"


SUFFIXES = _suffixes()
