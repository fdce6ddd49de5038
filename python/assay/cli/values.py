"""Values as lines for a terminal: cut to its width, and without any character that could act on it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from rich.cells import cell_len

from assay._json import dumps
from assay.cli.terminal import clean
from assay.corpus.errors import BadRow
from assay.corpus.images import image_facts

TEXT_LINES = 4
_SHOWN_NUMBERS = 6
_SHOWN_ITEMS = 8
_MOST_DEPTH = 3
_MOST_JSON_DEPTH = 50


def columns_lines(values: Mapping[str, Any], width: int, classes: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """A sample's columns, each under its name.

    ``width``: cells of the terminal. ``classes``: by column, the names of the classes that its whole numbers mean.
    """
    names = {name: cut(name, max(8, width // 4)) for name in values}
    room = max(map(cell_len, names.values()), default=0)
    for name, value in values.items():
        head = names[name] + " " * (room - cell_len(names[name]))
        for i, line in enumerate(value_lines(value, max(8, width - room - 2), classes.get(name, ()))):
            yield f"{head if i == 0 else ' ' * room}  {line}"


def value_lines(value: Any, width: int, classes: Sequence[str] = ()) -> list[str]:
    """A value in at most TEXT_LINES lines; of a conversation, each turn."""
    if isinstance(value, str):
        return text_lines(value, width)
    if image := image_words(value):
        return [cut(image, width)]
    if turns := _turns(value):
        lines = [line for turn in turns[:_SHOWN_ITEMS] for line in text_lines(turn, width)]
        return lines + ([f"… {len(turns) - _SHOWN_ITEMS} more turns"] if turns[_SHOWN_ITEMS:] else [])
    if classes and isinstance(value, list | np.ndarray):
        value = _named(value, classes)
    if _is_class(value, classes):
        return [cut(f"{value} ({classes[value]})", width)]
    return [cut(in_words(value), width)]


def _named(value: Any, classes: Sequence[str]) -> Any:
    """The classes' names in place of their numbers, at any depth of lists."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list):
        return [_named(item, classes) for item in value]
    return classes[value] if _is_class(value, classes) else value


def _is_class(value: Any, classes: Sequence[str]) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(classes)


def text_lines(text: str, width: int, most: int = TEXT_LINES) -> list[str]:
    """A text's first lines, wrapped; what is cut off is counted."""
    lines: list[str] = []
    used = 0
    for line in text[: 4 * width * most].splitlines(keepends=True):
        shown = clean(line.rstrip("\r\n").replace("\t", "    "))
        for piece in _pieces(shown, width) if shown.strip() else ():
            if len(lines) == most:
                return _with_rest(lines, len(text), width)
            lines.append(piece)
        used += len(line)
    return _with_rest(lines, len(text), width) if used < len(text) else lines or ['""']


def _with_rest(lines: list[str], length: int, width: int) -> list[str]:
    note = f" … ({length:,} characters)"
    if len(note) > width // 2:
        note = "…"
    last = lines[-1] if lines else ""
    return [*lines[:-1], (_pieces(last, max(1, width - len(note)))[0] + note).strip()]


def _pieces(text: str, width: int) -> list[str]:
    """The text in pieces of at most so many cells; a mark that takes no cell counts as one, for any number can follow
    a letter."""
    pieces, start, used = [], 0, 0
    for i, character in enumerate(text):
        cells = max(1, cell_len(character))
        if used + cells > width and i > start:
            pieces.append(text[start:i])
            start, used = i, 0
        used += cells
    return [*pieces, text[start:]]


def cut(text: str, width: int) -> str:
    """The beginning of a text as one line of at most so many cells."""
    shown = clean(text[: 4 * width])
    pieces = _pieces(shown, width)
    if len(pieces) == 1 and len(text) <= 4 * width:
        return shown
    return _pieces(shown, max(1, width - 1))[0] + "…"


def in_words(value: Any, depth: int = 0) -> str:
    """Any other value: lists with their sizes, mappings by their keys, everything shortened and none too deep."""
    if depth > _MOST_DEPTH:
        return "…"
    if value is None:
        return "null"
    if isinstance(value, bytes):
        return f"{len(value):,} bytes"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple | np.ndarray):
        return _list_in_words(value, depth)
    if isinstance(value, dict):
        inner = ", ".join(f"{key}: {in_words(item, depth + 1)}" for key, item in list(value.items())[:_SHOWN_ITEMS])
        return "{" + inner + (", …}" if len(value) > _SHOWN_ITEMS else "}")
    return str(value)


