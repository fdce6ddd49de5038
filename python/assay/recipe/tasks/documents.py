"""Rows as tokens: documents of one text column, and completions behind a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from assay.corpus.checks import check_text
from assay.corpus.errors import BadRow
from assay.corpus.footer import canonical_hash
from assay.recipe.chat_template import Span
from assay.recipe.tasks.base import Encoded, attempt
from assay.recipe.tasks.messages import looks_like_messages
from assay.recipe.tasks.text_rows import Ids, each_good
from assay.recipe.tasks.vocabulary import unknown_token, usable_tokens
from assay.recipe.tokenizer import behaviour
from assay.recipe.trials import right_padded
from assay.tasks.base import IGNORE

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Limits:
    """What tokens a text becomes.

    Attributes:
        tokenizer: of transformers.
        max_length: the most tokens of a sample.
        truncate: which end of a longer one is cut off, or that it is no sample.
        limit: how many tokens the model ``owner`` knows, the least of all models.
    """

    tokenizer: Any
    max_length: int
    truncate: Literal["right", "left", "drop"]
    limit: int
    owner: str


class Counted(NamedTuple):
    """A sample of which only some tokens count: ``predicted`` says which."""

    ids: Ids
    predicted: Mask


class TokenEncoder:
    """What all encoders of tokens have in common.

    Args:
        columns: what is read of a row.
        what: what errors call a row's text.
        reader: the tokenizer and its limits.
    """

    def __init__(self, columns: tuple[str, ...], what: str, reader: Limits) -> None:
        self.columns = columns
        self._what = what
        self._reader = reader
        self._tokenizer = reader.tokenizer

    @property
    def identity(self) -> dict[str, Any]:
        hashed = canonical_hash({**behaviour(self._tokenizer), **self._more_behaviour()})
        return {"tokenizer": hashed, "tokens": usable_tokens(self._tokenizer, self._reader.limit)}

    def _more_behaviour(self) -> dict[str, Any]:
        """What else of the tokenizer decides which tokens a row becomes."""
        return {}

    def collate(self, data: Sequence[Ids | Counted]) -> dict[str, torch.Tensor]:
        """Padded on the right, where the mask is 0; ``labels`` where not every token counts."""
        batch = right_padded([torch.from_numpy(_ids(sample)) for sample in data])
        if not isinstance(data[0], Counted):
            return batch
        labels = torch.full_like(batch["input_ids"], IGNORE)
        for i, sample in enumerate(data):
            assert isinstance(sample, Counted)
            own = torch.from_numpy(sample.ids).long()
            labels[i, : len(own)] = own.masked_fill(~torch.from_numpy(sample.predicted), IGNORE)
        return batch | {"labels": labels}

    def tokens(self, data: Ids | Counted) -> list[tuple[str, bool]]:
        """A sample's tokens as text, and which of them count: never the first, which nothing predicts."""
        ids = _ids(data)
        counts = data.predicted if isinstance(data, Counted) else np.ones(len(ids), bool)
        return [(self._word(int(id_)), bool(c) and i > 0) for i, (id_, c) in enumerate(zip(ids, counts, strict=True))]

    def _word(self, id_: int) -> str:
        own = str(self._tokenizer.convert_ids_to_tokens(id_))
        if "▁" in own:  # how SentencePiece writes a space, which it leaves out where a text begins
            return own.replace("▁", " ")
        text: str = self._tokenizer.decode([id_], clean_up_tokenization_spaces=False)
        return own if "\N{REPLACEMENT CHARACTER}" in text else text  # a part of a character is no text

    def _encoded(self, ids: Sequence[int], predicted: Mask | None = None) -> Encoded | BadRow:
        """A sample, unless there is nothing to predict in it, or a token that a model does not know."""
        if len(ids) < 2:
            return BadRow(f"{self._what} is {len(ids)} token long; nothing in it can be predicted")
        tokens = np.asarray(ids, np.int32)
        if unknown := unknown_token(self._what, tokens, self._tokenizer, self._reader.limit, self._reader.owner):
            return unknown
        if predicted is None:
            return Encoded(tokens, len(tokens), tokens.nbytes)
        return Encoded(Counted(tokens, predicted), len(tokens), tokens.nbytes + predicted.nbytes)

    def _cut(self, ids: list[int], predicted: Mask) -> Encoded | BadRow:
        """The sample within ``max_length``, if a token is left of those that count."""
        limit, side = self._reader.max_length, self._reader.truncate
        if not predicted[1:].any():
            return BadRow(f"{self._what} has no token that counts and has one before it; nothing can be predicted")
        if len(ids) <= limit:
            return self._encoded(ids, predicted)
        if side == "drop":
            return BadRow(f"{self._what} is {len(ids)} tokens long, more than task.max_length, {limit}")
        if side == "right":
            kept = np.arange(limit)
        else:  # a model expects the token that begins every text
            begins = int(ids[0] == self._tokenizer.bos_token_id)
            kept = np.concatenate([np.arange(begins), np.arange(len(ids) - limit + begins, len(ids))])
        if not predicted[kept][1:].any():
            return BadRow(
                f"{self._what} is {len(ids)} tokens long, and none that counts is left when it is cut to {limit} "
                f"(task.max_length, truncate: {side})"
            )
        return self._encoded([ids[i] for i in kept.tolist()], predicted[kept])


def _ids(sample: Ids | Counted) -> Ids:
    return sample.ids if isinstance(sample, Counted) else sample


