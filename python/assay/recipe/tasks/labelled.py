"""A sample and its label, each read by an object of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from assay.corpus.errors import BadRow
from assay.corpus.named_files import NamedFiles
from assay.corpus.shards import Shard
from assay.recipe.tasks.base import Columns, Encoded, Encoder, OwnShapes, ReadsFiles, Stacked, attempt
from assay.recipe.tasks.numbers import NumberInputs

if TYPE_CHECKING:
    from typing_extensions import Self


class Inputs(Encoder, Protocol):
    """What a model is called with: an encoder whose batches are that."""

    def examples(self, count: int) -> list[Any]:
        """``data`` of some samples that a model can be tried out on."""
        ...


class Labels(Protocol):
    """What a label is: a class, probabilities, numbers."""

    @property
    def column(self) -> str:
        """The column that it reads."""
        ...

    @property
    def identity(self) -> dict[str, Any]:
        """As an encoder's."""
        ...

    def for_columns(self, columns: Columns) -> Self:
        """The labels of a shard with these columns. ShardError if they are none."""
        ...

    def encode(self, value: Any) -> Any:
        """A row's label. BadRow if it is none."""
        ...

    def collate(self, labels: Sequence[Any]) -> torch.Tensor:
        """The labels of a batch."""
        ...


class LabelledEncoder:
    """Rows to pairs (x, y): ``inputs`` reads and collates x, which may be a tensor or a mapping, ``labels`` y."""

    def __init__(self, inputs: Encoder, labels: Labels) -> None:
        self.columns = (*inputs.columns, labels.column)
        self._inputs, self._labels = inputs, labels

    @property
    def identity(self) -> dict[str, Any]:
        return self._inputs.identity | self._labels.identity

    def for_columns(self, columns: Columns) -> LabelledEncoder:
        return LabelledEncoder(self._inputs, self._labels.for_columns(columns))

    def beside(self, shard: Shard) -> LabelledEncoder:
        inputs = self._inputs.beside(shard) if isinstance(self._inputs, ReadsFiles) else self._inputs
        return LabelledEncoder(inputs, self._labels)

    @property
    def files(self) -> NamedFiles:
        return self._inputs.files if isinstance(self._inputs, ReadsFiles) else {}

    def encode(self, rows: Sequence[tuple[Any, ...]]) -> list[Encoded | BadRow]:
        inputs = self._inputs.encode([row[:-1] for row in rows])
        return [self._labelled(own, row[-1]) for own, row in zip(inputs, rows, strict=True)]

    def _labelled(self, own: Encoded | BadRow, value: Any) -> Encoded | BadRow:
        if isinstance(own, BadRow):
            return own
        label = attempt(self._labels.encode, value)
        if isinstance(label, BadRow):
            return label
        return Encoded((own.data, label), own.length, own.nbytes, own.shape)

    def stack(self, columns: Sequence[Sequence[Any]]) -> Stacked | None:
        *own, values = columns
        inputs = self._inputs.stack(*own) if isinstance(self._inputs, NumberInputs) else None
        if inputs is None or not np.isfinite(inputs).all():
            return None
        labels = [attempt(self._labels.encode, value) for value in values]
        if any(isinstance(label, BadRow) for label in labels):
            return None
        return Stacked((inputs, labels), inputs.nbytes // len(inputs))

    apart = False

    def misfit(self, data: tuple[Any, Any]) -> BadRow | None:
        return self._inputs.misfit(data[0]) if isinstance(self._inputs, OwnShapes) else None

    def collate(self, data: Sequence[tuple[Any, Any]]) -> tuple[Any, torch.Tensor]:
        return self._inputs.collate([x for x, _ in data]), self._labels.collate([y for _, y in data])

    def collate_stacked(self, stacked: Stacked) -> tuple[Any, torch.Tensor]:
        inputs, labels = stacked.data
        return self._inputs.collate(inputs), self._labels.collate(labels)
