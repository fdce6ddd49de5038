"""HTML built of elements, into which text and attributes come through one function."""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Sequence


class Html(str):
    """Markup of ours. Any other string is text, whatever it looks like."""

    __slots__ = ()


_VOID = frozenset({"meta", "img", "br"})


def escaped(text: str) -> str:
    """Text that may come from strangers, as good inside an element as inside a quoted attribute."""
    return html.escape(visible(text), quote=True)


def visible(text: str) -> str:
    """Text as a page may show it, which is not yet markup.

    Line breaks stay. Other control characters, overrides of the writing direction, whatever has no shape of its own
    and halves of surrogate pairs are shown by their numbers, as the terminal's lines have them.
    """
    return "".join(c if _is_shown(c) else c.encode("unicode_escape").decode() for c in text)


def _is_shown(character: str) -> bool:
    return character.isprintable() or character == "\n" or unicodedata.category(character) == "Zs"


def element(name: str, /, *children: str, **attributes: str) -> Html:
    """An element. ``class_`` is the attribute class, and ``http_equiv`` is http-equiv."""
    keys = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items()}
    start = "".join([name, *(f' {key}="{escaped(value)}"' for key, value in keys.items())])
    if name in _VOID:
        return Html(f"<{start}>")
    return Html(f"<{start}>{join(*children)}</{name}>")


def join(*children: str) -> Html:
    """One after another: markup as it is, text escaped."""
    return Html("".join(child if isinstance(child, Html) else escaped(child) for child in children))


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]], class_: str = "") -> Html:
    """A table that scrolls in a box of its own. The first cell of a row is its head; a cell that is a ``<td>`` or a
    ``<th>`` already stays as it is."""
    lines = [element("tr", *(element("th", cell, scope="col") for cell in head))]
    for first, *others in rows:
        cells = (cell if isinstance(cell, Html) and cell.startswith("<td") else element("td", cell) for cell in others)
        lines.append(element("tr", element("th", first, scope="row"), *cells))
    inner = element("table", element("thead", lines[0]), element("tbody", *lines[1:]))
    return element("div", inner, class_=f"scroll {class_}".rstrip(), tabindex="0")
