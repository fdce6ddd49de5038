"""A question about each document, put to a judge."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from assay.corpus.checks import check_text
from assay.corpus.errors import BadRow
from assay.corpus.footer import canonical_hash
from assay.recipe.causal_checks import check_causal_lm
from assay.recipe.chat_template import ChatTemplate, chat_behaviour
from assay.recipe.errors import EngineError
from assay.recipe.library_calls import refusing
from assay.recipe.models import ModelSpec, own_tokenizers, refuse_differences
from assay.recipe.parts import located
from assay.recipe.tasks.base import TASKS, Encoded, Encoder, TaskSpec, attempt
from assay.recipe.tasks.text_rows import Ids, each_good
from assay.recipe.tasks.vocabulary import check_vocabulary, embedded, unknown_token, usable_tokens
from assay.recipe.tokenizer import behaviour
from assay.recipe.trials import device_of, differ, in_eval_mode
from assay.tasks import Judge, Prompt, Task
from assay.tasks.prompt import ASK_LLM, CUE, check_question
from assay.tasks.special_tokens import setting

_DOCUMENTS = ("Gold.", "A vein of gold runs north for two miles before it thins out. " * 4)


@TASKS.add("judge")
class JudgeSpec(TaskSpec):
    """A question with the place of a document, and two answers. Without a ``question`` it is Ask-LLM's, behind which a
    decoder that does not ``chat`` finds a cue for its answer."""

    kind: Literal["judge"]
    text_column: str = "text"
    judge: Literal["decoder", "encoder_decoder"] = "decoder"
    question: str | None = None
    yes: str = "yes"
    no: str = "no"
    chat: bool = False
    max_length: Annotated[int, Field(ge=2)] = 1024
    truncate: Literal["right", "drop"] = "right"

    teaches: ClassVar[bool] = False

    @model_validator(mode="before")
    @classmethod
    def _filled_in(cls, data: Any) -> Any:
        if not isinstance(data, Mapping) or data.get("question") is not None:
            return data
        answers = data.get("chat") or data.get("judge") == "encoder_decoder"
        return {**data, "question": ASK_LLM if answers else ASK_LLM + CUE}

    @model_validator(mode="after")
    def _asks(self) -> JudgeSpec:
        try:
            check_question(self.question or "")
        except ValueError as error:
            raise located(("question",), str(error), self.question) from error
        return self

    @property
    def auto_class(self) -> str:
        return "AutoModelForCausalLM" if self.judge == "decoder" else "AutoModelForSeq2SeqLM"

    def task(self) -> Task:
        return Judge()

    def open(self, specs: Mapping[str, ModelSpec]) -> Callable[[Mapping[str, nn.Module]], Encoder]:
        tokenizers = own_tokenizers(specs)
        name, tokenizer = next(iter(tokenizers.items()))
        chat: Callable[[str], str] | bool = False
        if self.chat:
            if getattr(tokenizer, "chat_template", None) is None:
                raise EngineError(f"task.chat: the tokenizer of models.{name} has no chat template; leave the key out")
            refuse_differences({name: chat_behaviour(one) for name, one in tokenizers.items()})
            chat = _asked_by_user(ChatTemplate(f"models.{name}", tokenizer))
        assert self.question is not None
        with refusing(f"task.question: cannot be put to models.{name}"):
            prompt = Prompt(
                tokenizer, self.question, self.yes, self.no, chat=chat, judge=self.judge, max_length=self.max_length
            )
        return lambda models: self._encoder(models, tokenizer, prompt)

    def _encoder(self, models: Mapping[str, nn.Module], tokenizer: Any, prompt: Prompt) -> Encoder:
        vocabulary, special = tokenizer.get_vocab().values(), set(tokenizer.all_special_ids)
        limits = []
        for name, model in models.items():
            check_vocabulary(name, limit := embedded(model, vocabulary), vocabulary)
            limits.append((limit, f"models.{name}"))
            self._check(name, model, prompt, [i for i in vocabulary if i < limit and i not in special])
        limit, owner = min(limits)
        if beyond := [i for i in (*prompt.yes, *prompt.no) if i >= limit]:
            raise EngineError(f"{owner}: knows tokens below {limit}, and an answer is token {beyond[0]}")
        return JudgeEncoder(self.text_column, tokenizer, prompt, self.max_length, self.truncate == "drop", limit, owner)

    def _check(self, name: str, model: nn.Module, prompt: Prompt, usable: Sequence[int]) -> None:
        """Try the judge out: a document's answer must not depend on its neighbours."""
        positions = setting(getattr(model, "config", None), "max_position_embeddings")
        if isinstance(positions, int) and positions < self.max_length:
            raise EngineError(f"task.max_length is {self.max_length}, but models.{name} has {positions} positions")
        if self.judge == "decoder":
            check_causal_lm(f"models.{name}", model, usable, self.max_length)
        (one,), (other,), both = (_answers(name, model, prompt, own) for own in (*zip(_DOCUMENTS), _DOCUMENTS))
        if differ(one, both[0]) or differ(other, both[1]):
            raise EngineError(
                f"models.{name}: a question in a batch with a longer one gets another answer than alone, so that its "
                "score would depend on the batch (the model sees padding)"
            )


