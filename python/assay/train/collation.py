"""Ids beside the batches of a collator that knows nothing of them."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from assay.train.checks import name_of


@dataclass(frozen=True)
class WithIds:
    """Collates without a column, and adds it to the batch as a list of strings."""

    collator: Any
    column: str

    def __call__(self, features: Sequence[Any]) -> Any:
        ids = [one_id(feature, self.column) for feature in features]
        batch = self.collator(without(features, self.column))
        if not isinstance(batch, MutableMapping):
            raise TypeError(f"the collator gives a {type(batch).__name__}; expected a mapping, to put the ids into")
        batch[self.column] = ids
        return batch


@dataclass(frozen=True)
class WithoutIds:
    """Collates without a column, if it is there."""

    collator: Any
    column: str | None

    def __call__(self, features: Sequence[Any]) -> Any:
        return self.collator(features if self.column is None else without(features, self.column))


def without(features: Sequence[Any], column: str) -> list[Any]:
    return [
        {name: value for name, value in feature.items() if name != column}
        if isinstance(feature, Mapping) and column in feature
        else feature
        for feature in features
    ]


def one_id(feature: Any, column: str) -> str:
    if not isinstance(feature, Mapping) or column not in feature:
        found = ", ".join(map(str, feature)) if isinstance(feature, Mapping) else f"a {type(feature).__name__}"
        raise ValueError(f"id_column: a training sample has no {column!r}, only {found}; expected its id")
    value = feature[column]
    if (name := name_of(value)) is None:
        raise ValueError(
            f"id_column: {column!r} of a training sample is {value!r:.80}; expected a string or an integer"
        )
    return name
