"""LoGra and GraSS: influence with projected factors, 2405.13954 and 2505.18976."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from assay.methods.influence import Influence, Kernel
from assay.methods.targets import Targets
from assay.ops import Kronecker, Sketch
from assay.tasks import Task


class LoGra(Influence):
    """⟨φ_i, (R + λI)⁻¹ φ_t⟩ with R the second moment of each layer's projected loss gradient: keep high.

    Each layer's gradient is projected from both sides and has a Fisher matrix of its own (2405.13954, section 3). With
    a ``Mask`` whose ``then`` is ``Sparse`` it is FactGraSS (2505.18976). The paper projects with principal components
    or at random; this one at random.

    Args:
        models: one checkpoint, or several.
        task: its loss is differentiated.
        targets: batches by name.
        sketch: per layer; 64 × 64 in the paper.
        damping: λ in units of each layer's mean eigenvalue; 0.1 in the paper's code.
        layers, name, skip_unsupported: as in ``Influence``.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        task: Task,
        targets: Targets,
        *,
        sketch: Sketch | None = None,
        damping: float = 0.1,
        layers: str | Sequence[str] | None = None,
        name: str = "logra",
        skip_unsupported: bool = False,
    ) -> None:
        kernel = Kernel(damping=damping, blocks=True)
        sketch = sketch or Kronecker(16, 16)
        super().__init__(
            models, task, targets, kernel, sketch, layers=layers, name=name, skip_unsupported=skip_unsupported
        )
