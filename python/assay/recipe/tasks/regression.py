"""Numbers per sample: one or several targets for an input of numbers or text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from assay.corpus.checks import check_numbers
from assay.recipe.errors import EngineError
from assay.recipe.library_calls import quietly, refusing
from assay.recipe.model_files import shortened
from assay.recipe.tasks.base import TASKS, Columns, Encoder, Models
from assay.recipe.tasks.classification import InputKeys
from assay.recipe.tasks.labelled import Inputs, LabelledEncoder
from assay.recipe.tasks.labels import NUMBERS, check_problem
from assay.recipe.trials import device_of, in_eval_mode
from assay.tasks import Regression, Task
from assay.tasks.base import call, logits_of, to_device

if TYPE_CHECKING:
    from typing_extensions import Self

_TYPES = (*NUMBERS, "list<", "mixed", "null")


@TASKS.add("regression")
class RegressionSpec(InputKeys):
    """Numbers or texts, with one number each, or a list of as many numbers as the models give."""

    kind: Literal["regression"]
    target_column: str = "target"

    def task(self) -> Task:
        return Regression()

    def seen(self, columns: Columns) -> Self:
        facts = columns.get(self.target_column)
        if facts is not None and not facts.type.startswith(_TYPES):
            raise EngineError(f"column {self.target_column!r} holds {shortened([facts.type])}; expected numbers")
        if facts is not None and facts.classes is not None:
            raise EngineError(
                f"column {self.target_column!r} holds classes ({shortened(facts.classes)}), not quantities; "
                "kind: classification takes them"
            )
        return self

    def rows(self, models: Models, tokenizer: Any) -> Encoder:
        check_problem(models, "regression")
        inputs = self.inputs(models, tokenizer)
        return LabelledEncoder(inputs, NumberTargets(self.target_column, _output_shape(models, inputs)))


@dataclass(frozen=True)
class NumberTargets:
    """Numbers per sample, of the ``shape`` of one prediction."""

    column: str
    shape: tuple[int, ...]

    @property
    def identity(self) -> dict[str, Any]:
        return {"outputs": list(self.shape)}

    def for_columns(self, columns: Columns) -> NumberTargets:
        return self

    def encode(self, value: Any) -> npt.NDArray[np.float32]:
        return check_numbers(self.column, value, int(np.prod(self.shape, dtype=np.int64)), self.shape)

    def collate(self, labels: Sequence[npt.NDArray[np.float32]]) -> Tensor:
        return torch.from_numpy(np.stack(labels)).clone().view(len(labels), *self.shape)


def _output_shape(models: Models, inputs: Inputs) -> tuple[int, ...]:
    """The shape of one prediction, which the models are tried out for. EngineError if they differ in it."""
    shapes = {}
    for name, (_, model) in models.items():
        x = to_device(inputs.collate(inputs.examples(2)), device_of(model))
        what = f"models.{name}: cannot be run on the task's inputs"
        with quietly(), in_eval_mode(model), torch.no_grad(), refusing(what):
            output = logits_of(call(model, x))
        if output.ndim == 0 or len(output) != 2:
            raise EngineError(f"models.{name}: gives {tuple(output.shape)} for two samples; expected a prediction each")
        shapes[name] = tuple(output.shape[1:])
    (first, shape), *others = shapes.items()
    for name, other in others:
        if other != shape:
            raise EngineError(f"models.{first} predicts {shape or 'one number'}, models.{name} {other or 'one number'}")
    return shape
