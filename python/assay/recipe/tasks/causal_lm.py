"""Next-token prediction over the documents of a text column."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import nn

from assay.corpus.checks import check_text
from assay.corpus.errors import BadRow
from assay.corpus.footer import canonical_hash
from assay.recipe.causal_checks import check_causal_lm, right_padded
from assay.recipe.errors import EngineError
from assay.recipe.model_files import one_line, shortened
from assay.recipe.models import ModelSpec, shared_tokenizer
from assay.recipe.tasks.base import TASKS, Encoded, Encoder, TaskSpec, attempt
from assay.recipe.tokenizer import behaviour
from assay.tasks import CausalLM, Task

log = logging.getLogger("assay")


@TASKS.add("causal_lm")
class CausalLMSpec(TaskSpec):
    """Documents, cut to their first ``max_length`` tokens."""

    kind: Literal["causal_lm"]
    text_column: str = "text"
    max_length: Annotated[int, Field(ge=2)] = 1024
    reduction: Literal["mean", "sum"] = "mean"

    @property
    def auto_class(self) -> str:
        return "AutoModelForCausalLM"

    def task(self) -> Task:
        return CausalLM(reduction=self.reduction)

    def encoder(self, models: Mapping[str, tuple[ModelSpec, nn.Module]]) -> Encoder:
        for name, (_, model) in models.items():
            self._check_positions(name, model)
        tokenizer = shared_tokenizer({name: spec for name, (spec, _) in models.items()})
        vocabulary = tokenizer.get_vocab().values()
        limit, owner = min(
            (self._check(name, model, tokenizer, vocabulary), name) for name, (_, model) in models.items()
        )
        return TextEncoder(self.text_column, tokenizer, self.max_length, limit, f"models.{owner}")

    def _check_positions(self, name: str, model: nn.Module) -> None:
        positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
        if positions is not None and self.max_length > positions:
            raise EngineError(f"task.max_length is {self.max_length}, but models.{name} has {positions} positions")

    def _check(self, name: str, model: nn.Module, tokenizer: Any, vocabulary: Collection[int]) -> int:
        """The number of tokens that the model knows, after trying it out on some of them."""
        embeddings = getattr(model, "get_input_embeddings", lambda: None)()
        rows = getattr(embeddings, "num_embeddings", None) or max(vocabulary, default=0) + 1
        special = {*tokenizer.all_special_ids, *_special_tokens(model)}
        usable = sorted({i for i in vocabulary if i < rows} - special) or list(range(rows))
        classes = check_causal_lm(f"models.{name}", model, usable, self.max_length)
        limit = min(rows, classes)
        beyond = sum(i >= limit for i in vocabulary)
        if 2 * beyond > len(vocabulary):
            raise EngineError(f"models.{name}: knows {limit} tokens, its tokenizer {len(vocabulary)}: not of one model")
        if beyond:
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
    values = vars(config).items() if config is not None else ()
    return {value for key, value in values if key.endswith(("_token_id", "_token_index")) and isinstance(value, int)}


class TextEncoder:
    """Texts to tokens; padded on the right, where the mask is 0."""

    def __init__(self, column: str, tokenizer: Any, max_length: int, limit: int, owner: str) -> None:
        """``limit``: how many tokens the model ``owner`` knows, the least of all models."""
        self.columns = (column,)
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._limit, self._owner = limit, owner

    @property
    def identity(self) -> dict[str, Any]:
        tokens = max(self._tokenizer.get_vocab().values(), default=0) + 1
        return {"tokenizer": canonical_hash(behaviour(self._tokenizer)), "tokens": min(self._limit, tokens)}

    def encode(self, rows: Sequence[tuple[Any, ...]]) -> list[Encoded | BadRow]:
        name = self.columns[0]
        checked = [attempt(check_text, name, value) for (value,) in rows]
        texts = [text for text in checked if isinstance(text, str)]
        encoded = iter(self._encode(texts))
        return [text if isinstance(text, BadRow) else next(encoded) for text in checked]

    def _encode(self, texts: list[str]) -> list[Encoded | BadRow]:
        if not texts:
            return []
        try:
            return [self._encoded(ids) for ids in self._tokens(texts)]
        except Exception as error:  # of the tokenizer's own classes: it is one text's fault, or all of theirs
            if len(texts) == 1:
                return [BadRow(f"{self.columns[0]} cannot be cut into tokens ({one_line(error)})")]
            return [result for text in texts for result in self._encode([text])]

    def _tokens(self, texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = self._tokenizer(texts, truncation=True, max_length=self._max_length)["input_ids"]
        return ids

    def _encoded(self, ids: list[int]) -> Encoded | BadRow:
        if len(ids) < 2:
            return BadRow(f"{self.columns[0]} is {len(ids)} token long; nothing in it can be predicted")
        tokens = np.asarray(ids, np.int32)
        highest = int(tokens.max())
        if highest >= self._limit:
            word = self._tokenizer.convert_ids_to_tokens(highest)
            return BadRow(
                f"{self.columns[0]} has the token {shortened([repr(word)])} (number {highest}); {self._owner} knows "
                f"those below {self._limit}"
            )
        return Encoded(tokens, len(tokens), tokens.nbytes)

    def collate(self, data: Sequence[npt.NDArray[np.int32]]) -> dict[str, torch.Tensor]:
        return right_padded([torch.from_numpy(tokens) for tokens in data])
