"""Tool calls: which forms a template reads, and what becomes of the others, against texts made by hand."""

from __future__ import annotations

import datetime
import json

import pytest

from assay.corpus.errors import BadRow
from assay.recipe.chat_template import ChatTemplate
from assay.recipe.tasks.conversations import ChatEncoder
from assay.recipe.tasks.documents import Limits
from tests.recipe.tasks.chat_tokenizers import PLAIN, word_tokenizer


def template(arguments: str, content: str = "{{ m.content or '' }}") -> str:
    """A call is `dig` and what ``arguments`` makes of its arguments ``a``."""
    call = "{% for c in m.tool_calls or [] %}{% set a = c.function.arguments %}dig" + arguments + "{% endfor %}"
    return PLAIN.replace("{{ m.content }}", content + call)


AS_JSON = "{{ a|tojson }}"
AS_IT_IS = "{{ a }}"
JOINED = "{{ '' + a }}"
EITHER = "{% if a is string %}{{ a }}{% else %}{{ a|tojson }}{% endif %}"
ITEMS = "{% for k, v in a|items %}{{ k }}:{{ v }};{% endfor %}"
# Gemma 4's: a text stands in braces of its own once more.
BRACED = "{{ '{' }}{% if a is mapping %}" + ITEMS + "{% else %}{{ a }}{% endif %}{{ '}' }}"
# As Llama 3.1's, calls or words; DeepSeek-R1's, calls where the content is none.
CALLS_OR_WORDS = template(AS_JSON, "{{ '' if m.tool_calls else m.content }}")
CALLS_OF_NONE = template(JOINED, "{{ m.content or '' }}").replace(
    "in m.tool_calls or []", "in (m.tool_calls if m.content is none else [])"
)
WRITES_NONE = template(AS_JSON, "{{ m.content }}")

MAPPING, TEXT = {"ore": 4}, '{"ore":4}'


def answered(source: str, arguments: object, **more: object) -> str:
    """What the assistant's turn becomes, or why the conversation is no sample."""
    call = {"type": "function", "function": {"name": "dig", "arguments": arguments}}
    answer = {"role": "assistant", "content": None, "tool_calls": [call], **more}
    limits = Limits(word_tokenizer(), 512, "right", 1000, "models.m")
    own = ChatEncoder("chat", None, "assistant", ChatTemplate("models.m", word_tokenizer(source)), limits)
    row = [{"role": "user", "content": "gold?"}, answer]
    (encoded,) = own.encode([(row,)])
    return str(encoded) if isinstance(encoded, BadRow) else own._render(row).text.split("<assistant>")[1][:-6]


@pytest.mark.parametrize(
    ("arguments", "of_mapping", "of_text"),
    [
        (AS_JSON, 'dig{"ore": 4}', 'dig{"ore": 4}'),
        (AS_IT_IS, 'dig{"ore": 4}', 'dig{"ore":4}'),
        (JOINED, 'dig{"ore": 4}', 'dig{"ore":4}'),
        (EITHER, 'dig{"ore": 4}', 'dig{"ore":4}'),
        (ITEMS, "digore:4;", "digore:4;"),
        (BRACED, "dig{ore:4;}", "dig{ore:4;}"),
    ],
)
def test_arguments_are_in_the_form_that_the_template_reads(arguments, of_mapping, of_text):
    assert answered(template(arguments), MAPPING) == of_mapping
    assert answered(template(arguments), TEXT) == of_text


def test_a_content_beside_calls_is_null_or_empty_as_the_template_reads_it():
    assert answered(WRITES_NONE, MAPPING) == 'dig{"ore": 4}'
    assert answered(CALLS_OF_NONE, MAPPING, content="") == 'dig{"ore": 4}'
    assert answered(CALLS_OF_NONE, MAPPING) == 'dig{"ore": 4}'
    assert answered(template(AS_JSON, "{{ 'no' if m.content is none else m.content }}"), MAPPING) == 'nodig{"ore": 4}'


def test_words_beside_calls_are_in_the_text_or_it_is_no_sample():
    assert answered(WRITES_NONE, MAPPING, content="yes") == 'yesdig{"ore": 4}'
    for source in (CALLS_OR_WORDS, CALLS_OF_NONE):
        assert answered(source, MAPPING, content="yes") == (
            "chat: turn 2 has a text and tool calls, and the chat template takes one of them only"
        )


def test_of_several_templates_the_one_for_tools_is_tried_out():
    tokenizer = word_tokenizer({"default": PLAIN, "tool_use": "{{ tools|length }}" + template(AS_JSON)})
    own = ChatTemplate("models.m", tokenizer, tools=True)
    call = {"function": {"name": "dig", "arguments": TEXT}}
    messages = [{"role": "user", "content": "gold?"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    assert own.render(messages, [{}]).text == '1<s><user>gold?<end>\n<assistant>dig{"ore": 4}<end>\n'


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("ore", "that are a text and no JSON (JSONDecodeError)"),
        ("4", "that are a JSON int, expected an object"),
        ('{"ore":' + "[" * 200 + "]" * 200 + "}", "is nested too deeply, more than 100 lists or mappings inside one "),
    ],
)
def test_arguments_that_cannot_be_read_are_no_sample(arguments, expected):
    assert answered(template(AS_JSON), arguments).startswith(f"chat: a tool call of turn 2 has arguments {expected}")
    assert answered(template(AS_IT_IS), arguments) == f"dig{arguments}"


def test_arguments_without_a_form_in_json_are_no_sample():
    dated = {"ore": datetime.date(2026, 1, 2)}
    assert answered(template(JOINED), dated).startswith(
        "chat: a tool call of turn 2 has arguments without a form in JSON (Object of type date"
    )
    assert "date" in answered(template(AS_JSON), dated)  # as the template itself says


def test_calls_of_other_forms_are_left_to_the_template():
    names = PLAIN.replace("{{ m.content }}", "{{ m.content or '' }}{{ m.tool_calls|length if m.tool_calls }}")
    assert answered(names, TEXT) == "1"
    assert answered(template(AS_JSON), [4]) == "dig[4]"
    assert answered(template(AS_JSON), MAPPING, tool_calls=None, function_call={"name": "dig"}, content="yes") == (
        "chat[1] has a function_call, which the chat template makes nothing of"
    )


def test_arguments_in_json_may_hold_anything():
    assert answered(template(AS_JSON), json.dumps({"ore": "é", "is": None})) == 'dig{"ore": "é", "is": null}'
