"""A text and nothing else: for methods that run no model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

from torch import nn

from assay.corpus.checks import check_text
from assay.corpus.errors import BadRow
from assay.recipe.errors import EngineError
from assay.recipe.models import ModelSpec
from assay.recipe.tasks.base import TASKS, Encoded, Encoder, TaskSpec, attempt
from assay.tasks import Task


@TASKS.add("text")
class TextSpec(TaskSpec):
    """Texts of which only what they say is looked at."""

    kind: Literal["text"]
    text_column: str = "text"

    asks_models: ClassVar[bool] = False

    def task(self) -> Task:
        raise EngineError("task.kind: of kind text no model is asked anything; expected causal_lm, or another kind")

    def open(self, specs: Mapping[str, ModelSpec]) -> Callable[[Mapping[str, nn.Module]], Encoder]:
        return lambda models: OnlyTexts(self.text_column)


class OnlyTexts:
    """Rows that have a text; a batch holds nothing but what `WithColumns` adds."""

    def __init__(self, column: str) -> None:
        self.columns = (column,)

    @property
    def identity(self) -> dict[str, Any]:
        return {}

    def encode(self, rows: Sequence[tuple[Any, ...]]) -> list[Encoded | BadRow]:
        return [attempt(self._encoded, value) for (value,) in rows]

    def _encoded(self, value: Any) -> Encoded:
        # As short as any other: nothing is padded, so batches are as large as batch.samples says.
        return Encoded(None, 1, len(check_text(self.columns[0], value)))

    def collate(self, data: Sequence[None]) -> None:
        return None
