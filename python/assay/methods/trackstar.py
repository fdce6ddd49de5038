"""TrackStar: scalable influence and fact tracing for LLM pretraining, 2410.17413."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from assay.methods.influence import Influence, Kernel
from assay.methods.targets import Targets
from assay.ops import Kronecker, Sketch
from assay.tasks import Task


class TrackStar(Influence):
    """cos(R^(−1/2) φ_i, R^(−1/2) φ_t) with φ the projected loss gradient: keep high.

    R mixes the second moments of the targets' and the pool's features (section 4 of the paper), so that what every
    target shares counts for less; unit length keeps long, loud samples from winning. The paper also divides by an
    optimiser's second moment before projecting, which needs the gradients multiplied out: left out here.

    Args:
        models: one checkpoint, or several.
        task: its loss is differentiated.
        targets: batches by name.
        sketch: per layer.
        damping: added to R, in units of its layer's mean eigenvalue.
        target_share: the targets' share in R; the paper finds .9 to .99.
        layers, name, skip_unsupported: as in ``Influence``.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        task: Task,
        targets: Targets,
        *,
        sketch: Sketch | None = None,
        damping: float = 1e-2,
        target_share: float = 0.9,
        layers: str | Sequence[str] | None = None,
        name: str = "trackstar",
        skip_unsupported: bool = False,
    ) -> None:
        kernel = Kernel(damping=damping, blocks=True, whiten=True, target_share=target_share, normalize=True)
        sketch = sketch or Kronecker(16, 16)
        super().__init__(
            models, task, targets, kernel, sketch, layers=layers, name=name, skip_unsupported=skip_unsupported
        )
