"""What a feature file's footer says, beside what is expected of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

_DIFFERENT = {
    "recipe": "features from another recipe",
    "recipe_hash": "features from another recipe",
    "models": "features of other models",
    "input": "features of another input",
    "seed": "features under another seed",
    "features": "features of another kind",
}


def footer_differences(metadata: Mapping[str, Any], expect: Mapping[str, Any]) -> Iterator[str]:
    """What ``metadata`` lacks of what is expected, as ``features of … (key is …, expected …)``."""
    for key, wanted in json.loads(json.dumps(expect)).items():
        for difference in _differences(metadata.get(key), wanted, key):
            yield f"{_DIFFERENT.get(key, 'features of another run')} ({difference})"


def _differences(found: Any, wanted: Any, key: str) -> Iterator[str]:
    """Where what is wanted is not what was found; what is found besides is no difference."""
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        for name in sorted(wanted):
            yield from _differences(found.get(name), wanted[name], f"{key}.{name}")
    elif found != wanted:
        yield f"{key} is {_short(found)}, expected {_short(wanted)}"


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
