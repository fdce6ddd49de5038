"""The tasks of a recipe: which columns a row needs, when it is fit to be scored, how rows become a batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import nn

from assay.corpus.checks import SeenIds, check_features, check_id, check_label, check_text
from assay.corpus.errors import BadRow
from assay.corpus.format import Chunk
from assay.corpus.quarantine import row_id
from assay.corpus.shards import Shard
from assay.engine.errors import EngineError
from assay.engine.models import ModelSpec, shared_tokenizer
from assay.engine.registry import Part, Registry
from assay.tasks import CausalLM, Classification, Task

T = TypeVar("T")


@dataclass(frozen=True)
class Encoded:
    """A row as its task wants it: what it costs in a batch, in tokens, and in memory while it waits."""

    data: Any
    length: int
    nbytes: int


@dataclass(frozen=True)
class Sample:
    """A row that is ready to be scored."""

    row: int
    id: str
    encoded: Encoded


@dataclass(frozen=True)
class Rejected:
    """A row that is not, and why."""

    row: int
    id: str | None
    reason: str


class Encoder(Protocol):
    """Turns rows into samples and samples into batches."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that it reads."""
        ...

    def encode(self, rows: Sequence[tuple[Any, ...]]) -> list[Encoded | BadRow]:
        """One result per row; a row holds the values of ``columns``."""
        ...

    def collate(self, data: Sequence[Any]) -> Any:
        """A batch of the task, from the ``data`` of several samples."""
        ...


class TaskSpec(Part):
    """What a sample is."""

    kind: str

    def task(self) -> Task:
        """The task that methods get."""
        raise NotImplementedError

    def encoder(self, models: Mapping[str, tuple[ModelSpec, nn.Module]]) -> Encoder:
        """How this task's rows become batches for these models."""
        raise NotImplementedError


TASKS: Registry[TaskSpec] = Registry("kind")


@TASKS.add("causal_lm")
class CausalLMSpec(TaskSpec):
    """Documents, cut to their first ``max_length`` tokens."""

    kind: Literal["causal_lm"]
    text_column: str = "text"
    max_length: Annotated[int, Field(ge=2)] = 1024
    reduction: Literal["mean", "sum"] = "mean"

    def task(self) -> Task:
        return CausalLM(reduction=self.reduction)

    def encoder(self, models: Mapping[str, tuple[ModelSpec, nn.Module]]) -> Encoder:
        tokenizer = shared_tokenizer({name: spec for name, (spec, _) in models.items()})
        largest = max(tokenizer.get_vocab().values(), default=0)
        for name, (_, model) in models.items():
            self._check_fits(name, model, largest)
        return TextEncoder(self.text_column, tokenizer, self.max_length)

    def _check_fits(self, name: str, model: nn.Module, largest_token: int) -> None:
        positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
        if positions is not None and self.max_length > positions:
            raise EngineError(f"task.max_length is {self.max_length}, but models.{name} has {positions} positions")
        embeddings = getattr(model, "get_input_embeddings", lambda: None)()
        rows = getattr(embeddings, "num_embeddings", None)
        if rows is not None and largest_token >= rows:
            raise EngineError(
                f"models.{name}: the tokenizer goes to token {largest_token}, the embedding has {rows} rows"
            )


@TASKS.add("classification")
class ClassificationSpec(TaskSpec):
    """Vectors (or, with ``shape``, tensors) with a class index each."""

    kind: Literal["classification"]
    classes: Annotated[int, Field(ge=1)]
    input_column: str = "input"
    label_column: str = "label"
    shape: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)] | None = None

    def task(self) -> Task:
        return Classification()

    def encoder(self, models: Mapping[str, tuple[ModelSpec, nn.Module]]) -> Encoder:
        for name, (spec, model) in models.items():
            outputs = spec.output_size(model)
            if outputs is not None and outputs != self.classes:
                raise EngineError(f"task.classes is {self.classes}, but models.{name} has {outputs} outputs")
        sizes = [spec.input_size(model) for spec, model in models.values()]
        known = {size for size in sizes if size is not None}
        if self.shape is not None:
            known.add(math.prod(self.shape))
        if len(known) != 1:
            what = f"they want inputs of {sorted(known)} numbers" if known else "they do not tell their input's size"
            raise EngineError(f"task.shape: the models leave it open ({what}); give the shape of one input")
        size = known.pop()
        return FeatureEncoder(self.input_column, self.label_column, self.classes, tuple(self.shape or (size,)), size)


