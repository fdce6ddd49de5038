"""Columns of scores for a Hugging Face data set."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from assay.methods.checks import check_one_of
from assay.train.tables import is_dataset, is_path, read_folder, row_positions


def join(
    dataset: Any,
    scores: pa.Table | str | os.PathLike[str],
    on: str | None = "id",
    *,
    columns: Sequence[str] | None = None,
    missing: Literal["error", "null"] = "error",
    surplus: Literal["error", "drop"] = "error",
    corpus_path: str | os.PathLike[str] | None = None,
) -> Any:
    """The data set with columns of scores, its rows as they are and in their order::

        dataset = assay.train.join(dataset, "scores", on="id")
        loader = DataLoader(dataset, sampler=assay.train.WeightedSampler(dataset, by="mimic", keep="high"))

    Args:
        dataset: a map-style ``datasets.Dataset``.
        scores: a table of scores or weights (as of `assay.score`, or a file of ``assay select --format weights``), or
            the path of a scores folder of `assay score`.
        on: the column of the data set that holds the ids, texts or whole numbers, as the table's ``id`` does. None: row
            by row, by the table's column ``row`` or, if it has neither that nor ``id``, its own order; of a folder,
            the data set is the corpus, its shards after one another in the order of their paths.
        columns: of the scores; None: all of them.
        missing: what a row gets that has no score, as one that `assay score` put into quarantine: an error, or null.
        surplus: what becomes of scores of which the data set has no row: an error, or they are left out.
        corpus_path: of a scores folder, where the corpus is now, if it has moved.

    Returns:
        A ``datasets.Dataset``. NaN stays NaN: it is a score that is not a number.

    Raises:
        ValueError: a row without a score, a score without a row, an id that is repeated, a column that is not there or
            would be there twice. Each names one, and says what to do.
        TypeError: not a data set of Hugging Face's, or not scores.
    """
    check_one_of("join: missing", missing, ("error", "null"))
    check_one_of("join: surplus", surplus, ("error", "drop"))
    if not is_dataset(dataset):
        raise TypeError(
            f"join: a data set of type {type(dataset).__name__}; expected a datasets.Dataset (of a DatasetDict one "
            "split; a streamed one must be loaded)"
        )
    table = _table(scores, columns, len(dataset), on, corpus_path)
    wanted = [name for name in table.column_names if name not in ("row", "id")] if columns is None else list(columns)
    _check_names(dataset.column_names, table.column_names, wanted, on)
    if on is None:
        places, ids = _by_row(table, len(dataset)), None
    else:
        ids = _ids(dataset, on)
        places = _by_id(table, ids, on, surplus)
    if places.null_count and missing == "error":
        row = places.is_null().index(True).as_py()
        name = f"row {row}" if ids is None else f"row {row} (id {ids[row].as_py()!r})"
        raise ValueError(
            f"join: {places.null_count} of the data set's {len(places)} rows have no score, the first is {name}; "
            "expected one for each, and what assay put into quarantine has none: take them out of the data set, or "
            "pass missing='null'"
        )
    for name in wanted:
        dataset = dataset.add_column(name, table[name].combine_chunks().take(places))
    return dataset


def _table(
    scores: Any,
    columns: Sequence[str] | None,
    rows: int,
    on: str | None,
    corpus_path: str | os.PathLike[str] | None,
) -> pa.Table:
    if not is_path(scores):
        if corpus_path is not None:
            raise ValueError("join: corpus_path goes with the path of a scores folder")
        if not isinstance(scores, pa.Table):
            raise TypeError(
                f"join: scores of type {type(scores).__name__}; expected a pyarrow.Table or the path of a scores folder"
            )
        return scores
    whole = read_folder(scores, None if columns is None else list(columns), corpus_path)
    if on is None and whole.rows != rows:
        raise ValueError(
            f"join: on=None: the scored corpus has {whole.rows} rows and the data set {rows}; expected the same "
            "rows in the same order; join by id (on='id') where the data set is a part of the corpus"
        )
    return whole.table


def _check_names(own: Sequence[str], scored: Sequence[str], wanted: Sequence[str], on: str | None) -> None:
    for name in wanted:
        if scored.count(name) != 1:
            raise ValueError(
                f"join: columns: the scores have {scored.count(name) or 'no'} columns {name!r}; expected one; there "
                f"are {', '.join(scored)}"
            )
        if name in own:
            raise ValueError(
                f"join: the data set has a column {name!r} already; remove it (dataset.remove_columns({name!r})) or "
                "name others with columns="
            )
    if not wanted:
        raise ValueError("join: the table has no column beside row and id; expected scores")
    if on is not None and on not in own:
        raise ValueError(
            f"join: on={on!r}: the data set has no such column; it has {', '.join(own)}; on=None joins row by row"
        )
    if on is not None and "id" not in scored:
        raise ValueError("join: the scores have no column 'id'; expected one; on=None joins row by row")


def _ids(dataset: Any, on: str) -> pa.Array:
    """The data set's ids as texts, whatever its format."""
    ids = dataset.select_columns([on]).with_format("arrow")[:][on].combine_chunks()
    if not any(is_kind(ids.type) for is_kind in (pa.types.is_integer, pa.types.is_string, pa.types.is_large_string)):
        raise ValueError(f"join: on={on!r}: holds {ids.type} per row; expected texts or whole numbers")
    return ids.cast(pa.string())


def _by_id(table: pa.Table, ids: pa.Array, on: str, surplus: str) -> pa.Array:
    """For every row of the data set, its place in the table of scores; null where there is none."""
    scored = table["id"].combine_chunks().cast(pa.string())
    if scored.null_count:
        raise ValueError(f"join: {scored.null_count} entries of the scores have no id; expected one for each")
    for what, column in (("scores", scored), (f"data set's column {on!r}", ids)):
        if (repeated := _repeated(column)) is not None:
            raise ValueError(
                f"join: id {repeated!r} is in the {what} more than once, expected once: join row by row (on=None), or "
                "make it one first (table.group_by('id').aggregate(...) of a table of several steps)"
            )
    unused = pc.invert(pc.is_in(scored, value_set=ids))
    if surplus == "error" and pc.any(unused).as_py():
        raise ValueError(
            f"join: {pc.sum(unused).as_py()} of {len(scored)} scores are of no row of the data set, the first has id "
            f"{scored[unused.index(True).as_py()].as_py()!r}; expected scores of this data set: if it is a part of "
            "what was scored, pass surplus='drop'"
        )
    return pc.index_in(ids, value_set=scored).cast(pa.int64())


def _repeated(ids: pa.Array) -> str | None:
    """An id that is there more than once."""
    counts = pc.value_counts(ids.drop_null())
    several = pc.greater(counts.field("counts"), 1).index(True).as_py() if len(counts) else -1
    return None if several < 0 else str(counts.field("values")[several].as_py())


def _by_row(table: pa.Table, rows: int) -> pa.Array:
    """As `_by_id`."""
    positions = row_positions(table)
    if positions is None:
        positions = np.arange(table.num_rows)
    if (beyond := positions[positions >= rows]).size:
        raise ValueError(
            f"join: on=None: there is a score of row {beyond[0]}, and the data set has {rows} rows; expected scores of "
            "this data set; join by id (on='id') where it is a part of what was scored"
        )
    return pc.index_in(pa.array(np.arange(rows)), value_set=pa.array(positions)).cast(pa.int64())
