"""A class per sample: vectors, or tensors, of numbers with an integer label."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import nn

from assay.corpus.checks import check_features, check_label
from assay.corpus.errors import BadRow
from assay.recipe.errors import EngineError
from assay.recipe.models import ModelSpec
from assay.recipe.tasks.base import TASKS, Encoded, Encoder, TaskSpec, attempt
from assay.tasks import Classification, Task


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


class FeatureEncoder:
    """Lists of numbers and labels to a pair of tensors."""

    def __init__(self, inputs: str, labels: str, classes: int, shape: tuple[int, ...], size: int) -> None:
        self.columns = (inputs, labels)
        self._classes = classes
        self._shape = shape
        self._size = size

    @property
    def identity(self) -> dict[str, Any]:
        return {}

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
