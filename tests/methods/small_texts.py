"""A pool of two kinds of texts, targets of one of them, and what is odd among texts."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from assay.methods import Views

KINDS = {
    "code": [
        "def",
        "return",
        "self",
        "the",
        "import",
        "list",
        "value",
        "Raises",
        "ValueError",
        "if",
        "None",
        "[x]",
        "{",
        "}",
        "==",
        "+=",
        "foo_bar",
    ],
    "prose": [
        "the",
        "gold",
        "of",
        "a",
        "river,",
        "was",
        "found;",
        "and",
        "Sold",
        "by",
        "weight",
        "—",
        "as",
        "“fine”",
        "silver",
        "in",
        "été",
        "too",
    ],
}


def texts_of(kind: str, count: int, seed: int) -> list[str]:
    """Half of each text's words are of its kind, the others of both."""
    rng = random.Random(f"{kind}{seed}")
    every = [word for words in KINDS.values() for word in words]
    return [
        " ".join(rng.choice(rng.choice([KINDS[kind], every])) for _ in range(rng.randint(3, 25))) for _ in range(count)
    ]


POOL: list[Any] = [*texts_of("code", 30, 0), *texts_of("prose", 30, 0), "", None, "\n", 3, b"bytes are \xff texts too"]
TARGETS = {"code": texts_of("code", 9, 1), "prose": texts_of("prose", 5, 1)}


def views(texts: Sequence[Any], size: int = 8, column: str = "text") -> list[Views]:
    return [Views(None, raw={column: list(texts[i : i + size])}) for i in range(0, len(texts), size)]


def known(texts: Sequence[Any]) -> list[str]:
    """Those that are texts with a word, as strings."""
    strings = [text.decode(errors="replace") if isinstance(text, bytes) else text for text in texts]
    return [text for text in strings if isinstance(text, str) and text.strip()]
