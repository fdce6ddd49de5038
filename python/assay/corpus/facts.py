"""What is known of columns before their rows are read: from Arrow schemas, Hugging Face features, or a few values."""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from assay.corpus.arrow_values import LISTS, extension_name, is_any
from assay.corpus.dotted import fields_below
from assay.corpus.errors import ShardError
from assay.corpus.format import ColumnFacts

MIXED = "mixed"
_HUGGING_FACE = b"huggingface"
_MOST_SHOWN_FIELDS = 16
_MOST_DEPTH = 32
_MOST_FIELDS = 20_000
# Older data sets store them as plain bytes or paths.
_MEDIA = ("Image", "Audio", "Video")

Feature = Any
"""A node of Hugging Face's features as JSON has them: ``{"_type": …}``, a mapping of names, or a list of one."""


def facts_of_schema(
    schema: pa.Schema,
    features: Mapping[str, Feature] | None = None,
    dictionaries: Mapping[str, tuple[str, ...]] | None = None,
) -> dict[str, ColumnFacts]:
    """Every column that is there once, and the fields of structs by dotted names.

    ``features`` replace those of the schema's own metadata; ``dictionaries`` are the values of columns that are one.
    """
    features = features if features is not None else _features_in(schema.metadata or {})
    # A column's own name wins over a path through a struct.
    own_names = set(schema.names)
    found = [(".".join(path), path, field) for column in schema for path, field in fields_below((), column)]
    found = [(name, path, field) for name, path, field in found if len(path) == 1 or name not in own_names]
    times = Counter(name for name, *_ in found)
    facts: dict[str, ColumnFacts] = {}
    for name, path, field in found:
        if times[name] == 1:
            feature = functools.reduce(_feature_of, path, features)
            classes = _classes(field.type, feature) or (dictionaries or {}).get(name)
            facts[name] = ColumnFacts(_type_text(field, feature), classes)
    return facts


def facts_of_values(columns: Mapping[str, Sequence[Any]]) -> dict[str, ColumnFacts]:
    """The same of Python values, which may be nested as JSON is. Of mappings with very many keys only that they are."""
    check_width(len(columns))
    facts: dict[str, ColumnFacts] = {}
    for column, values in columns.items():
        for name, fact in _facts_of(column, values, _MOST_DEPTH):
            if name not in columns or name == column:
                facts.setdefault(name, fact)
    return facts


def check_width(columns: int) -> None:
    """ShardError for more columns than any corpus has."""
    if columns > _MOST_FIELDS:
        raise ShardError(f"has {columns:,} columns in its first rows; expected at most {_MOST_FIELDS:,}")


def _facts_of(name: str, values: Sequence[Any], depth: int) -> Iterator[tuple[str, ColumnFacts]]:
    """A column's, or those of a field of objects, and of the fields below it."""
    objects = [value for value in values if isinstance(value, dict)]
    if not objects or not depth:
        yield name, ColumnFacts(_inferred_type(values))
        return
    fields: dict[str, list[Any]] = {}
    for key, value in (item for own in objects for item in own.items()):
        fields.setdefault(key, []).append(value)
    if len(fields) > _MOST_FIELDS:
        yield name, ColumnFacts("struct<…>")
        return
    below = {key: list(_facts_of(f"{name}.{key}", own, depth - 1)) for key, own in fields.items()}
    is_struct = all(value is None or isinstance(value, dict) for value in values)
    yield name, ColumnFacts(_struct_text([(key, own[0][1].type) for key, own in below.items()]) if is_struct else MIXED)
    yield from (fact for own in below.values() for fact in own)


def _inferred_type(values: Sequence[Any]) -> str:
    try:
        return _type_text(pa.field("", pa.array(values).type))
    except (pa.ArrowException, OverflowError, RecursionError, UnicodeEncodeError):
        return MIXED


def _features_in(metadata: Mapping[bytes, bytes]) -> Mapping[str, Feature]:
    """The features that `datasets` wrote into a schema; none where there are none, or they are damaged."""
    try:
        return features_of(json.loads(metadata.get(_HUGGING_FACE, b"{}"))["info"])
    except (ValueError, LookupError, TypeError, RecursionError):
        return {}


def features_of(info: Any) -> Mapping[str, Feature]:
    """The features in what describes a data set: its dataset_info.json, or the same in a schema."""
    features = info.get("features") if isinstance(info, dict) else None
    return features if isinstance(features, dict) else {}


def _feature_of(feature: Feature, name: str) -> Feature:
    """That of a struct's field. A Sequence of a mapping is a struct of lists on disk."""
    if not isinstance(feature, dict):
        return None
    if feature.get("_type") == "Sequence" and isinstance(feature.get("feature"), dict):
        feature = feature["feature"]
    return feature.get(name)


def _classes(kind: pa.DataType, feature: Feature) -> tuple[str, ...] | None:
    """The names of a ClassLabel, which must be stored as integers, or of the items of a list of them."""
    while is_any(kind, *LISTS):
        kind, feature = kind.value_type, _item_feature(feature)
    if not pa.types.is_integer(kind) or not isinstance(feature, dict) or feature.get("_type") != "ClassLabel":
        return None
    names = feature.get("names")
    return tuple(names) if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def _type_text(field: pa.Field, feature: Feature = None) -> str:
    """The field's type as `ColumnFacts` has it."""
    kind, name = field.type, extension_name(field)
    media = str(feature.get("_type") or "") if isinstance(feature, dict) else ""
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    if name in ("arrow.uuid", "arrow.bool8"):
        return name.removeprefix("arrow.").removesuffix("8")
    if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        return _type_text(field.with_type(kind.value_type), feature)
    if media and _holds_media(kind, media):
        return media.lower()
    if is_any(kind, "string", "large_string", "string_view"):
        return "string"
    if is_any(kind, "binary", "large_binary", "binary_view", "fixed_size_binary"):
        return "binary"
    if is_any(kind, *LISTS):
        return f"list<{_type_text(kind.value_field, _item_feature(feature))}>"
    if pa.types.is_struct(kind):
        fields = [kind.field(i) for i in range(kind.num_fields)]
        return _struct_text([(field.name, _type_text(field, _feature_of(feature, field.name))) for field in fields])
    return str(kind)


def _holds_media(kind: pa.DataType, feature: str) -> bool:
    """Whether a feature that is stored so is a file: its bytes, or the path to it."""
    if pa.types.is_struct(kind):
        return sorted(kind.field(i).name for i in range(kind.num_fields)) == ["bytes", "path"]
    return feature in _MEDIA and is_any(kind, "binary", "large_binary", "string", "large_string")


def _struct_text(fields: Sequence[tuple[str, str]]) -> str:
    shown = [f"{name}: {text}" for name, text in fields[:_MOST_SHOWN_FIELDS]]
    return f"struct<{', '.join(shown)}{', …' if len(fields) > _MOST_SHOWN_FIELDS else ''}>"


def _item_feature(feature: Feature) -> Feature:
    """That of a list's items."""
    if isinstance(feature, list) and len(feature) == 1:
        return feature[0]
    if isinstance(feature, dict) and feature.get("_type") in ("List", "LargeList", "Sequence"):
        return feature.get("feature")
    return None
