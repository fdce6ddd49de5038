"""Image folders: a folder whose folders are classes and hold images is one shard, and its files in order are the rows.

The columns are `image` (its bytes and path), `label` (the class's folder) and `path` (`<class>/<file>`). Chosen files
are copied as they are.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

from assay.corpus.compression import MAX_LINE_BYTES
from assay.corpus.dotted import value_at
from assay.corpus.errors import BadRow
from assay.corpus.format import Chunk, ColumnFacts, Folder, Format, Mask, Source, check_columns, check_length, parts
from assay.corpus.listing import list_files, shown
from assay.corpus.media import IMAGES
from assay.corpus.storage import Fingerprint, Store, is_of_file

_ROW_BYTES = 1000

log = logging.getLogger("assay")


def _files(store: Store, folder: str) -> dict[str, Fingerprint | None]:
    """The images in the folders of a folder, relative to it, in order of their paths. An OSError if there are none."""
    below = len(folder) + 1 if folder else 0
    listed = {path[below:]: found for path, found in list_files(store, folder).files.items()}
    files = {path: found for path, found in listed.items() if path.lower().endswith(IMAGES) and path.count("/") == 1}
    if not files:
        raise FileNotFoundError(f"{store.full(folder)}: no image in a folder of a class")
    return files


def _read(source: Source, columns: Sequence[str]) -> Iterator[Chunk]:
    assert source.folder is not None
    check_columns(columns, list(_facts(source)))
    is_wanted = any(name.partition(".")[0] == "image" for name in columns)
    for first, rows in parts(_rows(source.folder, is_wanted), _size):
        faults = {i: str(row) for i, row in enumerate(rows) if isinstance(row, BadRow)}
        values = {name: [value_at(row, name) if isinstance(row, dict) else None for row in rows] for name in columns}
        yield Chunk(first, values, faults, len(rows), (first + len(rows)) / len(source.folder.files))


def _rows(folder: Folder, is_read: bool) -> Iterator[dict[str, Any] | BadRow]:
    """Every row; of its image the bytes, if they are to be read."""
    for path in folder.files:
        data = _bytes(folder.store, path) if is_read else b""
        image = {"bytes": data, "path": path}
        yield data if isinstance(data, BadRow) else {"image": image, "label": os.path.dirname(path), "path": path}


def _size(row: dict[str, Any] | BadRow) -> int:
    return _ROW_BYTES + (len(row["image"]["bytes"]) if isinstance(row, dict) else 0)


def _bytes(store: Store, path: str) -> bytes | BadRow:
    try:
        with store.open(path) as file:
            data = file.read(MAX_LINE_BYTES + 1)
    except OSError as error:
        if not is_of_file(error):
            raise
        return BadRow(f"{shown(path)} cannot be read: {error.strerror or type(error).__name__}")
    if len(data) > MAX_LINE_BYTES:
        return BadRow(f"{shown(path)} is larger than {MAX_LINE_BYTES >> 20} MiB")
    return data


def _facts(source: Source) -> dict[str, ColumnFacts]:
    assert source.folder is not None
    classes = tuple(sorted({*source.folder.classes, *(os.path.dirname(path) for path in source.folder.files)}))
    text = ColumnFacts("string")
    return {
        **{"image": ColumnFacts("image"), "image.bytes": ColumnFacts("binary"), "image.path": text},
        **{"label": ColumnFacts("string", classes, in_order=True), "path": text},
    }


def _copy(source: Source, keep: Mask, target: Store) -> None:
    """Copy the files that are kept; of the others, what an earlier selection has left goes."""
    assert source.folder is not None
    files = source.folder.files
    check_length(len(files), keep)
    there = set(target.files())
    for path, is_kept in zip(files, keep.tolist(), strict=True):
        if is_kept:
            with source.folder.store.open(path) as image, target.write(path) as file:
                shutil.copyfileobj(image, file, 1 << 20)
        elif path in there:
            target.remove(path)
    _name_lost_classes(target.root, files, keep)


def _name_lost_classes(root: str, files: Sequence[str], keep: Mask) -> None:
    """Warn of classes of which nothing is kept, where something is."""
    classes = [os.path.dirname(path) for path in files]
    kept = {name for name, is_kept in zip(classes, keep.tolist(), strict=True) if is_kept}
    lost = sorted(set(classes) - kept)
    if kept and lost:
        others = f" and {len(lost) - 1} others" if len(lost) > 1 else ""
        log.warning(
            "%s: no image of class %s%s is kept; torchvision's ImageFolder numbers those that are left anew: label "
            "by the folders' names",
            *(root, shown(lost[0]), others),
        )


FORMAT = Format("images", (), _read, _copy, _facts, files=_files)
