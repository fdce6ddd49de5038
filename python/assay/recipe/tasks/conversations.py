"""Conversations: lists of messages, through the tokenizer's chat template."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from assay.corpus.checks import check_depth, check_text, shown
from assay.corpus.errors import BadRow
from assay.recipe.chat_template import ChatTemplate, Message, Span, chat_behaviour
from assay.recipe.model_files import shortened
from assay.recipe.tasks.base import Encoded, attempt
from assay.recipe.tasks.documents import Limits, TokenEncoder, ends, holding
from assay.recipe.tasks.text_rows import each_good

LossOn = Literal["all", "completion", "assistant"]

# Roles of which a template may make what it likes, as of any that it names; another's words must show in the text.
_ROLES = ("system", "user", "assistant")


class _Conversation(NamedTuple):
    """A conversation as text, and which characters of it count; None: all."""

    text: str
    spans: list[Span] | None


class ChatEncoder(TokenEncoder):
    """Conversations to tokens. The template alone says which special tokens there are."""

    def __init__(
        self, messages: str, tools: str | None, loss_on: LossOn, template: ChatTemplate, reader: Limits
    ) -> None:
        super().__init__((messages,) if tools is None else (messages, tools), messages, reader)
        self._loss_on, self._template = loss_on, template
        self.optional: frozenset[str] = frozenset() if tools is None else frozenset([tools])

    def _more_behaviour(self) -> dict[str, Any]:
        return ends(self._tokenizer) | dict(chat_behaviour(self._tokenizer))

    def encode(self, rows: Sequence[tuple[Any, ...]]) -> list[Encoded | BadRow]:
        rendered = [attempt(self._render, *row) for row in rows]
        texts = [row if isinstance(row, BadRow) else row.text for row in rendered]
        cut = zip(rendered, each_good(texts, self._in_tokens, self._what), strict=True)
        return [
            own if isinstance(row, BadRow) or isinstance(own, BadRow) else self._sample(row, own) for row, own in cut
        ]

    def _render(self, value: Any, given: Any = None) -> _Conversation:
        messages, tools = check_messages(self._what, value), check_tools(self.columns[-1], given)
        if not self._template.knows("tool_calls"):
            for i, message in enumerate(messages):
                if "tool_calls" in message:
                    raise BadRow(f"{self._what}[{i}] has tool calls, which the chat template makes nothing of")
        try:
            text, spans = self._mark(messages, tools)
        except BadRow as fault:
            raise BadRow(f"{self._what}: {fault}") from fault
        check_text(self._what, text)
        for i, message in enumerate(messages):
            role, said = message["role"], message.get("content") or ""
            if not (role in _ROLES or self._template.names(role)) and said.strip() not in text:
                raise BadRow(f"{self._what}[{i}]: the chat template leaves out what {shown(role)} says")
        return _Conversation(text, spans)

    def _mark(self, messages: list[Message], tools: Any) -> tuple[str, list[Span] | None]:
        if self._loss_on == "all":
            return self._template.render(messages, tools).text, None
        find = self._template.completion if self._loss_on == "completion" else self._template.assistant
        return find(messages, tools)

    def _in_tokens(self, texts: list[str]) -> list[Any]:
        encoded = self._tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        return list(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))

    def _sample(self, row: _Conversation, cut: Any) -> Encoded | BadRow:
        ids, offsets = cut
        predicted = np.ones(len(ids), bool) if row.spans is None else holding(offsets, row.spans)
        return self._cut(ids, predicted)


def check_messages(name: str, value: object) -> list[Message]:
    """A list of messages, each with a role and a text, or a JSON text of one.

    Keys without a value are left out: a table with the keys of all rows adds them to each. Below a message those of a
    JSON text, which has its own keys alone, remain; so does a content that is null beside tool calls.
    """
    clean = _as_is if isinstance(value, str) else _without_nulls
    value = _from_json(name, value)
    if not isinstance(value, list):
        raise BadRow(f"{name} is of type {type(value).__name__}, expected a list of messages")
    if not value:
        raise BadRow(f"{name} is empty")
    return [_check_message(f"{name}[{i}]", message, clean) for i, message in enumerate(value)]


def _check_message(name: str, value: object, clean: Callable[[Any], Any]) -> Message:
    if not isinstance(value, dict):
        raise BadRow(f"{name} is of type {type(value).__name__}, expected a message with role and content")
    message: Message = {key: clean(item) for key, item in value.items() if item is not None}
    role, content, calls = message.get("role"), message.get("content"), message.get("tool_calls")
    if not isinstance(role, str) or not role:
        has = shortened(sorted(" ".join(str(key).split()) for key in value), 6)
        raise BadRow(f"{name} has no role (it has {has or 'nothing'}); expected role and content")
    if calls is not None:
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            raise BadRow(f"{name}.tool_calls is of type {type(calls).__name__}, expected a list of mappings")
        if not calls:
            del message["tool_calls"]
    if content is None and not calls:
        raise BadRow(f"{name} has no content")
    if content is not None and not isinstance(content, str):
        raise BadRow(f"{name}.content is of type {type(content).__name__}, expected a text")
    if content is None and "content" in value:
        message["content"] = None  # as the data have it: templates ask whether it is none
    return message


def check_tools(name: str, value: object) -> list[dict[str, Any]] | None:
    """A list of tools, or a JSON text of one; None: there are none."""
    if value is None or value == "":
        return None
    clean = _as_is if isinstance(value, str) else _without_nulls
    value = _from_json(name, value)
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise BadRow(f"{name} is of type {type(value).__name__}, expected a list of tools, each a mapping")
    return [clean(tool) for tool in value] or None


def _from_json(name: str, value: object) -> Any:
    if value is None:
        raise BadRow(f"{name} is null")
    try:
        value = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise BadRow(f"{name} is a text that is no JSON ({type(error).__name__})") from error
    check_depth(name, value)
    return value


def _as_is(value: Any) -> Any:
    return value


def _without_nulls(value: Any) -> Any:
    """What a table with the keys of all rows adds to each is not there."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
