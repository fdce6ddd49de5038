"""Ids beside the batches of a collator that knows nothing of them."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

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
        _check_order(features, batch)
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


def _check_order(features: Sequence[Any], batch: Mapping[str, Any]) -> None:
    """ValueError where tokens lie in the place of another sample than theirs, as after a sort by length."""
    rows, mask = batch.get("input_ids"), batch.get("attention_mask")
    told = all(isinstance(feature, Mapping) and "input_ids" in feature for feature in features)
    if not told or not isinstance(rows, torch.Tensor) or rows.ndim != 2 or len(rows) != len(features):
        return
    real = mask.bool() if isinstance(mask, torch.Tensor) and mask.shape == rows.shape else torch.ones_like(rows).bool()
    given = [own.tolist() if hasattr(own, "tolist") else list(own) for own in (each["input_ids"] for each in features)]
    for i in range(len(given)):
        found = rows[i][real[i]].tolist()
        own = (given[i][: len(found)], given[i][-len(found) :])  # whole, or cut at an end
        if found not in own and found in given:
            raise ValueError(
                f"the collator puts sample {given.index(found)} of a batch in the place of sample {i}, which would get "
                "its id; expected them in the order in which they come: sort the data set, or by a sampler"
            )
