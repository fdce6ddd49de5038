"""Pairs of images and texts, each of which is compared with the others of its group of rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from assay.corpus.errors import BadRow
from assay.corpus.named_files import NamedFiles
from assay.corpus.shards import Shard
from assay.recipe.errors import EngineError
from assay.recipe.models import ModelSpec, own_tokenizers
from assay.recipe.tasks.base import TASKS, Encoded, Encoder, Models
from assay.recipe.tasks.images import ImageInputs, ImageTaskSpec, each_shape
from assay.recipe.tasks.text_rows import Reader, TextInputs, Tokens, Trial, check_room
from assay.recipe.trials import device_of
from assay.tasks import Contrastive, Task
from assay.tasks.contrastive import Embedded, judges_pairs

_TOLERANCE = 1e-4  # of an embedding of length 1, as for logits in `causal_checks`


@TASKS.add("contrastive")
class ContrastiveSpec(ImageTaskSpec):
    """Images with their texts, for models like CLIP and SigLIP; the loss compares ``group`` rows after one another of a
    shard."""

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

    def open(self, specs: Mapping[str, ModelSpec]) -> Callable[[Mapping[str, nn.Module]], Encoder]:
        tokenizer = next(iter(own_tokenizers(specs).values()))
        self.look_for_preprocessors(specs)
        return lambda models: self._encoder({name: (specs[name], model) for name, model in models.items()}, tokenizer)

    def _encoder(self, models: Models, tokenizer: Any) -> Encoder:
        _check_kinds(models)
        images = self.images(self.image_column, models)
        vocabulary = set(tokenizer.get_vocab().values())
        all_tokens = max(vocabulary, default=0) + 1
        limit, owner = min((_text_setting(model, "vocab_size") or all_tokens, n) for n, (_, model) in models.items())
        usable = sorted(i for i in vocabulary - set(tokenizer.all_special_ids) if i < limit)
        # Padded with 0: whether a CLIP looks for a text's end by its number or for the highest, it stands before that.
        trial = Trial(tokenizer, usable or list(range(limit)), pad=0, types=False)
        length = self._length(models)
        check_room(tokenizer, length)
        reader = Reader(tokenizer, length, limit, f"models.{owner}", 0, False, trial.row(1, 5))
        if any(_pads_fully(model) for _, model in models.values()):
            texts = _full_texts(self.text_column, reader, models)
            for name, (_, model) in models.items():
                _try_full(f"models.{name}", model, images, texts, trial)
            return PairEncoder(images, texts)
        for name, (_, model) in models.items():
            _try_out(f"models.{name}", model, images, trial)
        end, plain = tokenizer.eos_token_id, reader.call(["a"])["input_ids"][0]
        reader = replace(reader, ends=(end, plain.count(end))) if end in plain else reader
        return PairEncoder(images, TextInputs((self.text_column,), reader))

    def _length(self, models: Models) -> int:
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


class PairEncoder:
    """Rows to batches (images, texts) of `Contrastive`."""

    def __init__(self, images: ImageInputs, texts: TextInputs) -> None:
        self.columns = (*images.columns, *texts.columns)
        self._images, self._texts = images, texts

    @property
    def identity(self) -> dict[str, Any]:
        return self._images.identity | self._texts.identity

    def beside(self, shard: Shard) -> PairEncoder:
        """For the rows of this shard."""
        return PairEncoder(self._images.beside(shard), self._texts)

    @property
    def files(self) -> NamedFiles:
        return self._images.files

    def encode(self, rows: Sequence[tuple[Any, ...]]) -> list[Encoded | BadRow]:
        images = self._images.encode([(image,) for image, _ in rows])
        texts = self._texts.encode([(text,) for _, text in rows])
        return [_pair(*own) for own in zip(images, texts, strict=True)]

    def collate(self, data: Sequence[tuple[Any, Tokens]]) -> tuple[Tensor | dict[str, Tensor], dict[str, Tensor]]:
        return self._images.collate([image for image, _ in data]), self._texts.collate([text for _, text in data])

    @property
    def apart(self) -> bool:
        return self._images.own_sizes

    def misfit(self, data: tuple[Any, Tokens]) -> BadRow | None:
        pixels, texts = self.collate([data])
        return self._images.misfit_of(data[0], lambda model: _embedded(model, pixels, texts))


def _pair(image: Encoded | BadRow, text: Encoded | BadRow) -> Encoded | BadRow:
    if isinstance(image, BadRow):
        return image
    if isinstance(text, BadRow):
        return text
    return Encoded((image.data, text.data), image.length + text.length, image.nbytes + text.nbytes, image.shape)


def _text_setting(model: nn.Module, key: str) -> int | None:
    value = getattr(getattr(getattr(model, "config", None), "text_config", None), key, None)
    return value if isinstance(value, int) else None


def _check_kinds(models: Models) -> None:
    """EngineError for models that are none of two towers, or not of one loss."""
    for name, (_, model) in models.items():
        found = type(model).__name__
        if not isinstance(getattr(model, "logit_scale", None), Tensor):
            raise EngineError(
                f"models.{name}: is a {found}, without a logit_scale; a contrastive task needs a model like CLIP"
            )
    kinds = {judges_pairs(model): name for name, (_, model) in models.items()}
    if len(kinds) > 1:
        raise EngineError(
            f"models.{kinds[True]} judges every pair by itself (it has a logit_bias, as SigLIP has), models."
            f"{kinds[False]} compares the pairs of a group, as CLIP does; score them in recipes of their own"
        )


def _model_type(model: nn.Module) -> str | None:
    return getattr(getattr(model, "config", None), "model_type", None)


def _pads_fully(model: nn.Module) -> bool:
    """Whether a model wants its texts filled up to all of its positions, and no mask."""
    return _model_type(model) in ("siglip", "siglip2")


class FullTexts(TextInputs):
    """Texts that are filled up to ``positions`` tokens on the right, without a mask: so SigLIP was trained. It reads
    a text off the last token, whatever that is."""

    def __init__(self, column: str, reader: Reader, positions: int) -> None:
        super().__init__((column,), reader)
        self._positions, self._pad = positions, reader.pad

    @property
    def identity(self) -> dict[str, Any]:
        return super().identity | {"filled_up": [self._positions, self._pad]}

    def collate(self, data: Sequence[Tokens]) -> dict[str, Tensor]:
        ids = torch.full((len(data), self._positions), self._pad, dtype=torch.int64)
        for row, own in zip(ids, data, strict=True):
            row[: len(own.ids)] = torch.from_numpy(own.ids)
        return {"input_ids": ids}


def _full_texts(column: str, reader: Reader, models: Models) -> FullTexts:
    """EngineError if the models differ in what they want, or it cannot be told."""
    wanted = {_text_setting(m, "max_position_embeddings") if _pads_fully(m) else None for _, m in models.values()}
    positions = wanted.pop()
    if wanted or positions is None:
        raise EngineError(
            "the models differ in how many tokens a text is filled up to; score them in recipes of their own"
        )
    pad = reader.tokenizer.pad_token_id
    if pad is None or pad >= reader.limit:
        raise EngineError(f"{reader.owner}: its tokenizer has no pad_token, which SigLIP's texts are filled up with")
    return FullTexts(column, replace(reader, pad=pad), positions)


def _try_full(key: str, model: nn.Module, images: ImageInputs, texts: FullTexts, trial: Trial) -> None:
    """EngineError for a model that cannot be run on filled up texts."""
    _text_embeddings(key, model, images, texts.collate([trial.row(1, 5)]))


def _try_out(key: str, model: nn.Module, images: ImageInputs, trial: Trial) -> None:
    """Refuse a model whose embedding of a text depends on the padding beside it, or does not depend on the text.

    The latter is what becomes of a CLIP whose config and tokenizer differ in the token that ends a text.
    """
    short, long = (1, 5, ()), (2, 9, ())
    (alone,), (beside, other) = (
        _text_embeddings(key, model, images, trial.sample(rows)) for rows in ([short], [short, long])
    )
    if not torch.allclose(alone, beside, rtol=0, atol=_TOLERANCE):
        raise EngineError(
            f"{key}: a longer text in the batch changes a text's embedding; it cannot be scored in batches"
        )
    if torch.equal(beside, other):
        raise EngineError(
            f"{key}: gives texts of different tokens the same embedding; does the eos_token_id of its config end its "
            "tokenizer's texts?"
        )


def _text_embeddings(key: str, model: nn.Module, images: ImageInputs, texts: dict[str, Tensor]) -> Tensor:
    """Of length 1."""

    def run(some: Sequence[Any]) -> Tensor:
        return _embedded(model, images.collate(some), texts).text

    embedded = each_shape(key, images, run, count=len(texts["input_ids"]))
    return torch.nn.functional.normalize(embedded.double(), dim=1)


def _embedded(model: nn.Module, images: Tensor | dict[str, Tensor], texts: dict[str, Tensor]) -> Embedded:
    return Contrastive().embed(model, Contrastive().to((images, texts), device_of(model)))
