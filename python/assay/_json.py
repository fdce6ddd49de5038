"""JSON that every parser reads, for whatever we write."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any


def dumps(value: Any, *, default: Callable[[Any], Any] | None = None, **options: Any) -> str:
    """A value as JSON (RFC 8259), which knows no NaN and no infinities: those become the strings ``"NaN"``,
    ``"Infinity"`` and ``"-Infinity"``, as in protobuf's mapping. ``float`` and pydantic's fields take them back.

    ``default`` and ``options`` are those of `json.dumps`. A TypeError for what has no form in JSON.
    """
    plain = default and (lambda other: _spelt_out(default(other)))
    return json.dumps(_spelt_out(value), allow_nan=False, default=plain, **options)


def _spelt_out(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {_spelt_out(key): _spelt_out(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_spelt_out(item) for item in value]
    return value
