"""TracIn: how much training on a sample took off the target's loss, checkpoint by checkpoint, 2002.08484."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from assay.methods.checkpoints import AlongTraining, Gradients
from assay.methods.sums import Folded
from assay.methods.targets import Targets
from assay.tasks import Task

if TYPE_CHECKING:
    from typing_extensions import Self


class TracIn(AlongTraining):
    """Σ_k η_k ⟨∇ℓ_target(θ_k), ∇ℓ_i(θ_k)⟩ over checkpoints of a run (TracInCP, section 3.2 of the paper): keep high.

    Exact: the target's gradient is taken once per checkpoint, and nothing is projected. What a step of SGD on sample i
    does to the target's loss there, to first order, and nothing of what later steps make of it (see ``SOURCE``). Of
    Adam's steps, normalised and projected, see ``LESS``; inside a trainer ``InRunInfluence``. Features that are kept
    for targets to come are ``Influence``'s, with ``weights`` and ``Kernel()``.

    Columns: ``tracin``, and one per target if there are several.

    Args:
        models, task, targets, rates: as in ``checkpoints.AlongTraining``; ``rates`` are η.
        layers, name, skip_unsupported: as in ``Influence``.
    """

    uses_pool: ClassVar[bool] = False
    kind: ClassVar[str] = "TracIn influence"

    def __init__(
        self,
        models: Sequence[nn.Module],
        task: Task,
        targets: Targets,
        rates: Sequence[float],
        *,
        layers: str | Sequence[str] | None = None,
        name: str = "tracin",
        skip_unsupported: bool = False,
    ) -> None:
        super().__init__(models, task, targets, rates, layers=layers, name=name, skip_unsupported=skip_unsupported)

    def fit(self, pool: Iterable[Any] = ()) -> Self:
        """Take the targets' gradients at every checkpoint; the pool is not looked at.

        Raises:
            ValueError: a target without samples, or none of them with a loss and a finite gradient.
        """
        directions: list[Gradients] = []
        each: list[Folded] = []
        for k, rate in enumerate(self.rates):
            gradients, folded = self._gradients(k)
            directions.append({t: {name: rate * g for name, g in by.items()} for t, by in gradients.items()})
            each.append(folded)
        self._directions, self._of_targets = directions, each
        self.left_out = {name: why for folded in each for name, why in folded.left_out.items()}
        return self
