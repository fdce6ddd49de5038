"""Reading the tree that DuckDB's parser makes of an expression."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any

Node = Mapping[str, Any]


def value_of(node: Node) -> float | str | None:
    """A constant's; None of anything else than a number or a text."""
    if node.get("class") != "CONSTANT":
        return None
    if "value" in node:
        return _value_of_1(node["value"])
    kind, text = node["literal"].get("kind"), str(node["literal"].get("text"))
    if kind == "STRING":
        return text
    try:
        number = float(text) if kind in ("INTEGER", "NUMERIC") else math.nan
    except ValueError:  # hexadecimal digits, and whatever else SQL may come to know
        return None
    return number if math.isfinite(number) else None


def _value_of_1(constant: Node) -> float | str | None:
    """The same of DuckDB 1, which has made a value of it."""
    value: Any = constant.get("value")
    kind = constant["type"]
    if constant.get("is_null"):
        return None
    if kind["id"] == "VARCHAR":
        return value if isinstance(value, str) else None
    if kind["id"] == "DECIMAL" and isinstance(value, int):
        return float(Fraction(value, 10 ** int(kind["type_info"]["scale"])))
    if kind["id"] in ("HUGEINT", "UHUGEINT") and isinstance(value, Mapping):
        return float((int(value["upper"]) << 64) + int(value["lower"]))
    return float(value) if type(value) in (int, float) and math.isfinite(value) else None


def arguments_of(node: Node) -> list[Node]:
    """A function's; those of DuckDB 1 have no names."""
    return [argument["expression"] for argument in node["arguments"]] if "arguments" in node else node["children"]


def positions_of(node: Any) -> Iterator[int]:
    if isinstance(node, Mapping):
        found = node.get("query_location")
        if isinstance(found, int) and found < 1 << 63:
            yield found
        for value in node.values():
            yield from positions_of(value)
    elif isinstance(node, list):
        for value in node:
            yield from positions_of(value)


def is_empty(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(is_empty(inner) for key, inner in value.items() if key != "type")
    return value in (None, "", False, [])


def words_of(node: Node) -> str:
    return str(node["type"]).replace("COMPARE_", "").replace("OPERATOR_", "").replace("_", " ")
