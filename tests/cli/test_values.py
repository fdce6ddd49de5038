"""Values in a terminal: no wider than it, nothing in them that acts on it, and said in few words."""

from __future__ import annotations

import functools
import importlib.util
import json
import struct
import zlib

import numpy as np
import pytest
from rich.cells import cell_len

from assay.cli.values import as_json, columns_lines, cut, image_words, text_lines, token_lines, value_lines

PILLOW = importlib.util.find_spec("PIL") is not None
HOSTILE = (
    "\x1b[2Jred\x07 \u202egnp.exe\u202c \u2066x\u2069 [bold]markup[/] \r\n\x9b31m \ud800 \u200b z\u0300\u0301\u0302" * 9
)
VALUES = [
    HOSTILE,
    "plain",
    "日本語のテキスト" * 40,
    "e" + "\u0301" * 5000,
    "a\n\n\n\tb\nc\nd\ne\nf",
    {"bytes": b"\x89PNG\r\n\x1a\n" + b"\0" * 9, "path": HOSTILE},
    [{"role": "user\x1b[1m", "content": HOSTILE}] * 20,
    {HOSTILE: HOSTILE},
    np.arange(784.0).reshape(28, 28),
    list(range(1000)),
    [HOSTILE] * 3,
    functools.reduce(lambda inner, _: {"k": [inner]}, range(400), "deep"),
    None,
    b"\x00" * 10,
    10**50,
]


@pytest.mark.parametrize("width", [40, 100])
@pytest.mark.parametrize("value", VALUES, ids=range(len(VALUES)))
def test_no_line_is_wider_than_the_terminal_or_acts_on_it(value, width):
    lines = [*value_lines(value, width), cut(str(value), width), *columns_lines({HOSTILE: value}, width, {})]
    lines += token_lines([(HOSTILE, True), (str(value), False)], width)
    assert lines
    for line in lines:
        assert line.isprintable()
        assert cell_len(line) <= width
    assert json.dumps(as_json(value))


def test_a_text_is_wrapped_and_what_is_cut_off_is_counted():
    assert text_lines("one\n\ntwo\tx\n", 20) == ["one", "two    x"]
    assert text_lines("", 20) == ['""']
    assert text_lines("abcdef", 3) == ["abc", "def"]
    lines = text_lines("word " * 100, 40)
    assert len(lines) == 4
    assert lines[-1].endswith(" … (500 characters)")
    assert text_lines("\n" * 1000, 60) == ["… (1,000 characters)"]
    assert cut("x" * 50, 10) == "x" * 9 + "…"
    assert cut("x" * 10, 10) == "x" * 10


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (np.arange(784.0).reshape(28, 28), "[0, 1, 2, 3, 4, 5, …] 28×28"),
        ([1, 2, 3], "[1, 2, 3]"),
        ([], "[]"),
        (["a", "b"], "[a, b]"),
        (None, "null"),
        (0.123456789, "0.123457"),
        (b"abc", "3 bytes"),
        ({"a": 1, "b": [1.5]}, "{a: 1, b: [1.5]}"),
    ],
)
def test_other_values_in_few_words(value, shown):
    assert value_lines(value, 80) == [shown]


def test_a_class_has_its_name_and_a_conversation_its_turns():
    assert value_lines(1, 80, ["cat", "dog"]) == ["1 (dog)"]
    assert value_lines(2, 80, ["cat", "dog"]) == ["2"]
    assert value_lines(True, 80, ["cat", "dog"]) == ["True"]
    (ragged,) = value_lines([[0, 1], [1]], 80, ["cat", "dog"])
    assert ragged.count("dog") == 2
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello", "tool_calls": None}]
    assert value_lines(turns, 80) == ["user: Hi", "assistant: Hello"]
    shared = [{"from": "human", "value": "Hi", "role": None}, {"from": "gpt", "value": "Hello", "weight": 1}]
    assert value_lines(shared, 80) == ["human: Hi", "gpt: Hello {weight: 1}"]
    assert value_lines([{"role": "user", "content": "Hi"}] * 11, 80)[-1] == "… 3 more turns"


def png(width: int, height: int) -> bytes:
    """A black image."""
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = [(b"IHDR", head), (b"IDAT", zlib.compress(bytes(height * (width + 1)))), (b"IEND", b"")]
    chunks = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_an_image_is_its_kind_and_size():
    data = png(72, 48)
    kind = "PNG 72×48" if PILLOW else "image"
    assert image_words(data) == f"{kind}, {len(data)} bytes"
    assert image_words({"bytes": data, "path": "a.png"}) == f"{kind}, {len(data)} bytes, a.png"
    assert image_words({"bytes": None, "path": "a.png"}) == "image in a.png"
    assert image_words(b"text") is None
    assert value_lines(b"\x89PNG\r\n\x1a\nxx", 80) == ["10 bytes" if PILLOW else "image, 10 bytes"]
    assert image_words({"bytes": data, "other": 1}) is None


def test_tokens_that_count_stand_on_lines_of_their_own():
    tokens = [("<user>", False), ("Hi", False), ("Hel", True), ("lo\n", True), ("<end>", False)]
    assert list(token_lines(tokens, 60)) == [
        "2 of 5 tokens count in the loss (+)",
        "- <user>|Hi",
        "+ Hel|lo\\n",
        "- <end>",
    ]


def test_as_json_is_plain():
    data = png(1, 1)
    value = {"x": np.float32(0.5), "image": data, 3: [np.int64(2), (1.5, None)], "a": np.ones((2, 2))}
    assert as_json(value) == {
        "x": 0.5,
        "image": {"bytes": len(data), "image": f"{'PNG 1×1' if PILLOW else 'image'}, {len(data)} bytes"},
        "3": [2, [1.5, None]],
        "a": [[1.0, 1.0], [1.0, 1.0]],
    }
