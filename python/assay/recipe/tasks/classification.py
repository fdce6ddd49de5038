"""A class per sample: numbers, texts, pairs of texts or images, with a label each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, PrivateAttr, model_validator
from torch import nn

from assay.corpus.format import ColumnFacts
from assay.recipe.models import ModelSpec
from assay.recipe.parts import located
from assay.recipe.tasks.base import TASKS, Columns, Encoder, Models
from assay.recipe.tasks.images import ImageTaskSpec, try_out
from assay.recipe.tasks.labelled import Inputs, LabelledEncoder, Labels
from assay.recipe.tasks.labels import (
    LabelKeys,
    check_probability_column,
    check_problem,
    class_labels,
    labels_seen,
    soft_labels,
)
from assay.recipe.tasks.numbers import NumberInputs
from assay.recipe.tasks.text_rows import TextInputs, TextTaskSpec, make_reader
from assay.tasks import Classification, Task

if TYPE_CHECKING:
    from typing_extensions import Self


# Which column a sample's input is in, and the keys that go with it.
_INPUTS = {
    "input_column": ("shape",),
    "text_column": ("text_pair_column", "max_length"),
    "image_column": ("preprocessor", "max_pixels", "max_bytes"),
}


class InputKeys(ImageTaskSpec, TextTaskSpec):
    """The keys of a task whose samples are numbers, texts or images: one of ``input_column``, ``text_column`` and
    ``image_column``."""

    input_column: str | None = None
    text_column: str | None = None
    text_pair_column: str | None = None
    image_column: str | None = None
    max_length: Annotated[int, Field(ge=2)] | None = None
    shape: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _one_input(self) -> Self:
        given = [key for key in _INPUTS if getattr(self, key) is not None]
        if len(given) > 1:
            raise located((given[1],), f"is given beside {given[0]}; a sample has one of them", getattr(self, given[1]))
        for needs, keys in _INPUTS.items():
            for key in keys if [needs] != (given or ["input_column"]) else ():
                if getattr(self, key) != type(self).model_fields[key].default:
                    raise located((key,), f"goes with {needs}", getattr(self, key))
        return self

    @property
    def auto_class(self) -> str:
        if self.image_column is not None:
            return "AutoModelForImageClassification"
        return "AutoModelForSequenceClassification" if self.text_column is not None else "AutoModel"

    @property
    def reads_text(self) -> bool:
        return self.text_column is not None

    def column_keys(self) -> dict[str, str]:
        named = super().column_keys()
        return named if self.text_column or self.image_column else {"input_column": "input"} | named

    def open(self, specs: Mapping[str, ModelSpec]) -> Callable[[Mapping[str, nn.Module]], Encoder]:
        if self.image_column is not None:
            self.look_for_preprocessors(specs)
        return super().open(specs)

    def inputs(self, models: Models, tokenizer: Any) -> Inputs:
        """What reads a sample's input."""
        if self.image_column is not None:
            images = self.images(self.image_column, models)
            for name, (_, model) in models.items():
                try_out(f"models.{name}", model, images)
            return images
        if self.text_column is None:
            return NumberInputs.of(self.column_keys()["input_column"], self.shape, models)
        columns = [self.text_column, *([self.text_pair_column] if self.text_pair_column is not None else [])]
        return TextInputs(columns, make_reader(models, tokenizer, self.max_length, pairs=len(columns) > 1))


@TASKS.add("classification")
class ClassificationSpec(InputKeys, LabelKeys):
    """Numbers, texts, pairs of texts or images, with a class each, or with probabilities of all classes."""

    kind: Literal["classification"]
    label_column: str = "label"
    soft_labels: bool | None = None
    _facts: ColumnFacts | None = PrivateAttr(None)

    def task(self) -> Task:
        return Classification(soft=bool(self.soft_labels))

    def seen(self, columns: Columns) -> Self:
        facts = columns.get(self.label_column)
        filled: dict[str, Any] = {}
        if self.soft_labels is None and facts is not None:
            filled["soft_labels"] = facts.type.startswith("list<")
        if filled.get("soft_labels", self.soft_labels):
            check_probability_column(self, self.label_column, facts)
        else:
            filled["labels"] = labels_seen(self, self.label_column, facts)
        made = self.model_copy(update=filled)
        made._facts = facts
        return made

    def rows(self, models: Models, tokenizer: Any) -> Encoder:
        check_problem(models, "single_label_classification")
        labels: Labels
        if self.soft_labels:
            labels = soft_labels(self, self.label_column, models)
        else:
            labels = class_labels(self, self.label_column, self._facts, models)
        return LabelledEncoder(self.inputs(models, tokenizer), labels)
