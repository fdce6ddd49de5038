"""Scores for a data set, from wherever they are."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from assay._lazy import require

if TYPE_CHECKING:
    from assay.curate import WholeTable


def score_table(
    source: Any, by: str, corpus_path: str | os.PathLike[str] | None
) -> tuple[pa.Table, npt.NDArray[np.int64] | None]:
    """The column ``by`` alone, and each of its rows' position in the data set; None: they are the data set's own.

    Raises:
        ValueError: the source says for no row which of the data set's it is, or for two the same; there is no such
            column, or it does not hold one finite number (or NaN) per row.
        TypeError: a source of another kind.
    """
    if is_path(source):
        source = read_folder(source, [by], corpus_path).table
    elif corpus_path is not None:
        raise ValueError("corpus_path: goes with the path of a scores folder; the table says itself which rows it has")
    elif is_dataset(source):
        check_column(source.column_names, by)
        source = source.select_columns([by]).with_format("arrow")[:]
    elif not isinstance(source, pa.Table):
        raise TypeError(
            f"scores of type {type(source).__name__}: expected a pyarrow.Table, a data set of Hugging Face's, or the "
            "path of a scores folder"
        )
    check_column(source.column_names, by)
    column = source.schema.field(by)
    if not (pa.types.is_floating(column.type) or pa.types.is_integer(column.type)):
        raise ValueError(f"by={by!r}: holds {column.type} per row; expected one number")
    values = source[by].to_numpy()
    if (infinite := np.flatnonzero(np.isinf(values))).size:
        raise ValueError(f"by={by!r}: row {infinite[0]} of the table is infinite; expected finite scores, or NaN")
    return source.select([by]).replace_schema_metadata(None), row_positions(source)


def is_path(source: Any) -> bool:
    return isinstance(source, str | os.PathLike)


def is_dataset(source: Any) -> bool:
    """Whether it is a map-style data set of Hugging Face's, without importing that library."""
    kinds = {(kind.__module__.split(".")[0], kind.__name__) for kind in type(source).__mro__}
    return ("datasets", "Dataset") in kinds


def read_folder(
    source: str | os.PathLike[str], columns: list[str] | None, corpus_path: str | os.PathLike[str] | None
) -> WholeTable:
    """The scores of a folder of `assay score`."""
    require("fsspec", "cli")
    from assay.curate import read_whole

    return read_whole(os.fspath(source), columns, None if corpus_path is None else os.fspath(corpus_path))


def check_column(names: list[str], by: str) -> None:
    if by not in names:
        known = ", ".join(name for name in names if name not in ("row", "id"))
        raise ValueError(f"by={by!r}: there is no such column; there are {known or 'none'}")


def row_positions(table: pa.Table) -> npt.NDArray[np.int64] | None:
    """Which row of the data set each of the table's is, by its column ``row``; None: they are the data set's own.

    Raises:
        ValueError: the column does not hold whole numbers from 0, each once; or there are ids instead.
    """
    if "row" not in table.column_names:
        if "id" in table.column_names:
            raise ValueError(
                "the table has ids and no column `row`, so that which row of the data set each is nobody says; add the "
                "scores to the data set with assay.train.join(dataset, table) and pass that"
            )
        return None
    rows = _rows(table)
    if (np.diff(np.sort(rows)) == 0).any():
        values, counts = np.unique(rows, return_counts=True)
        raise ValueError(
            f"row {values[counts > 1][0]} occurs {counts.max()} times in the table; expected once: if these are the "
            "tables of several shards, pass the path of the scores folder"
        )
    return rows


def _rows(table: pa.Table) -> npt.NDArray[np.int64]:
    column = table["row"]
    if not pa.types.is_integer(column.type) or column.null_count:
        raise ValueError(f"the table's column `row` holds {column.type} or nulls; expected whole numbers")
    rows: npt.NDArray[np.int64] = column.to_numpy().astype(np.int64)
    if rows.size and rows.min() < 0:
        raise ValueError(f"row {rows.min()} in the table; expected positions in the data set, from 0")
    return rows
