"""The labels of a recipe's samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from assay.corpus.checks import check_label


class ClassLabels:
    """A class index per sample."""

    def __init__(self, column: str, classes: int) -> None:
        self.column, self._classes = column, classes

    @property
    def identity(self) -> dict[str, Any]:
        return {}

    def encode(self, value: Any) -> int:
        return check_label(self.column, value, self._classes)

    def collate(self, labels: Sequence[int]) -> torch.Tensor:
        return torch.tensor(labels, dtype=torch.int64)
