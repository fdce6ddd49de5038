"""Which tasks columns allow, by their types and names."""

from __future__ import annotations

import pytest

from assay.corpus.format import ColumnFacts
from assay.recipe.draft.columns import Columns
from assay.recipe.draft.readings import readings

TURNS = "list<struct<role: string, content: string>>"
SHAREGPT = "list<struct<from: string, value: string>>"
COLORS = ("red", "green")


def read(**columns) -> list[tuple]:
    facts = {name: kind if isinstance(kind, ColumnFacts) else ColumnFacts(kind) for name, kind in columns.items()}
    return [(reading.task, reading.use, dict(reading.keys)) for reading in readings(Columns(facts))]


TEXT = ("causal_lm", "causal_lm", {"text_column": "text"})


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"text": "string"}, [TEXT]),
        ({"id": "string", "text": "string", "url": "string"}, [TEXT]),
        ({"whatever": "string", "n": "int64"}, [("causal_lm", "causal_lm", {"text_column": "whatever"})]),
        ({"messages": TURNS}, [("causal_lm", "causal_lm", {"messages_column": "messages"})]),
        ({"talk": TURNS, "n": "int64"}, [("causal_lm", "causal_lm", {"messages_column": "talk"})]),
        ({"conversations": SHAREGPT}, [("causal_lm", "causal_lm", {"messages_column": "conversations"})]),
        (
            {"talk": "list<struct<value: list<struct<type: string, text: string>>, from: string>>"},
            [("causal_lm", "causal_lm", {"messages_column": "talk"})],
        ),
        ({"mails": "list<struct<from: string, body: string>>"}, []),
        ({"messages": "mixed", "prompt": "mixed"}, [("causal_lm", "causal_lm", {"messages_column": "messages"})]),
        (
            {"prompt": TURNS, "completion": TURNS},
            [("causal_lm", "causal_lm", {"prompt_column": "prompt", "completion_column": "completion"})],
        ),
        (
            {"instruction": "string", "input": "string", "output": "string"},
            [("causal_lm", "causal_lm", {"prompt_column": "instruction", "completion_column": "output"})],
        ),
        (
            {"Prompt": "string", "Response": "string"},
            [("causal_lm", "causal_lm", {"prompt_column": "Prompt", "completion_column": "Response"})],
        ),
        (
            {"text": "string", "label": ColumnFacts("int64", COLORS)},
            [("classification", "text classification", {"text_column": "text", "label_column": "label"}), TEXT],
        ),
        (
            {"pixels": "list<double>", "label": "int64"},
            [
                ("classification", "numbers", {"input_column": "pixels", "label_column": "label"}),
                ("regression", "numbers", {"input_column": "pixels", "target_column": "label"}),
            ],
        ),
        (
            {"image": "image", "species": ColumnFacts("int64", COLORS)},
            [("classification", "image classification", {"image_column": "image", "label_column": "species"})],
        ),
        (
            {"png": "binary", "txt": "string"},
            [
                ("contrastive", "contrastive", {"image_column": "png", "text_column": "txt"}),
                ("causal_lm", "causal_lm", {"text_column": "txt"}),
            ],
        ),
        (
            {"tokens": "list<string>", "ner_tags": ColumnFacts("list<int64>", COLORS)},
            [("token_classification", "token_classification", {"tokens_column": "tokens", "tags_column": "ner_tags"})],
        ),
        (
            {"tokens": "list<string>", "tags": "list<string>"},
            [("token_classification", "token_classification", {"tokens_column": "tokens", "tags_column": "tags"})],
        ),
        (
            {"features": "list<float>", "label": "double"},
            [
                ("classification", "numbers", {"input_column": "features", "label_column": "label"}),
                ("regression", "numbers", {"input_column": "features", "target_column": "label"}),
            ],
        ),
        (
            {"features": "list<float>", "price": "double"},
            [("regression", "numbers", {"input_column": "features", "target_column": "price"})],
        ),
        (
            {"image": "image", "label": "string", "path": "string"},
            [("classification", "image classification", {"image_column": "image", "label_column": "label"})],
        ),
        ({"a": "int64", "b": "timestamp[ns]"}, []),
        ({}, []),
    ],
    ids=range(23),
)
def test_columns_are_read_as(columns, expected):
    found = read(**columns)
    assert found[: len(expected)] == expected
    assert bool(found) == bool(expected)


def test_what_is_left_out_of_a_prompt_is_said():
    (pair, *_) = readings(Columns({n: ColumnFacts("string") for n in ("instruction", "input", "output")}))
    assert "without input" in pair.comments["prompt_column"]


def test_fields_of_structs_are_no_columns_of_their_own():
    facts = {"meta": ColumnFacts("struct<text: string>"), "meta.text": ColumnFacts("string")}
    assert Columns(facts).forms == {"meta": "other"}
    archive = {"png": ColumnFacts("image"), "json": ColumnFacts("struct<caption: string>")}
    archive["json.caption"] = ColumnFacts("string")
    (pair, *_) = readings(Columns(archive))
    assert pair.keys == {"image_column": "png", "text_column": "json.caption"}
    dotted = Columns({"a.b": ColumnFacts("string"), "json": ColumnFacts("string")})
    assert dotted.forms == {"a.b": "text", "json": "text"}
