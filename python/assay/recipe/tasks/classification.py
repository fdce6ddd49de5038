"""A class per sample: vectors, or tensors, of numbers with an integer label."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field
from torch import nn

from assay.recipe.errors import EngineError
from assay.recipe.models import ModelSpec
from assay.recipe.tasks.base import TASKS, Encoder, TaskSpec
from assay.recipe.tasks.labelled import LabelledEncoder
from assay.recipe.tasks.labels import ClassLabels
from assay.recipe.tasks.numbers import NumberInputs
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
        return LabelledEncoder(self._inputs(models), ClassLabels(self.label_column, self.classes))

    def _inputs(self, models: Mapping[str, tuple[ModelSpec, nn.Module]]) -> Encoder:
        """What reads a sample's input: an encoder whose batches are what the models are called with."""
        return NumberInputs.of(self.input_column, self.shape, models)
