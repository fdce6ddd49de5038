"""Next-token prediction over documents, completions of prompts, and conversations."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator
from torch import nn

from assay.corpus.facts import MIXED
from assay.recipe.causal_checks import check_causal_lm
from assay.recipe.chat_template import ChatTemplate, chat_behaviour
from assay.recipe.errors import EngineError
from assay.recipe.models import ModelSpec, own_tokenizers, refuse_differences
from assay.recipe.parts import located
from assay.recipe.tasks.base import TASKS, Columns, Encoder, TaskSpec
from assay.recipe.tasks.conversations import ChatEncoder, LossOn, PromptChatEncoder
from assay.recipe.tasks.documents import CompletionEncoder, Limits, TextEncoder, ends
from assay.recipe.tasks.vocabulary import check_vocabulary, embedded
from assay.tasks import CausalLM, Task
from assay.tasks.special_tokens import setting

if TYPE_CHECKING:
    from typing_extensions import Self

log = logging.getLogger("assay")

# What a sample is, by the column that says so, with what of it may count; the first is the default. Of prompts that
# are ``conversational``, everything may.
_FORMS: Mapping[str, tuple[LossOn, ...]] = {
    "text_column": ("all",),
    "messages_column": ("assistant", "completion", "all"),
    "prompt_column": ("completion", "all"),
}


@TASKS.add("causal_lm")
class CausalLMSpec(TaskSpec):
    """Texts, cut to ``max_length`` tokens, and which of their tokens count (``loss_on``).

    ``conversational`` says of prompts and completions whether they are messages; if it is left out, their columns do.
    """

    kind: Literal["causal_lm"]
    text_column: str | None = None
    messages_column: str | None = None
    tools_column: str | None = None
    prompt_column: str | None = None
    completion_column: str | None = None
    conversational: bool | None = None
    loss_on: LossOn | None = None
    max_length: Annotated[int, Field(ge=2)] = 1024
    truncate: Literal["right", "left", "drop"] = "right"
    reduction: Literal["mean", "sum"] = "mean"

    @model_validator(mode="before")
    @classmethod
    def _filled_in(cls, data: Any) -> Any:
        """A recipe without a column means ``text``; what counts follows from the column."""
        if not isinstance(data, Mapping):
            return data
        columns = ("text_column", "messages_column", "tools_column", "prompt_column", "completion_column")
        filled = dict(data)
        if all(data.get(name) is None for name in columns):
            filled["text_column"] = "text"
        if data.get("loss_on") is None:
            form = next((name for name in _FORMS if filled.get(name) is not None), "prompt_column")
            filled["loss_on"] = _FORMS[form][0]
        return filled

    @model_validator(mode="after")
    def _of_one_form(self) -> CausalLMSpec:
        forms = [name for name in _FORMS if getattr(self, name) is not None]
        expected = "one of text_column, messages_column, or prompt_column with completion_column"
        if len(forms) > 1:
            raise located((forms[1],), f"stands beside {forms[0]}; expected {expected}", getattr(self, forms[1]))
        for name, needed in (("completion_column", "prompt_column"), ("prompt_column", "completion_column")):
            if getattr(self, name) is not None and getattr(self, needed) is None:
                raise located((needed,), f"is missing; {name} goes with it", None)
        if self.tools_column is not None and (forms in ([], ["text_column"]) or self.conversational is False):
            raise located(
                ("tools_column",), "goes with messages_column alone, or with prompts of messages", self.tools_column
            )
        (form,) = forms
        if self.conversational is not None and form != "prompt_column":
            raise located(("conversational",), "goes with prompt_column", self.conversational)
        if self.loss_on not in _FORMS[form] and not self.conversational:
            more = " (assistant, with conversational: true)" if form == "prompt_column" else ""
            expected = " or ".join(_FORMS[form]) + more
            raise located(("loss_on",), f"{self.loss_on} means nothing for {form}; expected {expected}", None)
        return self

    def seen(self, columns: Columns) -> Self:
        """Prompts and completions are conversations if their columns hold lists."""
        if self.conversational is not None or self.prompt_column is None or self.completion_column is None:
            return self
        types = {name: columns[name].type for name in (self.prompt_column, self.completion_column) if name in columns}
        lists = [name for name, type_ in types.items() if type_.startswith("list<")]
        texts = [name for name, type_ in types.items() if type_ == "string"]
        if lists and texts:
            raise EngineError(
                f"task.prompt_column, task.completion_column: {lists[0]!r} holds lists, and {texts[0]!r} texts; "
                "expected messages in both, or texts (conversational: true takes texts for messages in JSON)"
            )
        told = lists or (MIXED in types.values() and not texts)
        return self.model_copy(update={"conversational": True}) if told else self

    @property
    def has_prompts(self) -> bool:
        return self.loss_on != "all"

    @property
    def auto_class(self) -> str:
        return "AutoModelForCausalLM"

    def task(self) -> Task:
        return CausalLM(reduction=self.reduction)

    def open(self, specs: Mapping[str, ModelSpec]) -> Callable[[Mapping[str, nn.Module]], Encoder]:
        tokenizer, make = self._rows(own_tokenizers(specs))
        return lambda models: self._encoder(models, tokenizer, make)

    def _encoder(self, models: Mapping[str, nn.Module], tokenizer: Any, make: Callable[[Limits], Encoder]) -> Encoder:
        for name, model in models.items():
            self._check_positions(name, model)
        vocabulary = tokenizer.get_vocab().values()
        limit, owner = min((self._check(name, model, tokenizer, vocabulary), name) for name, model in models.items())
        return make(Limits(tokenizer, self.max_length, self.truncate, limit, f"models.{owner}"))

    def _rows(self, tokenizers: Mapping[str, Any]) -> tuple[Any, Callable[[Limits], Encoder]]:
        """The tokenizer that makes tokens of rows, and how; EngineError if it cannot."""
        name, tokenizer = next(iter(tokenizers.items()))
        if self.text_column is not None:
            column = self.text_column
            return tokenizer, lambda reader: TextEncoder(column, reader)
        if not getattr(tokenizer, "is_fast", False):
            raise EngineError(
                f"models.{name}: its tokenizer ({type(tokenizer).__name__}) does not tell which characters a token is, "
                "which prompts and conversations need; take one with a tokenizer.json, or task.text_column"
            )
        if self.prompt_column is not None and not self.conversational:
            return tokenizer, self._texts(tokenizers)
        return self._conversations(tokenizers)

    def _texts(self, tokenizers: Mapping[str, Any]) -> Callable[[Limits], Encoder]:
        if self.tools_column is not None:
            raise EngineError(
                f"task.tools_column: goes with messages, and {self.prompt_column!r} holds texts; leave it out, or say "
                "conversational: true if they are messages in JSON"
            )
        refuse_differences({name: ends(one) for name, one in tokenizers.items()})
        prompt, completion, everything = self.prompt_column, self.completion_column, self.loss_on == "all"
        assert prompt is not None
        assert completion is not None
        surely = self.conversational is False
        return lambda reader: CompletionEncoder(prompt, completion, everything, reader, surely=surely)

    def _conversations(self, tokenizers: Mapping[str, Any]) -> tuple[Any, Callable[[Limits], Encoder]]:
        # A chat model's base has no template; what it is given is the chat model's.
        own = {name: one for name, one in tokenizers.items() if getattr(one, "chat_template", None) is not None}
        refuse_differences({name: chat_behaviour(one) for name, one in (own or tokenizers).items()})
        name, tokenizer = next(iter((own or tokenizers).items()))
        template = ChatTemplate(f"models.{name}", tokenizer, tools=self.tools_column is not None)
        if fault := self._check_template(template):
            log.warning("models.%s: conversations of several turns are not scored: %s", name, fault)
        messages, tools, loss_on = self.messages_column, self.tools_column, self.loss_on
        prompt, completion = self.prompt_column, self.completion_column
        assert loss_on is not None
        if messages is not None:
            return tokenizer, lambda reader: ChatEncoder(messages, tools, loss_on, template, reader)
        assert prompt is not None
        assert completion is not None
        return tokenizer, lambda reader: PromptChatEncoder(prompt, completion, tools, loss_on, template, reader)

    def _check_template(self, template: ChatTemplate) -> str | None:
        """Whether what counts can be told: `ChatTemplate.check_assistant`."""
        if self.loss_on == "all":
            return None
        if self.messages_column is None and self.loss_on == "completion":
            return template.check_added()
        return template.check_assistant(last=self.messages_column is None or self.loss_on == "completion")

    def _check_positions(self, name: str, model: nn.Module) -> None:
        positions = setting(getattr(model, "config", None), "max_position_embeddings")
        if isinstance(positions, int) and positions < self.max_length:
            raise EngineError(f"task.max_length is {self.max_length}, but models.{name} has {positions} positions")

    def _check(self, name: str, model: nn.Module, tokenizer: Any, vocabulary: Collection[int]) -> int:
        """The number of tokens that the model knows, after trying it out on some of them."""
        rows = embedded(model, vocabulary)
        special = {*tokenizer.all_special_ids, *_special_tokens(model)}
        usable = sorted({i for i in vocabulary if i < rows} - special) or list(range(rows))
        classes = check_causal_lm(f"models.{name}", model, usable, self.max_length)
        limit = min(rows, classes)
        if beyond := check_vocabulary(name, limit, vocabulary):
            log.warning(
                "models.%s: %d tokens of its tokenizer, from %d on, are not the model's; texts with one are not scored",
                name,
                beyond,
                limit,
            )
        return limit


def _special_tokens(model: nn.Module) -> set[int]:
    """The tokens that a model's config gives a meaning of their own: padding, images."""
    config = getattr(model, "config", None)
    keys = config if isinstance(config, Mapping) else getattr(config, "__dict__", dir(config))
    named = [key for key in keys if isinstance(key, str) and key.endswith(("_token_id", "_token_index"))]
    return {value for key in named if isinstance(value := setting(config, key), int)}