class TextEncoder:
    """Texts to tokens; padded on the right, where the mask is 0."""

    def __init__(self, column: str, tokenizer: Any, max_length: int) -> None:
        self.columns = (column,)
        self._tokenizer = tokenizer
        self._max_length = max_length

    def encode(self, rows: Sequence[tuple[Any, ...]]) -> list[Encoded | BadRow]:
        name = self.columns[0]
        checked = [attempt(check_text, name, value) for (value,) in rows]
        texts = [text for text in checked if isinstance(text, str)]
        tokens = iter(self._tokens(texts))
        return [text if isinstance(text, BadRow) else self._encoded(next(tokens)) for text in checked]

    def _tokens(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        ids: list[list[int]] = self._tokenizer(texts, truncation=True, max_length=self._max_length)["input_ids"]
        return ids

    def _encoded(self, ids: list[int]) -> Encoded | BadRow:
        if len(ids) < 2:
            return BadRow(f"{self.columns[0]} is {len(ids)} token long; nothing in it can be predicted")
        tokens = np.asarray(ids, np.int32)
        return Encoded(tokens, len(tokens), tokens.nbytes)

    def collate(self, data: Sequence[npt.NDArray[np.int32]]) -> dict[str, torch.Tensor]:
        ids = torch.zeros(len(data), max(map(len, data)), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, tokens in enumerate(data):
            ids[i, : len(tokens)] = torch.from_numpy(tokens)
            mask[i, : len(tokens)] = 1
        return {"input_ids": ids, "attention_mask": mask}


class FeatureEncoder:
    """Lists of numbers and labels to a pair of tensors."""

    def __init__(self, inputs: str, labels: str, classes: int, shape: tuple[int, ...], size: int) -> None:
        self.columns = (inputs, labels)
        self._classes = classes
        self._shape = shape
        self._size = size

    def encode(self, rows: Sequence[tuple[Any, ...]]) -> list[Encoded | BadRow]:
        return [attempt(self._encode_row, *row) for row in rows]

    def _encode_row(self, value: Any, label: Any) -> Encoded:
        inputs, labels = self.columns
        features = check_features(inputs, value, self._size)
        return Encoded((features, check_label(labels, label, self._classes)), 1, features.nbytes)

    def collate(self, data: Sequence[tuple[npt.NDArray[np.float32], int]]) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = np.stack([features for features, _ in data]).reshape(len(data), *self._shape)
        # A copy of torch's own making: numpy aligns to 16 bytes, and a matrix product may round by alignment.
        return torch.from_numpy(inputs).clone(), torch.tensor([label for _, label in data], dtype=torch.int64)


def attempt(check: Callable[..., T], *arguments: Any) -> T | BadRow:
    """The check's result, or the BadRow it raised."""
    try:
        return check(*arguments)
    except BadRow as fault:
        return fault


class RowReader:
    """Turns one shard's chunks into samples and rejections, in row order."""

    def __init__(self, shard: Shard, encoder: Encoder, id_column: str | None) -> None:
        self._shard = shard
        self._encoder = encoder
        self._id_column = id_column
        self._seen = SeenIds()

    @property
    def columns(self) -> list[str]:
        """The columns to read."""
        wanted = [*self._encoder.columns, *([self._id_column] if self._id_column else [])]
        return list(dict.fromkeys(wanted))

    def rows(self, chunk: Chunk) -> Iterator[Sample | Rejected]:
        """Every row of the chunk. The first row with an id uses it up, whatever becomes of that row."""
        ids = self._ids(chunk)
        faults: dict[int, str] = {i: str(id_) for i, id_ in enumerate(ids) if isinstance(id_, BadRow)}
        faults |= self._repeated(ids)
        faults |= chunk.faults
        good = [i for i in range(chunk.length) if i not in faults]
        values = [tuple(chunk.columns[name][i] for name in self._encoder.columns) for i in good]
        encoded = dict(zip(good, self._encoder.encode(values), strict=True))
        for i, id_ in enumerate(ids):
            row, known = chunk.first + i, None if isinstance(id_, BadRow) else id_
            result = encoded.get(i)
            if known is not None and isinstance(result, Encoded):
                yield Sample(row, known, result)
            else:
                yield Rejected(row, known, faults.get(i) or str(result))

    def _ids(self, chunk: Chunk) -> list[str | BadRow]:
        if self._id_column is None:
            return [row_id(self._shard.path, chunk.first + i) for i in range(chunk.length)]
        values = chunk.columns[self._id_column]
        return [
            BadRow(chunk.faults[i]) if i in chunk.faults else attempt(check_id, self._id_column, value)
            for i, value in enumerate(values)
        ]

    def _repeated(self, ids: Sequence[str | BadRow]) -> dict[int, str]:
        if self._id_column is None:
            return {}
        known = [(i, id_) for i, id_ in enumerate(ids) if isinstance(id_, str)]
        repeats = self._seen.repeats([id_ for _, id_ in known])
        reason = f"{self._id_column} repeats that of an earlier row"
        return {i: reason for (i, _), repeated in zip(known, repeats, strict=True) if repeated}
