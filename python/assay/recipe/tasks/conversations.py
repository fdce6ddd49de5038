"""Conversations: lists of messages, through the tokenizer's chat template."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np

from assay.corpus.checks import check_text, shown
from assay.corpus.errors import BadRow
from assay.recipe.chat_template import ChatTemplate, Span, chat_behaviour
from assay.recipe.tasks.base import Encoded, attempt
from assay.recipe.tasks.documents import Limits, TokenEncoder, ends, holding
from assay.recipe.tasks.messages import check_conversation, check_messages, check_tools
from assay.recipe.tasks.text_rows import each_good
from assay.recipe.tool_calls import Message

LossOn = Literal["all", "completion", "assistant"]
_Find = Callable[[Sequence[Message], Any], tuple[str, list[Span]]]

# Roles of which a template may make what it likes, as of any that it names; another's words must show in the text.
_ROLES = ("system", "user", "assistant")
# What a message does beside saying something; OpenAI's older form has the latter.
_CALLS = {"tool_calls": "tool calls", "function_call": "a function_call"}


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

    def _render(self, *row: Any) -> _Conversation:
        messages, tools = check_messages(self._what, row[0]), check_tools(self.columns[-1], *row[1:])
        names = [f"{self._what}[{i}]" for i in range(len(messages))]
        find = self._template.completion if self._loss_on == "completion" else self._template.assistant
        return self._conversation(names, messages, tools, find)

    def _conversation(self, names: Sequence[str], messages: list[Message], tools: Any, find: _Find) -> _Conversation:
        """``find`` says which characters count, unless all do; ``names`` is what errors call the messages."""
        for key, what in _CALLS.items():
            called = [name for name, message in zip(names, messages, strict=True) if message.get(key)]
            if called and not self._template.knows(key):
                raise BadRow(f"{called[0]} has {what}, which the chat template makes nothing of")
        try:
            everything = self._loss_on == "all"
            text, spans = (self._template.render(messages, tools).text, None) if everything else find(messages, tools)
        except BadRow as fault:
            raise BadRow(f"{self._what}: {fault}") from fault
        check_text(self._what, text)
        for name, message in zip(names, messages, strict=True):
            role, said = message["role"], message.get("content") or ""
            if not (role in _ROLES or self._template.names(role)) and said.strip() not in text:
                raise BadRow(f"{name}: the chat template leaves out what {shown(role)} says")
        return _Conversation(text, spans)

    def _in_tokens(self, texts: list[str]) -> list[Any]:
        encoded = self._tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        return list(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))

    def _sample(self, row: _Conversation, cut: Any) -> Encoded | BadRow:
        ids, offsets = cut
        predicted = np.ones(len(ids), bool) if row.spans is None else holding(offsets, row.spans)
        return self._cut(ids, predicted)


class PromptChatEncoder(ChatEncoder):
    """Prompts and completions that are lists of messages, as one conversation.

    What the completion adds to the prompt counts, the prompt for the assistant not: TRL's ``completion_only_loss``.
    With ``loss_on: assistant`` only the assistant's turns in it do: TRL's ``assistant_only_loss`` beside the former.
    """

    def __init__(
        self, prompt: str, completion: str, tools: str | None, loss_on: LossOn, template: ChatTemplate, reader: Limits
    ) -> None:
        super().__init__(prompt, tools, loss_on, template, reader)
        self.columns = (prompt, completion, *self.columns[1:])
        self._what = f"{prompt} with {completion}"

    def _render(self, *row: Any) -> _Conversation:
        before, after, *given = self.columns
        parts = check_conversation([(before, row[0]), (after, row[1])])
        tools = check_tools(given[0], row[2]) if given else None
        if parts[1][0]["role"] != "assistant":
            raise BadRow(f"{after} begins with a turn of {shown(parts[1][0]['role'])}, expected one of 'assistant'")
        names = [f"{name}[{i}]" for name, own in zip((before, after), parts, strict=True) for i in range(len(own))]
        find = self._template.added if self._loss_on == "completion" else self._template.assistant
        return self._conversation(names, [*parts[0], *parts[1]], tools, partial(find, since=len(parts[0])))
