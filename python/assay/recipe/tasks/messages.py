"""The forms that people write conversations in, and the one that chat templates take: with role and content."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from assay.corpus.checks import check_depth, shown
from assay.corpus.errors import BadRow
from assay.recipe.model_files import shortened
from assay.recipe.tool_calls import Message

_PLAIN = ("role", "content")
_SHAREGPT = ("from", "value")
_LONGEST_LOOK = 1 << 20
# Who speaks in ShareGPT's form. What else libraries know is not the same in all of them: LLaMA-Factory's
# function_call, say, is a turn of the assistant whose text is no text.
_SPEAKERS = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "chatgpt", "bing", "bard"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "function", "observation"), "tool"),
}


def check_messages(name: str, value: object) -> list[Message]:
    """A list of messages, each with a role and a text, or a JSON text of one.

    Messages of ShareGPT's form, with ``from`` and ``value``, become those with role and content that say the same; a
    content in parts becomes their texts, one after the other. Keys without a value are left out: a table with the keys
    of all rows adds them to each. Below a message those of a JSON text, which has its own keys alone, remain; so does
    a content that is null beside tool calls.
    """
    (messages,) = check_conversation([(name, value)])
    return messages


def check_conversation(parts: Sequence[tuple[str, object]]) -> list[list[Message]]:
    """The messages of each part of one conversation, given with what errors call it; all are of one form."""
    lists = [(name, _list_of(name, value), _cleaning(value)) for name, value in parts]
    forms = {form for _, messages, _ in lists for message in messages for form in _forms(message)}
    if len(forms) > 1:
        names = " with ".join(name for name, _ in parts)
        raise BadRow(f"{names} has messages of role and content and some of from and value; expected one form")
    return [
        [_check_message(f"{name}[{i}]", message, clean) for i, message in enumerate(messages)]
        for name, messages, clean in lists
    ]


def _list_of(name: str, value: object) -> list[Any]:
    value = _from_json(name, value, "; expected a list of messages")
    if not isinstance(value, list):
        raise BadRow(f"{name} is of type {type(value).__name__}, expected a list of messages")
    if not value:
        raise BadRow(f"{name} is empty")
    return value


def _forms(message: object) -> list[tuple[str, str]]:
    """Whose form a message has; both, if it has the words of both. One of another form may have ``from`` for itself."""
    if not isinstance(message, dict):
        return []
    given = {key for key in (*_PLAIN, *_SHAREGPT) if message.get(key) is not None}
    plain, sharegpt = given.intersection(_PLAIN), given.intersection(_SHAREGPT)
    of_sharegpt = len(sharegpt) == 2 or (sharegpt and not plain)
    return [*([_PLAIN] if plain else []), *([_SHAREGPT] if of_sharegpt else [])]


def _check_message(name: str, value: object, clean: Callable[[Any], Any]) -> Message:
    if not isinstance(value, dict):
        raise BadRow(f"{name} is of type {type(value).__name__}, expected a message with role and content")
    message: Message = {key: clean(item) for key, item in value.items() if item is not None}
    text = f"{name}.content"
    if _forms(value) == [_SHAREGPT]:
        message, text = _from_sharegpt(name, message), f"{name}.value"
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
    if content is not None:
        message["content"] = _text(text, content)
    elif "content" in value:
        message["content"] = None  # as the data have it: templates ask whether it is none
    return message


def _from_sharegpt(name: str, message: Message) -> Message:
    if missing := [key for key in _SHAREGPT if key not in message]:
        raise BadRow(f"{name} has no {missing[0]}; expected from and value, or role and content")
    speaker = message["from"]
    role = _SPEAKERS.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise BadRow(f"{name} is from {shown(speaker)}, which is no known role; expected {', '.join(_SPEAKERS)}")
    names = dict(zip(_SHAREGPT, _PLAIN, strict=True))
    return {names.get(key, key): role if key == "from" else item for key, item in message.items()}


def _text(name: str, content: object) -> str:
    """A text, or parts of one. Nothing is put between them, as by the templates that take parts themselves."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadRow(f"{name} is of type {type(content).__name__}, expected a text")
    if not content:
        raise BadRow(f"{name} is an empty list, expected a text")
    return "".join(_part(f"{name}[{i}]", part) for i, part in enumerate(content))


def _part(name: str, part: object) -> str:
    if not isinstance(part, dict):
        raise BadRow(f"{name} is of type {type(part).__name__}, expected a part with type and text")
    kind, text = part.get("type"), part.get("text")
    if kind != "text":
        raise BadRow(f"{name} is of type {shown(kind)}; of a content's parts only those of type 'text' are read")
    if not isinstance(text, str):
        raise BadRow(f"{name}.text is of type {type(text).__name__}, expected a text")
    return text


def looks_like_messages(text: str) -> bool:
    """Whether a text is the JSON of a conversation; of a very long one nobody asks."""
    if len(text) > _LONGEST_LOOK or not text.lstrip().startswith("["):
        return False
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return bool(value) and all(isinstance(item, dict) and {"role", "from"} & item.keys() for item in value)


def check_tools(name: str, value: object = None) -> list[dict[str, Any]] | None:
    """A list of tools, or a JSON text of one; None: there are none."""
    if value is None or value == "":
        return None
    clean = _cleaning(value)
    value = _from_json(name, value)
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise BadRow(f"{name} is of type {type(value).__name__}, expected a list of tools, each a mapping")
    return [clean(tool) for tool in value] or None


def _from_json(name: str, value: object, expected: str = "") -> Any:
    if value is None:
        raise BadRow(f"{name} is null")
    try:
        value = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise BadRow(f"{name} is a text that is no JSON ({type(error).__name__}){expected}") from error
    check_depth(name, value)
    return value


def _cleaning(value: object) -> Callable[[Any], Any]:
    """What is done to the values of a row's messages or tools."""
    return _as_is if isinstance(value, str) else _without_nulls


def _as_is(value: Any) -> Any:
    return value


def _without_nulls(value: Any) -> Any:
    """What a table with the keys of all rows adds to each is not there."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