def holding(offsets: Sequence[Span], spans: Sequence[Span]) -> Mask:
    """Which tokens hold a character of the ``spans``; ``offsets`` are the tokens' characters.

    A tokenizer may leave spaces out of a token's offsets: a token begins where the one before it ends. One that is only
    a part of a character is where the character's first part is.
    """
    held = np.zeros(len(offsets), bool)
    if not len(offsets):
        return held
    ends = np.maximum.accumulate([last for _, last in offsets])
    before = np.concatenate([[0], ends[:-1]])
    first = np.maximum.accumulate(np.where(ends > before, np.arange(len(ends)), 0))  # the first of the same characters
    starts = before[first]
    for a, b in spans:
        held[np.searchsorted(ends, a, "right") : np.searchsorted(starts, b, "left")] = True
    return held


class TextEncoder(TokenEncoder):
    """Documents, every token of which counts."""

    def __init__(self, column: str, reader: Limits) -> None:
        super().__init__((column,), column, reader)
        if reader.truncate == "left":
            self._tokenizer.truncation_side = "left"
        # A tokenizer cuts before it adds the tokens of a text's ends; the first of a longer one are not at its end.
        self._beyond = {"right": _added_behind(reader.tokenizer), "left": 0, "drop": 1}[reader.truncate]

    def encode(self, rows: Sequence[tuple[Any, ...]]) -> list[Encoded | BadRow]:
        checked = [attempt(check_text, self._what, value) for (value,) in rows]
        return each_good(checked, self._samples, self._what)

    def _samples(self, texts: list[str]) -> list[Encoded | BadRow]:
        limit, drop = self._reader.max_length, self._reader.truncate == "drop"
        tokens = self._tokenizer(texts, truncation=True, max_length=limit + self._beyond)["input_ids"]
        long = BadRow(f"{self._what} is longer than task.max_length, {limit} tokens")
        return [long if drop and len(ids) > limit else self._encoded(ids[:limit]) for ids in tokens]


def _added_behind(tokenizer: Any) -> int:
    """How many tokens a tokenizer adds behind a text."""
    encoded = tokenizer(["a"], return_special_tokens_mask=True)
    special, ids = encoded["special_tokens_mask"][0], encoded["input_ids"][0]
    if all(special):  # it makes nothing of the text itself
        special = [id_ == tokenizer.eos_token_id for id_ in ids]
    return next((i for i, own in enumerate(reversed(special)) if not own), len(ids))


class CompletionEncoder(TokenEncoder):
    """A prompt and what comes after it, cut into tokens as one text, which begins and ends once.

    A token counts if it holds a character of the completion, even if it holds some of the prompt's too; so does the one
    that ends the text. With ``everything``, all do. Where the prompt's tokens alone begin those of both, this is TRL's
    ``completion_only_loss``; where they do not, TRL 1.16 counts from the first token that differs on, and older ones
    from as many on as the prompt has alone.

    Two texts that look like lists of messages in JSON are no sample unless they are ``surely`` texts.
    """

    def __init__(self, prompt: str, completion: str, everything: bool, reader: Limits, *, surely: bool = False) -> None:
        super().__init__((prompt, completion), f"{prompt} with {completion}", reader)
        self._everything, self._surely = everything, surely

    def _more_behaviour(self) -> dict[str, Any]:
        return ends(self._tokenizer)

    def encode(self, rows: Sequence[tuple[Any, ...]]) -> list[Encoded | BadRow]:
        checked = [attempt(self._check, *row) for row in rows]
        texts = [pair if isinstance(pair, BadRow) else "".join(pair) for pair in checked]
        cut = zip(checked, each_good(texts, self._in_tokens, self._what), strict=True)
        return [
            own if isinstance(pair, BadRow) or isinstance(own, BadRow) else self._sample(pair, own) for pair, own in cut
        ]

    def _check(self, prompt: Any, completion: Any) -> tuple[str, str]:
        before, after = self.columns
        texts = "" if prompt == "" else check_text(before, prompt), check_text(after, completion)
        if not self._surely and all(map(looks_like_messages, texts)):
            raise BadRow(
                f"{self._what} are messages in JSON; task.conversational: true takes them for a conversation, false "
                "for texts"
            )
        return texts

    def _in_tokens(self, texts: list[str]) -> list[Any]:
        encoded = self._tokenizer(texts, return_offsets_mapping=True)
        parts = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        return [(ids, offsets, encoded.sequence_ids(i)) for i, (ids, offsets) in enumerate(parts)]

    def _sample(self, pair: tuple[str, str], cut: Any) -> Encoded | BadRow:
        ids, offsets, owners = cut
        own = [i for i, owner in enumerate(owners) if owner is not None]
        if not own:
            return BadRow(f"{self._what} becomes no token")
        before, after = ids[: own[0]], ids[own[-1] + 1 :]
        text, inner = ids[own[0] : own[-1] + 1], offsets[own[0] : own[-1] + 1]
        held = holding(inner, [(len(pair[0]), sum(map(len, pair)))])
        if before and before[-1] == text[0]:  # the prompt begins with it already
            before = before[:-1]
        if after and after[0] == text[-1]:
            after = after[1:]
        tokens = [*before, *text, *after]
        end = self._tokenizer.eos_token_id
        if end is not None and tokens[-1] != end:
            tokens.append(end)
        predicted = np.ones(len(tokens), bool)
        if not self._everything:
            predicted[: len(before) + len(text)] = np.concatenate([np.zeros(len(before), bool), held])
        return self._cut(tokens, predicted)


def ends(tokenizer: Any) -> dict[str, Any]:
    """The tokens that begin and end a text."""
    return {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
