"""The forms of conversations: each becomes messages with role and content, or is quarantined with the reason."""

from __future__ import annotations

import json

import pytest

from assay.corpus.errors import BadRow
from assay.recipe.chat_template import ChatTemplate
from assay.recipe.tasks.conversations import ChatEncoder
from assay.recipe.tasks.documents import Limits
from assay.recipe.tasks.messages import check_conversation, check_messages, looks_like_messages
from tests.recipe.tasks.chat_tokenizers import MARKED, PLAIN, word_tokenizer

PLAIN_FORM = [
    {"role": "system", "content": "dig"},
    {"role": "user", "content": "gold?"},
    {"role": "assistant", "content": "yes."},
    {"role": "user", "content": "here?"},
    {"role": "assistant", "content": "no"},
]
SPEAKERS = {"system": "system", "user": "human", "assistant": "gpt"}
SHAREGPT = [{"from": SPEAKERS[m["role"]], "value": m["content"]} for m in PLAIN_FORM]
PARTS = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in PLAIN_FORM]
# As a table saves them that other rows give more keys.
WITH_NULLS = [{**m, "role": None, "content": None, "weight": None} for m in SHAREGPT]
PARTS_WITH_NULLS = [
    {"role": m["role"], "content": [{"type": "text", "text": m["content"], "image_url": None}]} for m in PLAIN_FORM
]


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["plain", "marked"])
@pytest.mark.parametrize("loss_on", ["assistant", "completion", "all"])
def test_every_form_is_the_same_sample_bit_for_bit(template, loss_on):
    tokenizer = word_tokenizer(template)
    reader = Limits(tokenizer, 64, "right", 1000, "models.m")
    own = ChatEncoder("chat", None, loss_on, ChatTemplate("models.m", tokenizer), reader)
    (plain,) = own.encode([(PLAIN_FORM,)])
    forms = [SHAREGPT, PARTS, WITH_NULLS, PARTS_WITH_NULLS]
    for other in own.encode([(form,) for form in [*forms, *map(json.dumps, forms)]]):
        assert other.length == plain.length
        assert other.data.ids.tolist() == plain.data.ids.tolist()
        assert other.data.predicted.tolist() == plain.data.predicted.tolist()


@pytest.mark.parametrize(
    ("speakers", "role"),
    [
        (("human", "user"), "user"),
        (("gpt", "assistant", "model", "chatgpt", "bing", "bard"), "assistant"),
        (("system",), "system"),
        (("tool", "function", "observation"), "tool"),
    ],
)
def test_who_speaks_in_sharegpts_form(speakers, role):
    for speaker in speakers:
        message = {"weight": 1, "value": "dig", "from": speaker}
        (made,) = check_messages("chat", [message])
        assert list(made.items()) == [("weight", 1), ("content", "dig"), ("role", role)]


def test_parts_are_one_text_with_nothing_between_them():
    parts = [{"type": "text", "text": "is it"}, {"type": "text", "text": " gold?", "cache_control": {"type": "x"}}]
    for message in ({"role": "user", "content": parts}, {"from": "human", "value": parts}):
        assert check_messages("chat", [message]) == [{"role": "user", "content": "is it gold?"}]


def test_a_plain_message_may_say_where_it_is_from():
    message = {"role": "user", "content": "dig", "from": "the forum"}
    assert check_messages("chat", [message, PLAIN_FORM[2]]) == [message, PLAIN_FORM[2]]


MIXED = "chat has messages of role and content and some of from and value; expected one form"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([SHAREGPT[0], PLAIN_FORM[1]], MIXED),
        ([PLAIN_FORM[0], SHAREGPT[1]], MIXED),
        ([{**PLAIN_FORM[0], **SHAREGPT[1]}], MIXED),
        ([{**SHAREGPT[0], "role": "user"}], MIXED),
        (
            [{"from": "human", "content": "dig"}],
            "chat[0] has no role (it has content, from); expected role and content",
        ),
        ([{"role": "user", "value": "dig"}], "chat[0] has no content"),
        ([{"from": "human"}], "chat[0] has no value; expected from and value, or role and content"),
        ([{"from": None, "value": "dig"}], "chat[0] has no from; expected from and value, or role and content"),
        ([SHAREGPT[0], {"from": "function_call", "value": "{}"}], "chat[1] is from 'function_call', which is no known"),
        ([{"from": "Human", "value": "dig"}], "chat[0] is from 'Human', which is no known role; expected human, user"),
        ([{"from": 7, "value": "dig"}], "chat[0] is from 7, which is no known role"),
        ([{"from": "human", "value": 7}], "chat[0].value is of type int, expected a text"),
        ([{"role": "user", "content": []}], "chat[0].content is an empty list, expected a text"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}],
            "chat[0].content[1] is of type 'image'; of a content's parts only those of type 'text' are read",
        ),
        ([{"from": "human", "value": [{"type": "image_url"}]}], "chat[0].value[0] is of type 'image_url'"),
        ([{"role": "user", "content": [{"text": "dig"}]}], "chat[0].content[0] is of type None"),
        ([{"role": "user", "content": ["dig"]}], "chat[0].content[0] is of type str, expected a part with type and"),
        ([{"role": "user", "content": [{"type": "text"}]}], "chat[0].content[0].text is of type NoneType, expected a"),
    ],
)
def test_what_is_not_unambiguous_is_quarantined(value, expected):
    for form in (value, json.dumps(value)):
        with pytest.raises(BadRow) as caught:
            check_messages("chat", form)
        assert str(caught.value).startswith(expected)
        assert len(str(caught.value)) < 300


def test_long_names_of_roles_are_cut():
    with pytest.raises(BadRow) as caught:
        check_messages("chat", [{"from": "r\n" * 10_000, "value": "dig"}])
    assert len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)


def test_the_parts_of_a_conversation_are_of_one_form():
    assert check_conversation([("ask", SHAREGPT[1:2]), ("answer", SHAREGPT[2:3])]) == [PLAIN_FORM[1:2], PLAIN_FORM[2:3]]
    with pytest.raises(BadRow, match=r"^ask with answer has messages of role and content and some of from and value"):
        check_conversation([("ask", SHAREGPT[1:2]), ("answer", PLAIN_FORM[2:3])])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (json.dumps(PLAIN_FORM), True),
        (" " + json.dumps(SHAREGPT), True),
        ("[]", False),
        ("[1]", False),
        ('[{"a": 1}]', False),
        ('{"role": "user"}', False),
        ("[" * 100_000, False),
        ("[" + '{"role": 1},' * 100_000 + "{}]", False),
        ("gold", False),
        ("", False),
    ],
)
def test_texts_that_are_messages(text, expected):
    assert looks_like_messages(text) == expected
