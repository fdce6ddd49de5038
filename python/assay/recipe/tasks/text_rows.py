"""Texts, pairs of texts and lists of words as the tokens of a model that reads all of them: classifiers, taggers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from assay.corpus.checks import check_text
from assay.corpus.errors import BadRow
from assay.corpus.footer import canonical_hash
from assay.recipe.errors import EngineError
from assay.recipe.model_files import one_line
from assay.recipe.models import ModelSpec, own_tokenizers
from assay.recipe.tasks.base import Encoded, Encoder, Models, TaskSpec, attempt
from assay.recipe.tasks.vocabulary import check_vocabulary, embedded, unknown_token, usable_tokens
from assay.recipe.text_checks import check_longest, check_padding, looks_for_end, padding_token
from assay.recipe.tokenizer import behaviour
from assay.recipe.trials import right_padded
from assay.tasks.special_tokens import setting

Ids = npt.NDArray[np.int32]

DEFAULT_LENGTH = 512
"""The most tokens of a text, where neither recipe nor models say less."""


class TextTaskSpec(TaskSpec):
    """A task whose models may have to share a tokenizer, which is read before their weights."""

    @property
    def reads_text(self) -> bool:
        return True

    def open(self, specs: Mapping[str, ModelSpec]) -> Callable[[Mapping[str, nn.Module]], Encoder]:
        tokenizer = _making_types(own_tokenizers(specs).values()) if self.reads_text else None
        return lambda models: self.rows({name: (specs[name], model) for name, model in models.items()}, tokenizer)

    def rows(self, models: Models, tokenizer: Any) -> Encoder:
        """``encoder`` with the models' tokenizer, if they have to have one."""
        raise NotImplementedError


def _making_types(tokenizers: Iterable[Any]) -> Any:
    """The first of tokenizers that do the same; it makes token types if one of them says that its model takes any."""
    first, *others = tokenizers
    if any("token_type_ids" in other.model_input_names for other in others):
        first.model_input_names = list(dict.fromkeys([*first.model_input_names, "token_type_ids"]))
    return first


class Tokens(NamedTuple):
    """A sample's tokens, and what its model takes beside them, one number for each."""

    ids: Ids
    types: Ids | None = None

    @classmethod
    def of(cls, ids: Sequence[int], types: Sequence[int] | None) -> Tokens:
        """Of a tokenizer's lists."""
        return cls(np.asarray(ids, np.int32), None if types is None else np.asarray(types, np.int32))


@dataclass(frozen=True)
class Reader:
    """How texts become tokens.

    Attributes:
        tokenizer: of transformers.
        max_length: the most tokens of a sample; the rest is cut off.
        limit, owner: how many tokens the model of that name knows, the least of all models.
        pad: the token that stands where a sample has ended.
        types: whether a model takes token types.
        example: a text of random tokens.
        ends: the token that a model looks for as a text's end, and how often every sample must have it; None: no model
            looks for one.
    """

    tokenizer: Any
    max_length: int
    limit: int
    owner: str
    pad: int
    types: bool
    example: Tokens
    ends: tuple[int, int] | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """What decides which tokens a text becomes."""
        return {
            "tokenizer": canonical_hash(behaviour(self.tokenizer)),
            "tokens": usable_tokens(self.tokenizer, self.limit),
            "max_length": self.max_length,
            "types": self.types,
            "ends": self.ends,
        }

    def call(self, texts: Sequence[Any], pairs: Sequence[str] | None = None, **options: Any) -> Any:
        """transformers' own encoding of some texts, cut to ``max_length`` tokens."""
        return self.tokenizer(
            list(texts),
            None if pairs is None else list(pairs),
            truncation=True,
            max_length=self.max_length,
            return_token_type_ids=self.types,
            return_attention_mask=False,
            **options,
        )

    def cut(self, texts: Sequence[Any], pairs: Sequence[str] | None = None) -> list[Tokens]:
        """The texts as tokens."""
        encoded = self.call(texts, pairs)
        types = encoded["token_type_ids"] if self.types else [None] * len(texts)
        return [Tokens.of(*own) for own in zip(encoded["input_ids"], types, strict=True)]

    def encoded(self, what: str, own: Tokens) -> Encoded | BadRow:
        """A sample, unless a model cannot read it; ``what`` names it in the reason."""
        tokens = own.ids
        if not len(tokens):
            return BadRow(f"{what} becomes no token")
        if len(tokens) > self.max_length:
            return BadRow(f"{what} is {len(tokens)} tokens long, which the tokenizer does not cut to {self.max_length}")
        if unknown := unknown_token(what, tokens, self.tokenizer, self.limit, self.owner):
            return unknown
        if self.ends is not None and (found := int((tokens == self.ends[0]).sum())) != self.ends[1]:
            return BadRow(f"{what} has the token that ends a text {found} times, expected {self.ends[1]}")
        return Encoded(own, len(tokens), tokens.nbytes * (1 if own.types is None else 2))

    def words(self, own: Tokens) -> list[str]:
        """A sample's tokens as the tokenizer calls them."""
        return [str(word) for word in self.tokenizer.convert_ids_to_tokens(own.ids.tolist())]

    def collate(self, samples: Sequence[Tokens]) -> dict[str, Tensor]:
        """Padded on the right, where the mask is 0."""
        return padded(samples, self.pad)