def _list_in_words(values: Sequence[Any] | np.ndarray[Any, Any], depth: int) -> str:
    shape = _shape(values)
    shown = [in_words(item, depth + 1) for item in list(_flat(values, len(shape)))[:_SHOWN_NUMBERS]]
    more = math.prod(shape) > len(shown)
    size = "×".join(map(str, shape))
    return f"[{', '.join(shown)}{', …' if more else ''}]" + (f" {size}" if more or len(shape) > 1 else "")


def _shape(values: Any) -> tuple[int, ...]:
    """The sizes of nested lists, as far as the first items tell."""
    sizes: list[int] = []
    while isinstance(values, list | tuple | np.ndarray) and len(sizes) < 8:
        sizes.append(len(values))
        if not len(values):
            break
        values = values[0]
    return tuple(sizes)


def _flat(values: Any, depth: int) -> Iterator[Any]:
    """The first items of nested lists."""
    for item in values[:_SHOWN_NUMBERS]:
        if depth > 1 and isinstance(item, list | tuple | np.ndarray):
            yield from _flat(item, depth - 1)
        else:
            yield item.item() if isinstance(item, np.generic) else item


def _turns(value: Any) -> list[str]:
    """The turns of a conversation, empty if it is none."""
    if not isinstance(value, list | tuple) or not all(isinstance(v, dict) for v in value):
        return []
    for who, what in (("role", "content"), ("from", "value")):
        if all(turn.get(who) is not None for turn in value):
            return [f"{turn[who]}: {_content(turn, who, what)}" for turn in value]
    return []


def _content(turn: Mapping[str, Any], who: str, what: str) -> str:
    content = turn.get(what)
    more = {key: value for key, value in turn.items() if key not in (who, what) and value is not None}
    shown = content if isinstance(content, str) else in_words(content)
    return shown + (f" {in_words(more)}" if more else "")


def token_lines(tokens: Sequence[tuple[str, bool]], width: int) -> Iterator[str]:
    """Which tokens count in the loss: a line of + for those that do, of - for those between them, in their order."""
    yield f"{sum(counts for _, counts in tokens):,} of {len(tokens):,} tokens count in the loss (+)"
    for counts, run in itertools.groupby(tokens, key=lambda pair: pair[1]):
        words = "|".join(clean(token.replace("\n", "\\n")) for token, _ in run)
        for i, line in enumerate(text_lines(words, width - 2)):
            yield f"{('+' if counts else '-') if i == 0 else ' '} {line}"


def image_words(value: Any) -> str | None:
    """What is to be said of an image in bytes or as {bytes, path}; None for anything else. Nothing is decoded."""
    struct = value if isinstance(value, dict) and value.keys() <= {"bytes", "path"} else {"bytes": value}
    data, path = struct.get("bytes"), struct.get("path")
    if data is None and isinstance(path, str):
        return f"image in {path}"
    if not isinstance(data, bytes):
        return None
    try:
        known, width, height = image_facts("image", data)
    except BadRow:
        return None
    except ImportError:  # without Pillow
        known, width, height = "image", 0, 0
    size = f"{known} {width}×{height}" if width else known
    return f"{size}, {len(data):,} bytes" + (f", {path}" if isinstance(path, str) else "")


def as_json(value: Any, depth: int = 0) -> Any:
    """A value of what JSON has: bytes by their number, arrays as lists."""
    if depth > _MOST_JSON_DEPTH:
        return "…"
    if isinstance(value, bytes):
        return {"bytes": len(value)} | ({"image": words} if (words := image_words(value)) else {})
    if isinstance(value, np.ndarray):
        return as_json(value.tolist(), depth)
    if isinstance(value, np.generic):
        return as_json(value.item())
    if isinstance(value, dict):
        return {json_key(key): as_json(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item, depth + 1) for item in value]
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


def json_key(key: Any) -> str:
    return key if isinstance(key, str) else dumps(key, default=str)
