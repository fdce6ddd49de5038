"""Pairs of images and texts, each of which is compared with the others of its group of rows."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from assay.corpus.checks import check_text
from assay.corpus.errors import BadRow
from assay.corpus.footer import canonical_hash
from assay.corpus.shards import Shard
from assay.recipe.causal_checks import right_padded
from assay.recipe.errors import EngineError
from assay.recipe.library_calls import quietly, refusing
from assay.recipe.model_files import one_line, shortened
from assay.recipe.models import ModelSpec, shared_tokenizer
from assay.recipe.tasks.base import TASKS, Encoded, Encoder, attempt
from assay.recipe.tasks.images import ImageInputs, ImageTaskSpec
from assay.recipe.tokenizer import behaviour
from assay.tasks import Contrastive, Task

_TOLERANCE = 1e-4  # of an embedding of length 1, as for logits in `causal_checks`


@TASKS.add("contrastive")
class ContrastiveSpec(ImageTaskSpec):
    """Images with their texts, for models like CLIP; the loss compares ``group`` rows after one another of a shard."""

    kind: Literal["contrastive"]
    image_column: str = "image"
    text_column: str = "text"
    group: Annotated[int, Field(ge=2, le=1 << 16)] = 64
    max_length: Annotated[int, Field(ge=2)] | None = None

    @property
    def group_rows(self) -> int:
        return self.group

    def task(self) -> Task:
        return Contrastive()

    def encoder(self, models: Mapping[str, tuple[ModelSpec, nn.Module]]) -> Encoder:
        for name, (_, model) in models.items():
            _check_kind(f"models.{name}", model)
        tokenizer = shared_tokenizer({name: spec for name, (spec, _) in models.items()})
        known = [n for _, model in models.values() if (n := _text_setting(model, "vocab_size")) is not None]
        limit = min(known, default=max(tokenizer.get_vocab().values(), default=0) + 1)
        texts = Captions(self.text_column, tokenizer, self._length(models), limit)
        images = self.images(self.image_column, models)
        for name, (_, model) in models.items():
            _try_out(f"models.{name}", model, images, texts)
        return PairEncoder(images, texts)

    def _length(self, models: Mapping[str, tuple[ModelSpec, nn.Module]]) -> int:
        """The number of tokens that a text is cut to."""
        found = {name: _text_setting(model, "max_position_embeddings") for name, (_, model) in models.items()}
        known = {name: count for name, count in found.items() if count is not None}
        for name, count in known.items():
            if self.max_length is not None and self.max_length > count:
                raise EngineError(
                    f"task.max_length is {self.max_length}, but models.{name} has {count} positions for a text's tokens"
                )
        if self.max_length is None and not known:
            raise EngineError("task.max_length: the models do not tell how many tokens a text may have; give a number")
        return self.max_length or min(known.values())


class Captions:
    """Texts of one column to tokens, with the tokenizer's own at their ends."""

    def __init__(self, column: str, tokenizer: Any, max_length: int, limit: int) -> None:
        """``limit``: how many tokens the models know."""
        self.column, self.tokenizer = column, tokenizer
        self._max_length, self._limit = max_length, limit

    def encode(self, values: Sequence[Any]) -> list[Tensor | BadRow]:
        """(T,) token ids of each text, or why there are none."""
        checked = [attempt(check_text, self.column, value) for value in values]
        tokens = iter(self._tokens([text for text in checked if isinstance(text, str)]))
        return [text if isinstance(text, BadRow) else next(tokens) for text in checked]

    def _tokens(self, texts: list[str]) -> list[Tensor | BadRow]:
        if not texts:
            return []
        try:
            ids = self.tokenizer(texts, truncation=True, max_length=self._max_length)["input_ids"]
        except Exception as error:  # of the tokenizer's own classes: it is one text's fault, or all of theirs
            if len(texts) == 1:
                return [BadRow(f"{self.column} cannot be cut into tokens ({one_line(error)})")]
            return [result for text in texts for result in self._tokens([text])]
        return [self._checked(own) for own in ids]

    def _checked(self, ids: Sequence[int]) -> Tensor | BadRow:
        if not ids:
            return BadRow(f"{self.column} has no token")
        if max(ids) >= self._limit:
            word = shortened([repr(self.tokenizer.convert_ids_to_tokens(max(ids)))])
            return BadRow(f"{self.column} has the token {word} (number {max(ids)}); the models know {self._limit}")
        return torch.from_numpy(np.asarray(ids, np.int32))


