"""A class per sample: images, or vectors or tensors of numbers, with an integer label."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from assay.recipe.errors import EngineError
from assay.recipe.models import ModelSpec
from assay.recipe.parts import located
from assay.recipe.tasks.base import TASKS, Encoder
from assay.recipe.tasks.images import ImageTaskSpec, try_out
from assay.recipe.tasks.labelled import LabelledEncoder
from assay.recipe.tasks.labels import ClassLabels
from assay.recipe.tasks.numbers import NumberInputs
from assay.tasks import Classification, Task


@TASKS.add("classification")
class ClassificationSpec(ImageTaskSpec):
    """Images, or vectors (or, with ``shape``, tensors), with a class index each."""

    kind: Literal["classification"]
    classes: Annotated[int, Field(ge=1)]
    input_column: str = "input"
    image_column: str | None = None
    label_column: str = "label"
    shape: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _images_or_numbers(self) -> ClassificationSpec:
        others = ("input_column", "shape") if self.image_column else ("preprocessor", "max_pixels", "max_bytes")
        for key in others:
            if key in self.model_fields_set and getattr(self, key) != type(self).model_fields[key].default:
                said = "goes with numbers, not with image_column" if self.image_column else "goes with image_column"
                raise located((key,), f"{said}; leave one of them out", getattr(self, key))
        return self

    @property
    def auto_class(self) -> str:
        return "AutoModelForImageClassification" if self.image_column else super().auto_class

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
        if self.image_column is not None:
            images = self.images(self.image_column, models)
            for name, (_, model) in models.items():
                batch = torch.zeros(1, *images.shape), torch.zeros(1, dtype=torch.int64)
                try_out(f"models.{name}", Classification(), model, batch, images.shape)
            return images
        return NumberInputs.of(self.input_column, self.shape, models)
