"""DsDm: model-aware dataset selection with datamodels, 2401.12926."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from assay.methods.targets import Targets
from assay.methods.trak import TRAK
from assay.ops import Sketch
from assay.tasks import Task


class DsDm(TRAK):
    """TRAK's estimate of the datamodel of a target *task*: the samples that lower its loss most. Keep high.

    For language models every token is a classification: f = Σ_t log(p_t / (1 − p_t)) and Q = mean_t(1 − p_t). The
    targets' features are averaged before anything else, so that a task is one vector per checkpoint, streamed over the
    pool once. The paper's datamodel predicts the *loss* and takes the lowest; this column is its negative, as in the
    vectors that its authors published, and a test that retrains fixes the sign.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        task: Task,
        targets: Targets,
        *,
        sketch: Sketch | None = None,
        damping: float = 1e-3,
        layers: str | Sequence[str] | None = None,
        name: str = "dsdm",
        skip_unsupported: bool = False,
    ) -> None:
        super().__init__(
            models,
            task,
            targets,
            sketch=sketch,
            damping=damping,
            layers=layers,
            name=name,
            skip_unsupported=skip_unsupported,
        )
