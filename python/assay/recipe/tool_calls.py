"""The forms in which a chat template reads tool calls, and conversations in those.

Where data are collected a call's arguments are a text in JSON, as OpenAI has them; transformers wants a mapping.
Templates read the one, the other or both, and what many make of the form that they do not read is no error: a text in
quotes once more, a pair of braces too many, a call that is left out because a content is empty rather than null, the
word None where it is null. So each form is tried out when a template is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from assay._json import dumps
from assay.corpus.checks import check_depth
from assay.corpus.errors import BadRow

Message = dict[str, Any]

_NAME, _KEY, _VALUE, _SAID = "weigh", "shaft", "eleven", "Wait a moment."
_MAPPING = {_KEY: _VALUE}
_TEXT = dumps(_MAPPING)
PROBED_TOOL = {
    "type": "function",
    "function": {"name": _NAME, "description": "Weighs.", "parameters": {"type": "object", "properties": {}}},
}
"""The tool that is called where a template is tried out."""


@dataclass(frozen=True)
class CallForms:
    """What a template reads beside tool calls and in them; of one that cannot be told, everything."""

    mappings: bool = True
    """Arguments that are a mapping."""
    texts: bool = True
    """Arguments that are a text in JSON, as it makes of a mapping with the same in it."""
    nulls: bool = True
    """A content that is null."""
    blanks: bool = True
    """A content that is empty."""
    words: bool = True
    """A content with words in it, which come out as the calls do."""

    def fit(self, messages: Sequence[Message]) -> Sequence[Message]:
        """The messages, calls in the form that is read.

        Raises:
            BadRow: a call has none, or stands beside a text that the template does not take with it.
        """
        if not any("tool_calls" in message for message in messages):
            return messages
        return [self._fit(i, own) if "tool_calls" in own else own for i, own in enumerate(messages, start=1)]

    def _fit(self, turn: int, message: Message) -> Message:
        content = message.get("content")
        if (content or "").strip() and not self.words:
            raise BadRow(f"turn {turn} has a text and tool calls, and the chat template takes one of them only")
        fitted = {**message, "tool_calls": [self._call(turn, call) for call in message["tool_calls"]]}
        if not content and "content" in message:
            fitted["content"] = content if (self.nulls if content is None else self.blanks) else self._other(content)
        return fitted

    def _other(self, content: str | None) -> str | None:
        """An empty content for a null one, and the other way round."""
        if content is None:
            return "" if self.blanks else None
        return None if self.nulls else ""

    def _call(self, turn: int, call: Any) -> Any:
        if not isinstance(call, Mapping):
            return call
        if isinstance(call.get("function"), Mapping):
            return {**call, "function": self._call(turn, call["function"])}
        arguments = call.get("arguments")
        if isinstance(arguments, str) and self.mappings and not self.texts:
            return {**call, "arguments": _parsed(turn, arguments)}
        if isinstance(arguments, Mapping) and self.texts and not self.mappings:
            return {**call, "arguments": _written(turn, arguments)}
        return call


def _written(turn: int, arguments: Mapping[str, Any]) -> str:
    try:
        return dumps(arguments, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:  # a date, or bytes, of a Parquet struct
        raise BadRow(f"a tool call of turn {turn} has arguments without a form in JSON ({error})") from error


def _parsed(turn: int, arguments: str) -> dict[str, Any]:
    what = f"a tool call of turn {turn} has arguments"
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError) as error:
        raise BadRow(f"{what} that are a text and no JSON ({type(error).__name__})") from error
    if not isinstance(value, dict):
        raise BadRow(f"{what} that are a JSON {type(value).__name__}, expected an object")
    check_depth(what, value)
    return value


def find_forms(render: Callable[[Sequence[Message]], str], before: Sequence[Message]) -> CallForms:
    """What a template, as ``render`` runs it, reads of a call that follows ``before``. It may raise BadRow."""

    def attempt(*messages: Message) -> str:
        try:
            return render([*before, *messages])
        except BadRow:
            return ""

    def made(content: str | None, arguments: Any) -> str:
        """What it makes of a call; nothing if it does not read this form."""
        function = {"name": _NAME, "arguments": arguments}
        # Mistral's templates want calls to be called by nine characters.
        call = {"id": "call00001", "type": "function", "function": function}
        text = attempt({"role": "assistant", "content": content, "tool_calls": [call]})
        is_read = _is_read(text, arguments) and (content or "") in text and text.count("None") <= nones
        return text if is_read else ""

    nones = attempt().count("None")
    found = {content: (made(content, _MAPPING), made(content, _TEXT)) for content in (None, "", _SAID)}
    if not any(map(any, found.values())):
        return CallForms()
    mappings = any(mapping for mapping, _ in found.values())
    alike = all(mapping == text for mapping, text in found.values())
    return CallForms(mappings, alike or not mappings, *(any(found[content]) for content in (None, "", _SAID)))


def _is_read(text: str, arguments: Any) -> bool:
    if isinstance(arguments, str):
        return arguments in text
    return _KEY in text and _VALUE in text and f"'{_KEY}': " not in text  # as Python writes a mapping
