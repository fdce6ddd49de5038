"""The score table: `row`, `id`, then one float32 column per score, each saying which end to keep.

A score of several numbers per sample is a fixed-size list; one of a number per token is a list.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from assay._json import dumps
from assay.corpus.arrow_numpy import array_of, ids_of

METADATA_KEY = b"assay"
ROW_AND_ID = (pa.field("row", pa.int64(), nullable=False), pa.field("id", pa.string(), nullable=False))


class ScoreColumn(Protocol):
    """What a table needs to know about a score; `assay.methods.Column` is one."""

    @property
    def name(self) -> str: ...
    @property
    def keep(self) -> str: ...
    @property
    def description(self) -> str: ...


def score_schema(columns: Sequence[ScoreColumn], metadata: Mapping[str, Any]) -> pa.Schema:
    """A score table's schema: each score says which end to keep; `metadata` is the footer's JSON."""
    names = [column.name for column in columns]
    taken = {field.name for field in ROW_AND_ID}
    for name in names:
        if name in taken:
            raise ValueError(f"score column {name!r} appears twice; each score of a table needs its own name")
        taken.add(name)
    scores = [pa.field(c.name, _type(c), metadata={"keep": c.keep, "description": c.description}) for c in columns]
    footer = dumps(metadata, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return pa.schema([*ROW_AND_ID, *scores], metadata={METADATA_KEY: footer.encode()})


def make_table(
    rows: npt.ArrayLike,
    ids: Sequence[str] | pa.Array,
    scores: Mapping[str, npt.NDArray[Any]],
    columns: Sequence[ScoreColumn],
    metadata: Mapping[str, Any],
) -> pa.Table:
    """Build a score table.

    ``rows`` are positions in the source, ``ids`` the samples' ids, ``scores`` one value per row for every
    column in ``columns`` and nothing else: (N,), (N, width), or for a number per token N arrays, or (N, T), of which
    NaN at a row's end are not kept. A missing or surplus score, or one of the wrong shape, is a ValueError.
    """
    schema = score_schema(columns, metadata)
    row_array = np.asarray(rows, dtype=np.int64)
    wanted = schema.names[len(ROW_AND_ID) :]
    if set(scores) != set(wanted):
        raise ValueError(f"scores are {sorted(scores)}, but the columns declare {sorted(wanted)}")
    lengths = {"row": len(row_array), "id": len(ids)} | {name: len(scores[name]) for name in wanted}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"columns of a score table differ in length: {lengths}")
    arrays = [array_of(row_array), ids_of(ids)]
    arrays += [_array(scores[c.name], c) for c in columns]
    return pa.Table.from_arrays(arrays, schema=schema)


def _type(column: ScoreColumn) -> pa.DataType:
    width = getattr(column, "width", 1)
    return pa.float32() if width == 1 else pa.list_(pa.float32(), -1 if width is None else width)


def count_nan(values: npt.NDArray[Any]) -> int:
    """How many rows of a score hold something that is not a number; of one of a number per token, how many have no
    number at all."""
    if values.dtype.kind == "O":
        return sum(bool(np.isnan(row).all()) for row in values)
    return int(np.isnan(values).any(axis=tuple(range(1, values.ndim))).sum())


def count_nan_rows(array: pa.Array) -> int:
    """The same of a table's column."""
    values, owners = array, np.arange(len(array))
    if is_list := not pa.types.is_floating(array.type):
        values, owners = array.flatten(), pc.list_parent_indices(array).to_numpy()
    is_nan = np.isnan(values.to_numpy(zero_copy_only=False))
    if is_list and not pa.types.is_fixed_size_list(array.type):
        return len(array) - len(np.unique(owners[~is_nan]))
    return len(np.unique(owners[is_nan]))


def _array(values: npt.NDArray[Any], column: ScoreColumn) -> pa.Array:
    width = getattr(column, "width", 1)
    if width is None and isinstance(values, np.ndarray) and values.dtype.kind == "O":
        return _lists(list(values))
    values = np.asarray(values, dtype=np.float32)
    shape = () if width == 1 else values.shape[1:2] if width is None else (width,)
    if values.shape[1:] != shape or (width is None and values.ndim != 2):
        expected = "(N,)" if width == 1 else f"(N, {'T' if width is None else width})"
        raise ValueError(f"score {column.name!r} has shape {values.shape}; expected {expected}")
    if width == 1:
        return array_of(values)
    if width is not None:
        return pa.FixedSizeListArray.from_arrays(array_of(values.ravel()), width)
    held = ~np.isnan(values)
    lengths = np.where(held.any(1), values.shape[1] - held[:, ::-1].argmax(1), 0) if values.size else held.sum(1)
    return _lists([row[:length] for row, length in zip(values, lengths.tolist(), strict=True)])


def _lists(rows: Sequence[npt.NDArray[np.float32]]) -> pa.Array:
    offsets = np.cumsum([0, *map(len, rows)]).astype(np.int32)
    flat = np.concatenate([np.empty(0, np.float32), *rows])
    return pa.ListArray.from_arrays(array_of(offsets), array_of(flat))


def read_metadata(schema: pa.Schema) -> dict[str, Any]:
    """The footer's JSON of a score table's schema; ValueError if it has none."""
    return parse_metadata(schema.metadata)


def parse_metadata(metadata: Mapping[bytes, bytes] | None) -> dict[str, Any]:
    """The footer's JSON in what a schema or a file of Parquet says beside its columns; ValueError if it has none."""
    raw = (metadata or {}).get(METADATA_KEY)
    if raw is None:
        raise ValueError("not a score table: its schema has no `assay` metadata")
    footer = json.loads(raw)
    if not isinstance(footer, dict):
        raise ValueError(f"not a score table: its `assay` metadata is a {type(footer).__name__}, not an object")
    return footer
