"""Which tokens a model knows, and what becomes of a text that needs another one."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy.typing as npt
from torch import nn

from assay.corpus.errors import BadRow
from assay.recipe.errors import EngineError
from assay.recipe.model_files import shortened


def embedded(model: nn.Module, vocabulary: Collection[int]) -> int:
    """How many tokens a model has embeddings of; if it does not tell, as many as the ``vocabulary`` has."""
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    rows: int = getattr(embeddings, "num_embeddings", None) or max(vocabulary, default=0) + 1
    return rows


def check_vocabulary(name: str, known: int, vocabulary: Collection[int]) -> int:
    """How many tokens of a tokenizer the model ``name``, which knows ``known``, does not. EngineError if most."""
    beyond = sum(i >= known for i in vocabulary)
    if 2 * beyond > len(vocabulary):
        raise EngineError(f"models.{name}: knows {known} tokens, its tokenizer {len(vocabulary)}: not of one model")
    return beyond


def usable_tokens(tokenizer: Any, limit: int) -> int:
    """How many tokens texts are made of, if no model knows those from ``limit`` on."""
    return min(limit, max(tokenizer.get_vocab().values(), default=0) + 1)


def unknown_token(what: str, ids: npt.NDArray[Any], tokenizer: Any, limit: int, owner: str) -> BadRow | None:
    """Why a text (called ``what``) is no sample: a token that the model ``owner``, which knows ``limit``, lacks."""
    highest = int(ids.max())
    if highest < limit:
        return None
    word = shortened([repr(tokenizer.convert_ids_to_tokens(highest))])
    return BadRow(f"{what} has the token {word} (number {highest}); {owner} knows those below {limit}")
