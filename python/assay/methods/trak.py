"""TRAK: attributing model behaviour at scale, 2303.14186."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from assay.methods.influence import Influence, Kernel
from assay.methods.targets import Targets
from assay.ops import Kronecker, Sketch
from assay.tasks import Margin, Task


class TRAK(Influence):
    """score_i = mean_k(1 − p_k,i) · mean_k ⟨φ_k(i), (Φ_kᵀΦ_k/n + λI)⁻¹ φ_k(t)⟩, equation 13 of the paper: keep high.

    φ is the projected gradient of the margin f = log(p / (1 − p)); the kernel and Q = 1 − p, which belongs to the
    *training* sample, are averaged over checkpoints separately. A target's samples are averaged first, which by
    linearity is the same as averaging their scores. The paper's soft threshold is not applied: it is a choice for
    sparse datamodels.

    Args:
        models: K checkpoints, best trained on independent halves of the data; each averages away noise.
        task: Classification or CausalLM (whose margin is summed over tokens); the margin is taken of it.
        targets: batches by name.
        sketch: its ``dim`` is the paper's projection dimension. Far below the number of samples given to ``fit``, or
            the second moment overfits; 2,048 in the paper, for tens of thousands of samples.
        damping: λ in units of the mean diagonal (the paper uses 0, which needs many more samples than dimensions).
        layers, name, skip_unsupported: as in ``Influence``.
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
        name: str = "trak",
        skip_unsupported: bool = False,
    ) -> None:
        kernel = Kernel(damping=damping, doubt=True)
        sketch = sketch or Kronecker(16, 16)
        super().__init__(
            models,
            Margin(task),
            targets,
            kernel,
            sketch,
            together=True,
            layers=layers,
            name=name,
            skip_unsupported=skip_unsupported,
        )
