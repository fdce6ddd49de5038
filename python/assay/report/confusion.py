"""Which labels the models together take for which others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Confusion:
    """Counts (C, C) of rows: by their label, and by what is predicted. ``by``: the score that predicts."""

    by: str
    classes: Sequence[str]
    counts: npt.NDArray[np.int64]
    note: str
