"""A tokenizer's chat template: conversations as text, and which characters of it the assistant wrote.

The template is a stranger's program. transformers renders it in its sandbox, from plain JSON alone.
"""

from __future__ import annotations

import contextlib
import datetime
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from assay._lazy import require
from assay.corpus.checks import shown
from assay.corpus.errors import BadRow
from assay.recipe.errors import EngineError
from assay.recipe.library_calls import bounded_memory
from assay.recipe.model_files import one_line
from assay.recipe.tool_calls import PROBED_TOOL, CallForms, Message, find_forms

Span = tuple[int, int]

TODAY = datetime.datetime(2024, 7, 26)
"""What a template gets that asks for the date (Llama's takes it without a clock): no score follows the clock."""

_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_LONGEST = 1 << 28
_HEADROOM = 2 << 30  # bytes: other threads go on meanwhile
_QUESTION, _ANSWER = "How much is two and two?", "It is four."


class Rendered(NamedTuple):
    """A conversation as text, and the parts of it that a template with generation marks says the assistant wrote."""

    text: str
    marks: list[Span]


class ChatTemplate:
    """The template of one tokenizer.

    Args:
        key: what errors call the model that the tokenizer is of.
        tokenizer: of transformers.
        tools: whether conversations may come with tools.

    Raises:
        EngineError: there is no template, it fails on a plain question and answer, or it makes nothing of tools.
    """

    def __init__(self, key: str, tokenizer: Any, tools: bool = False) -> None:
        self._key, self._tokenizer = key, tokenizer
        self._lock = threading.Lock()  # a template's marks are noted in one place
        self._plain = self._source(None)
        self._with_tools = self._source([{}]) if tools else self._plain
        if tools and "tools" not in self._with_tools:
            raise EngineError(
                f"task.tools_column: the chat template of {key} makes nothing of tools; leave the key out"
            )
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        self._ends = tuple(token.content for token in added if token.special and token.content)
        self._forms = CallForms()
        self._probe = self._find_probe()
        if self.knows("tool_calls"):
            tool = None if self._with_tools == self._plain else [PROBED_TOOL]
            self._forms = find_forms(lambda messages: self.render(messages, tool).text, self._probe[:-1])

    def _source(self, tools: Any) -> str:
        if getattr(self._tokenizer, "chat_template", None) is None:
            raise EngineError(
                f"{self._key}: its tokenizer has no chat template, without which task.messages_column means nothing; "
                "take the files of a tokenizer that has one (the chat model's), or task.text_column"
            )
        try:
            source = self._tokenizer.get_chat_template(None, tools=tools)
        except ValueError as error:
            raise EngineError(f"{self._key}: its chat template cannot be told ({one_line(error)})") from error
        if not isinstance(source, str) or not source:
            raise EngineError(f"{self._key}: its chat template is {type(source).__name__}, expected a text with words")
        return source

    def knows(self, word: str) -> bool:
        """Whether the template speaks of ``word`` at all."""
        return word in self._plain or word in self._with_tools

    def names(self, role: str) -> bool:
        """Whether the template has the role as a word of its own, between quotes."""
        return any(f"{quote}{role}{quote}" in source for quote in "'\"" for source in (self._plain, self._with_tools))

    def render(self, messages: Sequence[Message], tools: Any = None, *, prompt: bool = False) -> Rendered:
        """A conversation as text; with ``prompt`` as far as the assistant's next turn.

        Raises:
            BadRow: the template refuses it, or fails.
        """
        render = require("transformers.utils.chat_template_utils", "text").render_jinja_template
        source = self._plain if tools is None else self._with_tools
        marked = bool(_MARK.search(source))
        messages = self._forms.fit(messages)
        try:
            with self._lock, bounded_memory(_HEADROOM), _one_day(source):
                (text,), marks = render(
                    [list(messages)],
                    tools=tools,
                    chat_template=source,
                    return_assistant_tokens_mask=marked,
                    add_generation_prompt=prompt,
                    **self._tokenizer.special_tokens_map,
                )
        except Exception as error:  # whatever a template, or its words for what it does not take, may raise
            raise BadRow(f"the chat template refuses it ({one_line(error)})") from error
        if len(text) > _LONGEST:
            raise BadRow(f"the chat template makes {len(text):,} characters of it, more than {_LONGEST:,}")
        return Rendered(text, list(marks[0]) if marked else [])

    def assistant(self, messages: Sequence[Message], tools: Any = None, *, since: int = 0) -> tuple[str, list[Span]]:
        """The text, and the characters of it that the assistant's turns are, those from message ``since`` on.

        A template with generation marks says so itself. With any other, a turn is what it adds to the text: from the
        conversation before it, with the prompt for the assistant, to the conversation that ends with it. What comes
        after the token that ends a turn, a line break say, is not the turn's.

        Raises:
            BadRow: the template refuses a part of it, or renders a turn differently once others follow.
        """
        whole = self.render(messages, tools)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i >= since]
        if not turns:
            raise BadRow("has no turn of the assistant")
        if not self._is_marked(tools):
            return whole.text, [self._turn(messages, i, whole.text, tools) for i in turns]
        start = self._start(messages, since, whole.text, tools) if since else 0
        return whole.text, [(max(a, start), b) for a, b in whole.marks if b > start]

    def completion(self, messages: Sequence[Message], tools: Any = None) -> tuple[str, list[Span]]:
        """The same of the last turn alone, which must be the assistant's."""
        if messages[-1]["role"] != "assistant":
            raise BadRow(f"ends with a turn of {shown(messages[-1]['role'])}, expected one of 'assistant'")
        return self.assistant(messages, tools, since=len(messages) - 1)

    def added(self, messages: Sequence[Message], tools: Any = None, *, since: int) -> tuple[str, list[Span]]:
        """The text, and all that the messages from ``since`` on add to those before with the prompt for the assistant.

        Raises:
            BadRow: the template refuses a part of it, or makes something else of the prompt once others follow.
        """
        text = self.render(messages, tools).text
        return text, [(self._start(messages, since, text, tools), len(text))]

    def _start(self, messages: Sequence[Message], since: int, whole: str, tools: Any) -> int:
        before = self.render(messages[:since], tools, prompt=True).text
        if not whole.startswith(before):
            raise BadRow(
                "what the chat template makes of the prompt alone is not how it begins both, so that the completion's "
                "tokens cannot be told"
            )
        return len(before)

    def _is_marked(self, tools: Any) -> bool:
        return bool(_MARK.search(self._plain if tools is None else self._with_tools))

    def _turn(self, messages: Sequence[Message], i: int, whole: str, tools: Any) -> Span:
        if i == 0:
            raise BadRow("begins with a turn of the assistant, which the chat template marks no tokens of")
        before = self.render(messages[:i], tools, prompt=True).text
        after = whole if i == len(messages) - 1 else self.render(messages[: i + 1], tools).text
        if not (whole.startswith(after) and after.startswith(before)):
            remedy = "; loss_on: completion takes the last turn alone" if i < len(messages) - 1 else ""
            raise BadRow(
                f"the chat template marks no tokens as the assistant's, and what it makes of turn {i + 1} is not what "
                f"it adds to the turns before, so that the turn's tokens cannot be told{remedy}"
            )
        turn = after[len(before) :]
        cut = turn.rstrip()
        return len(before), len(before) + len(cut if cut.endswith(self._ends) else turn)

    def _find_probe(self) -> list[Message]:
        """The first plain conversation that the template takes."""
        exchange = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
        fault: BadRow | None = None
        for messages in (exchange, [{"role": "system", "content": "Be brief."}, *exchange]):
            try:
                text = self.render(messages).text
            except BadRow as error:
                fault = fault or error
                continue
            if _QUESTION in text and _ANSWER in text:
                return messages
            fault = fault or BadRow("a question and an answer do not come out of it again")
        raise EngineError(f"{self._key}: its chat template cannot be used: {fault}") from fault

    def check_assistant(self, *, last: bool) -> str | None:
        """Try out on one exchange whether the assistant's tokens can be told, and on two.

        Returns:
            What will be wrong with conversations of several turns, if all turns are wanted and not the ``last`` alone.

        Raises:
            EngineError: they cannot.
        """
        return self._try_out(self.completion if last else self.assistant)

    def check_added(self) -> str | None:
        """The same of an answer's tokens after what comes before it."""
        return self._try_out(lambda messages: self.added(messages, since=len(messages) - 1))

    def _try_out(self, find: Callable[[list[Message]], tuple[str, list[Span]]]) -> str | None:
        try:
            text, spans = find(self._probe)
        except BadRow as fault:
            raise EngineError(f"{self._key}: its chat template is not prefix-stable: {fault}") from fault
        if not any(_ANSWER in text[a:b] and _QUESTION not in text[a:b] for a, b in spans):
            raise EngineError(
                f"{self._key}: what its chat template marks as the assistant's are not the answer's tokens"
            )
        try:
            find([*self._probe, *self._probe[-2:]])
        except BadRow as fault:
            return str(fault)
        return None


@contextlib.contextmanager
def _one_day(source: str) -> Iterator[None]:
    """The template is told that it is always the same day."""
    if "strftime_now" not in source:
        yield
        return
    compile_ = require("transformers.utils.chat_template_utils", "text")._compile_jinja_template
    words: dict[str, Any] = compile_(source).environment.globals
    own = words["strftime_now"]
    words["strftime_now"] = TODAY.strftime
    try:
        yield
    finally:
        words["strftime_now"] = own


def chat_behaviour(tokenizer: Any) -> Mapping[str, Any]:
    """What decides the text that a conversation becomes."""
    tokens = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return {"chat_template": tokenizer.chat_template, "special_tokens": tokens}