class PairEncoder:
    """Rows to batches (images, texts) of `Contrastive`."""

    def __init__(self, images: ImageInputs, texts: Captions) -> None:
        self.columns = (*images.columns, texts.column)
        self._images, self._texts = images, texts

    @property
    def identity(self) -> dict[str, Any]:
        return {**self._images.identity, "tokenizer": canonical_hash(behaviour(self._texts.tokenizer))}

    def beside(self, shard: Shard) -> PairEncoder:
        """For the rows of this shard."""
        return PairEncoder(self._images.beside(shard), self._texts)

    def encode(self, rows: Sequence[tuple[Any, ...]]) -> list[Encoded | BadRow]:
        images = self._images.encode([(image,) for image, _ in rows])
        return [_pair(*own) for own in zip(images, self._texts.encode([text for _, text in rows]), strict=True)]

    def collate(self, data: Sequence[tuple[Any, Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
        return self._images.collate([image for image, _ in data]), right_padded([tokens for _, tokens in data])


def _pair(image: Encoded | BadRow, tokens: Tensor | BadRow) -> Encoded | BadRow:
    if isinstance(image, BadRow):
        return image
    if isinstance(tokens, BadRow):
        return tokens
    return Encoded((image.data, tokens), image.length + len(tokens), image.nbytes + tokens.nbytes)


def _text_setting(model: nn.Module, key: str) -> int | None:
    value = getattr(getattr(getattr(model, "config", None), "text_config", None), key, None)
    return value if isinstance(value, int) else None


def _check_kind(key: str, model: nn.Module) -> None:
    found = type(model).__name__
    if not isinstance(getattr(model, "logit_scale", None), Tensor):
        raise EngineError(f"{key}: is a {found}, without a logit_scale; a contrastive task needs a model like CLIP")
    if getattr(model, "logit_bias", None) is not None:
        raise EngineError(
            f"{key}: is a {found}, which judges every pair by itself (it has a logit_bias, as SigLIP has); the loss "
            "here is CLIP's, which compares the pairs of a group"
        )


def _try_out(key: str, model: nn.Module, images: ImageInputs, texts: Captions) -> None:
    """Refuse a model whose embedding of a text depends on the padding beside it, or does not depend on the text.

    The latter is what becomes of a CLIP whose config and tokenizer differ in the token that ends a text.
    """
    words = itertools.islice(texts.tokenizer.get_vocab(), 200)
    encoded = [ids for ids in texts.encode(sorted(words)) if isinstance(ids, Tensor)]
    short = min(encoded, key=len, default=None)
    others = [ids for ids in encoded if short is not None and not torch.equal(ids, short)]
    if short is None or not others:
        raise EngineError(f"{key}: its tokenizer makes the same tokens of every text")
    other = max(others, key=len)
    alone, beside = (_text_embeddings(key, model, images, rows) for rows in ([short], [short, other]))
    if not torch.allclose(alone[0], beside[0], rtol=0, atol=_TOLERANCE):
        raise EngineError(
            f"{key}: a longer text in the batch changes a text's embedding; it cannot be scored in batches"
        )
    if torch.equal(beside[0], beside[1]):
        raise EngineError(
            f"{key}: gives texts of different tokens the same embedding; does the eos_token_id of its config end its "
            "tokenizer's texts?"
        )


def _text_embeddings(key: str, model: nn.Module, images: ImageInputs, rows: Sequence[Tensor]) -> Tensor:
    """Of length 1."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    batch = Contrastive().to((torch.zeros(len(rows), *images.shape), right_padded(rows)), device)
    what = f"{key}: cannot be run on images of {' × '.join(map(str, images.shape))} with token ids"
    with torch.no_grad(), quietly(), refusing(what):
        _, text, _ = Contrastive().embed(model, batch)
    return torch.nn.functional.normalize(text.double(), dim=1)
