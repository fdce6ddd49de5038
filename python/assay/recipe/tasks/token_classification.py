"""A class per word: lists of words with a tag each_good, for models that give a class per token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, PrivateAttr
from torch import Tensor

from assay.corpus.checks import check_words
from assay.corpus.errors import BadRow
from assay.corpus.format import ColumnFacts
from assay.recipe.errors import EngineError
from assay.recipe.library_calls import refusing
from assay.recipe.model_files import shortened
from assay.recipe.tasks.base import TASKS, Columns, Encoded, Encoder, Models, attempt
from assay.recipe.tasks.labels import ClassLabels, LabelKeys, class_labels, item_type, labels_seen
from assay.recipe.tasks.text_rows import Reader, TextTaskSpec, Tokens, each_good, make_reader
from assay.tasks import IGNORE, Task, TokenClassification

if TYPE_CHECKING:
    from typing_extensions import Self

_LIST, _TEXTS = "list<", ("string", "mixed", "null")


@TASKS.add("token_classification")
class TokenClassificationSpec(LabelKeys, TextTaskSpec):
    """Lists of words with a tag for each; of a word's tokens the first is predicted, as transformers' examples do."""

    kind: Literal["token_classification"]
    tokens_column: str = "tokens"
    tags_column: str = "tags"
    max_length: Annotated[int, Field(ge=2)] | None = None
    reduction: Literal["mean", "sum"] = "mean"
    _facts: ColumnFacts | None = PrivateAttr(None)

    @property
    def auto_class(self) -> str:
        return "AutoModelForTokenClassification"

    def task(self) -> Task:
        return TokenClassification(self.reduction)

    def seen(self, columns: Columns) -> Self:
        for name in (self.tokens_column, self.tags_column):
            kind = columns[name].type if name in columns else "null"
            wanted = kind.startswith(_LIST) and (name == self.tags_column or item_type(kind) in _TEXTS)
            if not wanted and kind not in ("mixed", "null"):
                what = "words" if name == self.tokens_column else "tags"
                raise EngineError(f"column {name!r} holds {shortened([kind])}; expected lists of {what}")
        facts = _items(columns.get(self.tags_column))
        made = self.model_copy(update={"labels": labels_seen(self, self.tags_column, facts)})
        made._facts = facts
        return made

    def rows(self, models: Models, tokenizer: Any) -> Encoder:
        labels = class_labels(self, self.tags_column, self._facts, models)
        reader = make_reader(models, tokenizer, self.max_length)
        with refusing("the models' tokenizer cannot read lists of words"):
            # Fast tokenizers alone say which word a token is of.
            reader.call([["a", "a"]], is_split_into_words=True).word_ids(0)
        return TagEncoder(self.tokens_column, labels, reader)


def _items(facts: ColumnFacts | None) -> ColumnFacts | None:
    """Of a list column what its items are."""
    if facts is None or not facts.type.startswith(_LIST):
        return None
    return replace(facts, type=item_type(facts.type))


class Tagged(NamedTuple):
    """A sample's tokens, and for each its class or -100."""

    tokens: Tokens
    labels: npt.NDArray[np.int64]


class TagEncoder:
    """Words and tags to batches of ``TokenClassification``."""

    def __init__(self, tokens_column: str, tags: ClassLabels, reader: Reader) -> None:
        self.columns = (tokens_column, tags.column)
        self._tags, self._reader = tags, reader

    @property
    def identity(self) -> dict[str, Any]:
        return self._reader.identity | self._tags.identity

    def for_columns(self, columns: Columns) -> TagEncoder:
        return TagEncoder(self.columns[0], self._tags.for_columns(columns), self._reader)

    def encode(self, rows: Sequence[tuple[Any, ...]]) -> list[Encoded | BadRow]:
        return each_good([attempt(self._check, *row) for row in rows], self._encode, self.columns[0])

    def _check(self, tokens: Any, tags: Any) -> tuple[list[str], npt.NDArray[np.int64]]:
        words_column, tags_column = self.columns
        words = check_words(words_column, tokens)
        if not isinstance(tags, list | np.ndarray):
            what = "null" if tags is None else f"of type {type(tags).__name__}, expected a list"
            raise BadRow(f"{tags_column} is {what}")
        if len(tags) != len(words):
            raise BadRow(f"{tags_column} holds {len(tags)} tags for {len(words)} words")
        values = tags.tolist() if isinstance(tags, np.ndarray) else tags
        return words, np.asarray([self._tags.encode(value) for value in values], np.int64)

    def _encode(self, rows: Sequence[tuple[list[str], npt.NDArray[np.int64]]]) -> list[Encoded | BadRow]:
        encoded = self._reader.call([words for words, _ in rows], is_split_into_words=True)
        types = encoded["token_type_ids"] if self._reader.types else [None] * len(rows)
        return [
            self._sample(Tokens.of(ids, own_types), encoded.word_ids(i), tags)
            for i, (ids, own_types, (_, tags)) in enumerate(zip(encoded["input_ids"], types, rows, strict=True))
        ]

    def _sample(self, tokens: Tokens, words: Sequence[int | None], tags: npt.NDArray[np.int64]) -> Encoded | BadRow:
        sample = self._reader.encoded(self.columns[0], tokens)
        if isinstance(sample, BadRow):
            return sample
        before = [None, *words[:-1]]
        firsts = [i for i, word in enumerate(words) if word is not None and word != before[i]]
        if not firsts:
            return BadRow(f"{self.columns[0]} has no word of which a token is left; nothing can be predicted")
        labels = np.full(len(words), IGNORE, np.int64)
        labels[firsts] = [tags[word] for i in firsts if (word := words[i]) is not None]
        return Encoded(Tagged(sample.data, labels), sample.length, sample.nbytes + labels.nbytes)

    def tokens(self, data: Tagged) -> list[tuple[str, bool]]:
        """A sample's tokens as text, and which of them are predicted."""
        counts = (data.labels != IGNORE).tolist()
        return list(zip(self._reader.words(data.tokens), counts, strict=True))

    def collate(self, data: Sequence[Tagged]) -> dict[str, Tensor]:
        batch = self._reader.collate([own.tokens for own in data])
        labels = torch.full_like(batch["input_ids"], IGNORE)
        for row, own in zip(labels, data, strict=True):
            row[: len(own.labels)] = torch.from_numpy(own.labels)
        return batch | {"labels": labels}
