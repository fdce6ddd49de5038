"""Samples that are numbers: vectors, or tensors of one shape."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from assay.corpus.checks import check_features, is_turned, stacked_features
from assay.corpus.errors import BadRow
from assay.recipe.errors import EngineError
from assay.recipe.tasks.base import Encoded, Models, attempt


class NumberInputs:
    """Lists of numbers, flat or nested in the order of ``shape``, to tensors of it."""

    def __init__(self, column: str, shape: Sequence[int]) -> None:
        self.columns = (column,)
        self._shape, self._size = tuple(shape), math.prod(shape)

    @classmethod
    def of(cls, column: str, shape: Sequence[int] | None, models: Models) -> NumberInputs:
        """For these models, which may tell the size of an input. EngineError if they differ, or none tells."""
        known = {size for spec, model in models.values() if (size := spec.input_size(model)) is not None}
        if shape is not None:
            known.add(math.prod(shape))
        if len(known) != 1:
            what = f"they want inputs of {sorted(known)} numbers" if known else "they do not tell their input's size"
            raise EngineError(f"task.shape: the models leave it open ({what}); give the shape of one input")
        return cls(column, tuple(shape or known))

    @property
    def identity(self) -> dict[str, Any]:
        return {}

    def encode(self, rows: Sequence[tuple[Any, ...]]) -> list[Encoded | BadRow]:
        """At once where all rows are arrays of one kind, and one by one those with a fault."""
        values = [value for (value,) in rows]
        together = self.stack(values)
        if together is None:
            return [attempt(self._encode_row, value) for value in values]
        whole: list[bool] = np.isfinite(together).all(1).tolist()  # type: ignore[assignment]
        return [
            # A copy: a view of one row would hold all of them.
            Encoded(features.copy(), 1, features.nbytes) if is_whole else attempt(self._encode_row, value)
            for features, is_whole, value in zip(together, whole, values, strict=True)
        ]

    def stack(self, values: Sequence[Any]) -> npt.NDArray[np.float32] | None:
        """(n, size): what the values hold, finite or not; None unless all are arrays of one kind."""
        together = stacked_features(values, self._size)
        return None if together is None or is_turned(np.shape(values[0]), self._shape) else together

    def _encode_row(self, value: Any) -> Encoded:
        features = check_features(self.columns[0], value, self._size, self._shape)
        return Encoded(features, 1, features.nbytes)

    def examples(self, count: int) -> list[npt.NDArray[np.float32]]:
        return list(np.random.default_rng(0).normal(size=(count, self._size)).astype(np.float32))

    def collate(self, data: Sequence[npt.NDArray[np.float32]] | npt.NDArray[np.float32]) -> torch.Tensor:
        inputs = (data if isinstance(data, np.ndarray) else np.stack(data)).reshape(len(data), *self._shape)
        # A copy of torch's own making: numpy aligns to 16 bytes, and a matrix product may round by alignment.
        return torch.from_numpy(inputs).clone()
