"""What a task of a recipe is: which columns a row needs, when it is fit to be scored, how rows become a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
from torch import nn

from assay.corpus.errors import BadRow
from assay.corpus.format import ColumnFacts
from assay.corpus.named_files import NamedFiles
from assay.corpus.shards import Shard
from assay.recipe.models import ModelSpec
from assay.recipe.parts import Part, Registry
from assay.tasks import Task

if TYPE_CHECKING:
    from typing_extensions import Self

T = TypeVar("T")
Columns = Mapping[str, ColumnFacts]


class Encoded(NamedTuple):
    """A row as its task wants it: what it costs in a batch, in tokens, and in memory while it waits. Samples of other
    ``shape``s share no batch."""

    data: Any
    length: int
    nbytes: int
    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class Stacked:
    """Rows as their task wants them that are all samples, of length 1 and one shape: what ``data`` has of one, these
    arrays and lists have of all of them."""

    data: tuple[Any, ...]
    nbytes: int
    """Of a row."""

    def __len__(self) -> int:
        return len(self.data[0])

    def part(self, start: int, end: int) -> Stacked:
        return Stacked(tuple(values[start:end] for values in self.data), self.nbytes)

    def row(self, i: int) -> Encoded:
        return Encoded(tuple(values[i] for values in self.data), 1, self.nbytes)

    @classmethod
    def joined(cls, stacks: Sequence[Stacked]) -> Stacked:
        """Stacks of rows of one shape, one after the other."""
        if len(stacks) == 1:
            return stacks[0]
        return cls(tuple(map(_joined, zip(*(stack.data for stack in stacks), strict=True))), stacks[0].nbytes)


def _joined(values: Sequence[Any]) -> Any:
    return np.concatenate(values) if isinstance(values[0], np.ndarray) else list(chain.from_iterable(values))


class Encoder(Protocol):
    """Turns rows into samples and samples into batches."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that it reads."""
        ...

    @property
    def identity(self) -> dict[str, Any]:
        """Beside the task's keys: what decides which rows are samples, and what becomes of them, as plain JSON."""
        ...

    def encode(self, rows: Sequence[tuple[Any, ...]]) -> list[Encoded | BadRow]:
        """One result per row; a row holds the values of ``columns``."""
        ...

    def collate(self, data: Sequence[Any]) -> Any:
        """A batch of the task, from the ``data`` of several samples."""
        ...


@runtime_checkable
class Stacks(Protocol):
    """An encoder that needs no object for each row where nothing is wrong with any of them."""

    def stack(self, columns: Sequence[Sequence[Any]]) -> Stacked | None:
        """What ``encode`` makes of rows, given by columns; None unless all are samples, of length 1 and one shape."""
        ...

    def collate_stacked(self, stacked: Stacked) -> Any:
        """A batch of the task: what ``collate`` makes of the same samples."""
        ...


@runtime_checkable
class ReadsColumns(Protocol):
    """An encoder to which a value means what its shard's column says."""

    def for_columns(self, columns: Columns) -> Encoder:
        """The encoder of a shard with these columns. ShardError if it cannot be one."""
        ...


@runtime_checkable
class ReadsOptional(Protocol):
    """An encoder of rows that may lack some columns' keys."""

    @property
    def optional(self) -> frozenset[str]:
        """Those of ``columns`` that are None then."""
        ...


@runtime_checkable
class ReadsFiles(Protocol):
    """An encoder whose values may be paths of files, which lead from where their shard lies."""

    def beside(self, shard: Shard) -> Encoder:
        """The encoder of this shard's rows."""
        ...

    @property
    def files(self) -> NamedFiles:
        """Those that were read so far."""
        ...


@runtime_checkable
class OwnShapes(Protocol):
    """An encoder whose samples may have shapes of their own, of which models may take some and not others."""

    def misfit(self, data: Any) -> BadRow | None:
        """Why a model cannot be run on a sample of this ``data``; None if all can, whatever else they failed at."""
        ...

    @property
    def apart(self) -> bool:
        """Whether samples that share a loss go through the models by shapes, which gives no gradients."""
        ...


@runtime_checkable
class ShowsTokens(Protocol):
    """An encoder whose samples are tokens."""

    def tokens(self, data: Any) -> list[tuple[str, bool]]:
        """A sample's tokens as text, from its ``data``, and which of them its loss and scores are about."""
        ...


Models = Mapping[str, tuple[ModelSpec, nn.Module]]


class TaskSpec(Part):
    """What a sample is."""

    kind: str

    asks_models: ClassVar[bool] = True
    """Whether a model has a loss on its samples."""
    teaches: ClassVar[bool] = True
    """Whether a model is trained on its samples."""

    def column_keys(self) -> dict[str, str]:
        """By key the columns that the task reads, which are looked for before a model loads."""
        named = {key: getattr(self, key) for key in type(self).model_fields if key.endswith("_column")}
        return {key: column for key, column in named.items() if column is not None}

    def seen(self, columns: Columns) -> Self:
        """The task with what the corpus's columns tell filled in, as if its author had. EngineError if they do not fit.

        What is filled in is part of the recipe's identity.
        """
        return self

    @property
    def has_prompts(self) -> bool:
        """Whether a sample may have tokens that do not count."""
        return True

    @property
    def files_column(self) -> str | None:
        """The column in which rows may name files, if there is one."""
        return None

    @property
    def group_rows(self) -> int | None:
        """How many rows after one another share a loss; None where every sample has its own."""
        return None

    @property
    def auto_class(self) -> str:
        """The class of transformers that loads a model for this task."""
        return "AutoModel"

    def task(self) -> Task:
        """The task that methods get."""
        raise NotImplementedError

    def open(self, specs: Mapping[str, ModelSpec]) -> Callable[[Mapping[str, nn.Module]], Encoder]:
        """What makes the encoder of the models, once they are loaded; EngineError for what does not fit, as far as it
        shows before their weights are read."""
        raise NotImplementedError

    def encoder(self, models: Models) -> Encoder:
        """How this task's rows become batches for these models."""
        opened = self.open({name: spec for name, (spec, _) in models.items()})
        return opened({name: model for name, (_, model) in models.items()})


TASKS: Registry[TaskSpec] = Registry("kind")


def attempt(check: Callable[..., T], *arguments: Any) -> T | BadRow:
    """The check's result, or the BadRow it raised."""
    try:
        return check(*arguments)
    except BadRow as fault:
        return fault