def padded(samples: Sequence[Tokens], pad: int) -> dict[str, Tensor]:
    """``input_ids`` with ``pad`` where a sample has ended, ``attention_mask``, and token types if there are any."""
    batch = right_padded([torch.from_numpy(own.ids) for own in samples], pad)
    types = [torch.from_numpy(own.types) for own in samples if own.types is not None]
    return batch | {"token_type_ids": right_padded(types)["input_ids"]} if types else batch


class TextInputs:
    """Texts, or pairs of texts, to what a model of transformers is called with."""

    def __init__(self, columns: Sequence[str], reader: Reader) -> None:
        self.columns = tuple(columns)
        self._what, self._reader = " with ".join(columns), reader

    @property
    def identity(self) -> dict[str, Any]:
        return self._reader.identity

    def encode(self, rows: Sequence[tuple[Any, ...]]) -> list[Encoded | BadRow]:
        return each_good([attempt(self._check, row) for row in rows], self._encode, self._what)

    def _check(self, row: tuple[Any, ...]) -> tuple[str, ...]:
        return tuple(check_text(name, value) for name, value in zip(self.columns, row, strict=True))

    def _encode(self, rows: Sequence[tuple[str, ...]]) -> list[Encoded | BadRow]:
        return [self._reader.encoded(self._what, own) for own in self._reader.cut(*zip(*rows, strict=True))]

    def examples(self, count: int) -> list[Tokens]:
        return [self._reader.example] * count

    def collate(self, data: Sequence[Tokens]) -> dict[str, Tensor]:
        return self._reader.collate(data)


def each(rows: list[Any], encode: Callable[[list[Any]], Sequence[Any]], what: str) -> list[Any]:
    """``encode`` of all rows, or of each on its own where they fail together, so that a failure is one row's."""
    if not rows:
        return []
    try:
        return list(encode(rows))
    except Exception as error:  # of the tokenizer's own classes
        if len(rows) == 1:
            return [BadRow(f"{what} cannot be cut into tokens ({one_line(error)})")]
        return [result for row in rows for result in each([row], encode, what)]


def each_good(checked: Sequence[Any], encode: Callable[[list[Any]], Sequence[Any]], what: str) -> list[Any]:
    """``each`` of the rows that are no BadRow, which stay in their places."""
    good = iter(each([row for row in checked if not isinstance(row, BadRow)], encode, what))
    return [row if isinstance(row, BadRow) else next(good) for row in checked]


