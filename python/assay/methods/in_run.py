"""In-run influence: what a training step on this sample does to the loss on held-out data, to first order.

*Data Shapley in One Training Run* (2406.11011, first order); with an optimiser's diagonal as in GREATS and OPUS.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from assay.methods.base import Column, Method, Need
from assay.methods.direction import root_of_sum, square_of_length
from assay.methods.targets import Targets, TargetSet
from assay.probe import Dot, Signals, tapped_parameters
from assay.probe.learning_rates import LearningRates
from assay.probe.summed import summed_gradient
from assay.tasks import Task

if TYPE_CHECKING:
    from typing_extensions import Self


class InRunInfluence(Method):
    """s_i = ⟨∇ℓ_i, P g_t⟩ with g_t the gradient of target t's mean loss at the weights as they are: keep high.

    Without an optimiser P is 1, and s_i is by how much target t's loss falls per unit of learning rate, to first order,
    in a step on sample i alone. With one, P is its diagonal times its learning rates, and s_i is what the loss falls
    by: over the batch's size, summed over the steps in which a sample came, that is its in-run Shapley value to first
    order (2406.11011, section 4). Momentum and weight decay are left out: no sample of this step decides them.

    In a ``Reweighter`` every scored step takes the next batch of each target in turn, in eval mode: one more forward
    and backward pass. ``fit`` takes all of them, once.

    Columns: ``in_run``, and one per target if there are several. NaN for a sample with nothing to predict.

    Args:
        model: the model that is trained.
        task: its loss is differentiated.
        targets: batches of held-out data by name. Under ``torch.distributed`` each rank may give its own: the gradients
            are averaged over all ranks' samples, so that every rank must have all targets.
        optimizer: of ``model``'s parameters: SGD, RMSprop, Adagrad, or one of Adam's family. It must have made a step
            before anything is scored (``warmup_steps=1``), but for SGD.
        normalise: divide by ‖P g_t‖, so that a score's unit is a gradient's length, as a mimic score's is: what a
            temperature is easier to choose for.
        layers: globs of the layers to take gradients of; None: every supported layer.
        skip_unsupported: leave out layers that cannot be tapped exactly, instead of raising.
        name: of the aggregated column, and prefix of the targets'.
        process_group: to average over; None: the default group, or this process alone if there is none.
    """

    gathers: ClassVar[int | None] = 0

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        targets: Targets,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        normalise: bool = False,
        layers: str | Sequence[str] | None = None,
        skip_unsupported: bool = False,
        name: str = "in_run",
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.name, self.model, self.task = name, model, task
        self.targets = TargetSet(name, targets).required()
        self.optimizer, self.normalise = optimizer, normalise
        self.layers, self.skip_unsupported = layers, skip_unsupported
        self.parameters = tapped_parameters(model, layers, skip_unsupported=skip_unsupported)
        self._rates = None if optimizer is None else LearningRates(optimizer, model, self.parameters)
        self._group, self._moves = process_group, False
        self._directions = {t: _Direction(self.parameters) for t in self.targets.batches}
        self._turns = {t: _in_turn(batches) for t, batches in self.targets.batches.items()}

    @property
    def columns(self) -> Sequence[Column]:
        per = "" if self.optimizer is not None or self.normalise else " per unit of learning rate"
        return self.targets.columns(f"first-order fall of the loss{per} in a step on the sample,")

    def needs(self) -> Mapping[str, Need]:
        if not self._moves and not all(direction.is_known for direction in self._directions.values()):
            raise RuntimeError(f"{self.name}: call fit() before scoring")
        reductions = {t: Dot(direction) for t, direction in self._directions.items()}
        return {
            "model": Need(
                self.model,
                self.task,
                reductions=reductions,
                layers=self.layers,
                skip_unsupported=self.skip_unsupported,
            )
        }

    def fit(self, pool: Iterable[Any] = ()) -> Self:
        """Take the targets' gradients over all of their batches; the pool is not looked at.

        Raises:
            ValueError: a target without samples, without a loss, or whose gradient is not finite or 0; an optimiser
                that has made no step.
        """
        self._take(self.targets.batches)
        return self

    def refresh(self) -> None:
        """The model has moved: take the gradients at its weights as they are, over each target's next batch.

        Before the first step of an optimiser that scales gradients by earlier ones, this only notes that they move.
        """
        moved, self._moves = self._moves, True
        if not moved and self._rates is not None and not self._rates.are_known:
            return
        self._take({target: islice(turn, 1) for target, turn in self._turns.items()})

    def _take(self, targets: Targets) -> None:
        rates = {} if self._rates is None else self._rates.by_parameter()
        for target, batches in targets.items():
            gradients, count = self._mean(batches)
            if not count:
                raise ValueError(
                    f"{self.name}: target {target!r} has no samples with a loss (any more): expected batches that can "
                    "be gone through again, a list or a DataLoader rather than a generator"
                )
            for name, rate in rates.items():
                gradients[name] *= rate
            if not 0 < (length := self._directions[target].take(gradients)) < math.inf:
                raise ValueError(
                    f"{self.name}: the gradient of target {target!r} has length {length:g} over {count} samples; "
                    "expected a finite one above 0"
                )

    def _mean(self, batches: Iterable[Any]) -> tuple[dict[str, Tensor], int]:
        """The mean gradient of all ranks' samples with a loss, in float32, and how many those are."""
        places = {name: self.model.get_parameter(name) for name in self.parameters}
        sums = {name: torch.zeros_like(p, dtype=torch.float32, requires_grad=False) for name, p in places.items()}
        count = torch.zeros((), dtype=torch.float64, device=next(iter(places.values())).device)
        for batch in batches:
            gradients, with_loss = summed_gradient(self.model, self.task, batch, self.parameters)
            count += with_loss
            for name, total in sums.items():
                total += gradients[name]
        if dist.is_available() and dist.is_initialized() and dist.get_world_size(self._group) > 1:
            for tensor in (count, *sums.values()):
                dist.all_reduce(tensor, group=self._group)
        return {name: total.div_(count.to(total.device)) for name, total in sums.items()}, int(count)

    def score(self, signals: Mapping[str, Signals]) -> dict[str, Tensor]:
        signal = signals["model"]
        each = torch.stack([signal.reduced[t] for t in self.targets.batches], 1)
        if self.normalise:
            lengths = [self._directions[t].norm(signal.left_out) for t in self.targets.batches]
            each = each / each.new_tensor(lengths)
        return self.targets.scores(each.masked_fill(signal.losses.isnan()[:, None], torch.nan))

    def metadata(self) -> dict[str, str]:
        return {"targets": str(self.targets)}


class _Direction(Mapping[str, Tensor]):
    """P g of one target by parameter, as it was last taken."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = list(names)
        self._steps: dict[str, Tensor] = {}
        self._squares: dict[str, Tensor] = {}  # of their lengths

    @property
    def is_known(self) -> bool:
        return bool(self._steps)

    def take(self, steps: dict[str, Tensor]) -> float:
        """Another one -> its length."""
        self._steps = steps
        self._squares = {name: square_of_length(step) for name, step in steps.items()}
        return self.norm(())

    def norm(self, without: Collection[str]) -> float:
        return root_of_sum([square for name, square in self._squares.items() if name not in without])

    def __getitem__(self, name: str) -> Tensor:
        return self._steps[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _in_turn(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches, from the beginning again after the last, for as long as there are any."""
    came = True
    while came:
        came = False
        for batch in batches:
            came = True
            yield batch
