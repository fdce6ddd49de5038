"""Columns inside structs by dotted names: `meta.lang` is the field `lang` of the column `meta`.

A column of that very name wins over a path to it.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from assay.corpus.errors import BadRow
from assay.corpus.format import check_columns

Path = tuple[str, ...]
"""The names that lead to a column: its own, or a column's and those of fields below it."""

_MISSING = object()


def paths_of(schema: pa.Schema, columns: Sequence[str]) -> dict[str, Path]:
    """Where each of ``columns`` lies. A ShardError unless each is there once."""
    paths: dict[str, Path] = {name: (name,) for name in schema.names}
    present = list(schema.names)
    for field in schema:
        for path, _ in fields_below((), field):
            name = ".".join(path)
            if len(path) > 1 and paths.get(name) != (name,):
                paths[name] = path
                present.append(name)
    check_columns(columns, present)
    return {name: paths[name] for name in columns}


def fields_below(above: Path, field: pa.Field) -> Iterator[tuple[Path, pa.Field]]:
    """A field and, of a struct, every field below it, each with the names that lead to it."""
    path = (*above, field.name)
    yield path, field
    if pa.types.is_struct(field.type):
        for i in range(field.type.num_fields):
            yield from fields_below(path, field.type.field(i))


def value_at(
    record: Mapping[str, Any], name: str, absent: str = "line has no key", optional: Container[str] = ()
) -> Any:
    """The value of a JSON object at a dotted name; None below a null. If there is none, None of a name that is
    ``optional``, else a BadRow, which ``absent`` begins."""
    value = record[name] if name in record else _below(record, name)
    if value is not _MISSING:
        return value
    if name in optional:
        return None
    raise BadRow(f"{absent} {name!r}")


def _below(record: Mapping[str, Any], name: str) -> Any:
    """The value at a path of several keys, of which the longest that leads on is taken. (To try all would take a time
    that doubles with every dot.)"""
    cut = len(name)
    while (cut := name.rfind(".", 0, cut)) > 0:
        inner, rest = record.get(name[:cut], _MISSING), name[cut + 1 :]
        if inner is None:
            return None
        if isinstance(inner, dict):
            return inner[rest] if rest in inner else _below(inner, rest)
    return _MISSING