def make_reader(models: Models, tokenizer: Any, max_length: int | None, pairs: bool = False) -> Reader:
    """For models that share a ``tokenizer``, each of them tried out on a few tokens; of texts or ``pairs`` of them.

    Raises:
        EngineError: a model has fewer positions or cannot be run on token ids, or what it makes of a text depends on
            the batch.
    """
    vocabulary = tokenizer.get_vocab().values()
    limits = {name: embedded(model, vocabulary) for name, (_, model) in models.items()}
    for name, known in limits.items():
        check_vocabulary(name, known, vocabulary)
    limit, owner = min((known, name) for name, known in limits.items())
    length = _length(models, max_length)
    check_room(tokenizer, length, pairs)
    pad = max(padding_token(model) for _, model in models.values())  # 0 where it makes no difference
    takes = any("token_type_ids" in inspect.signature(model.forward).parameters for _, model in models.values())
    types = takes and "token_type_ids" in tokenizer.model_input_names
    special = {*tokenizer.all_special_ids, pad}
    usable = sorted({i for i in vocabulary if i < limit} - special) or list(range(limit))
    trial, end = Trial(tokenizer, usable, pad, types), tokenizer.eos_token_id
    reader = Reader(tokenizer, length, limit, f"models.{owner}", pad, types, trial.row(0, min(8, length)))
    for name, (_, model) in models.items():
        check_padding(f"models.{name}", model, lambda texts: reader.collate(reader.cut(list(texts))))
        check_longest(f"models.{name}", model, trial.sample, length)
    if not any(looks_for_end(model, trial.sample, length, end) for _, model in models.values()):
        return reader
    (plain,) = reader.cut(["a"], ["a"] if pairs else None)
    return replace(reader, ends=(end, int((plain.ids == end).sum())))


def check_room(tokenizer: Any, length: int, pairs: bool = False) -> None:
    """EngineError if a length leaves nothing of a text; with less than it adds itself, a tokenizer does not cut."""
    around = tokenizer(["a"], ["a"] if pairs else None, return_special_tokens_mask=True)["special_tokens_mask"][0]
    if length < (least := sum(around) + 1 + pairs):
        raise EngineError(
            f"task.max_length is {length}; with what the tokenizer adds a text has {least} tokens or more"
        )


class Trial:
    """Makes batches of random tokens, between those that the tokenizer puts at the ends."""

    def __init__(self, tokenizer: Any, usable: Sequence[int], pad: int, types: bool) -> None:
        self._usable, self._pad, self._types = np.asarray(usable), pad, types
        encoded = tokenizer(["a"], return_special_tokens_mask=True)
        ids, special = encoded["input_ids"][0], encoded["special_tokens_mask"][0]
        inner = [i for i, own in enumerate(special) if not own] or [len(ids)]
        self._before, self._after = ids[: inner[0]], ids[inner[-1] + 1 :]

    def sample(self, rows: Sequence[tuple[int, int, Sequence[int]]]) -> dict[str, Tensor]:
        """A batch of rows (draw, number of tokens, tokens that stand at the beginning)."""
        return padded([self.row(*row) for row in rows], self._pad)

    def row(self, draw: int, length: int, first: Sequence[int] = ()) -> Tokens:
        inner = max(1, length - len(self._before) - len(self._after) - len(first))
        drawn = np.random.default_rng(draw).choice(self._usable, inner)
        ids = np.asarray([*self._before, *first, *drawn, *self._after], np.int32)
        return Tokens(ids, np.zeros_like(ids) if self._types else None)


def _length(models: Models, given: int | None) -> int:
    length = given or DEFAULT_LENGTH
    for name, (_, model) in models.items():
        positions = _positions(model)
        if positions is not None and positions < length:
            if given is not None:
                raise EngineError(f"task.max_length is {given}, but models.{name} has {positions} positions")
            length = positions
    return length


def _positions(model: nn.Module) -> int | None:
    """The longest text of a model, if it tells; embeddings that leave out their padding's number begin after it."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return int(module.num_embeddings) - int(module.padding_idx) - 1
    positions = setting(getattr(model, "config", None), "max_position_embeddings")
    return positions if isinstance(positions, int) and positions > 0 else None  # XLNet says -1: it has no end