class JudgeEncoder:
    """Documents to questions about them, each cut to the tokens that a judge reads.

    Args:
        column: the documents'.
        tokenizer, prompt: what makes tokens of them.
        max_length: the most tokens.
        drop: whether a document that does not fit is no sample, rather than cut.
        limit, owner: how many tokens the model of that name knows, the least of all models.
    """

    def __init__(
        self, column: str, tokenizer: Any, prompt: Prompt, max_length: int, drop: bool, limit: int, owner: str
    ) -> None:
        self.columns = (column,)
        self._tokenizer, self._prompt = tokenizer, prompt
        self._max_length, self._drop, self._limit, self._owner = max_length, drop, limit, owner

    @property
    def identity(self) -> dict[str, Any]:
        return {
            "tokenizer": canonical_hash(behaviour(self._tokenizer)),
            "tokens": usable_tokens(self._tokenizer, self._limit),
            "question": self._prompt.question,
            "answers": [self._prompt.yes, self._prompt.no],
        }

    def encode(self, rows: Sequence[tuple[Any, ...]]) -> list[Encoded | BadRow]:
        (what,) = self.columns
        checked = [attempt(check_text, what, value) for (value,) in rows]
        return each_good(checked, self._asked, what)

    def _asked(self, texts: list[str]) -> list[Encoded | BadRow]:
        (what,) = self.columns
        return [
            BadRow(f"{what} {own}") if isinstance(own, str) else self._encoded(what, own.ids, own.read < len(text))
            for text, own in zip(texts, self._prompt.ask_all(texts), strict=True)
        ]

    def _encoded(self, what: str, ids: Sequence[int], cut: bool) -> Encoded | BadRow:
        if cut and self._drop:
            return BadRow(f"{what} is longer than task.max_length, {self._max_length} tokens with the question")
        tokens = np.asarray(ids, np.int32)
        if unknown := unknown_token(what, tokens, self._tokenizer, self._limit, self._owner):
            return unknown
        return Encoded(tokens, len(tokens), tokens.nbytes)

    def collate(self, data: Sequence[Ids]) -> dict[str, Tensor]:
        return self._prompt.collate([own.tolist() for own in data])


def _asked_by_user(template: ChatTemplate) -> Callable[[str], str]:
    def render(question: str) -> str:
        try:
            return template.render([{"role": "user", "content": question}], prompt=True).text
        except BadRow as fault:
            raise EngineError(f"task.question: {fault}") from fault

    return render


def _answers(name: str, model: nn.Module, prompt: Prompt, documents: Sequence[str]) -> Tensor:
    """(B, 3) of a judge."""
    task = Judge()
    with in_eval_mode(model), torch.no_grad(), refusing(f"models.{name}: cannot be asked a question"):
        answers = task.forward(model, task.to(prompt(documents), device_of(model))).logits
    assert answers is not None
    return answers
