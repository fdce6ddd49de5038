"""Grad-Mimic: does a training step on this sample move the model towards a better reference?

*Evaluating Sample Utility for Efficient Data Selection by Mimicking Model Weights*, 2501.06708, stage 1's score.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from assay.methods.base import Column, Method, Need
from assay.methods.direction import Direction, Moving, check_reference, direction_towards
from assay.methods.sums import cosines
from assay.probe import Dot, Reduction, Signals, SqNorm, TokenDot, tapped_parameters
from assay.probe.selection import make_taps
from assay.tasks import Task
from assay.tasks.base import ByToken, base_task

_log = logging.getLogger("assay")

# The lineage check looks at the correlation over this many samples ...
LINEAGE_SAMPLES = 256
# ... or over all, if they are at least so many (of two it is 1 or −1, of one nothing) ...
LINEAGE_LEAST = 16
# ... and calls the direction meaningless below this. ‖v‖·m is the first-order term of loss − reference loss: with a
# reference that descends from the model's own start it correlates clearly, with an unrelated one it does not, or
# negatively (docs/methods/grad_mimic.md has the measured figures).
LINEAGE_MINIMUM = 0.3


class GradMimic(Method):
    """m_i = ⟨−∇ℓ_i, v⟩ / ‖v‖ with v = θ_ref − θ over the chosen layers: keep high.

    Columns: ``mimic``; ``loss`` and ``reference_loss``, the two models' losses; ``rho`` = loss − reference_loss
    (RHO-loss, 2206.07137); on request ``mimic_cosine`` = m_i / ‖∇ℓ_i‖ and ``grad_norm`` = ‖∇ℓ_i‖, both over the chosen
    layers. ``reference_loss`` alone is the control to compare with: for wrong labels it is often as good.

    The reference must descend from the model's own initialisation or checkpoint. Between unrelated networks v is mostly
    the difference of two random starts and the score falls below chance; the first batches tell, and a warning says so.

    Args:
        model: the model that the data is to train, θ.
        reference: the same architecture, better trained, θ_ref.
        task: what a sample and its loss are.
        layers: glob or globs of layer names to take the direction over; None: every supported layer.
        cosine, grad_norm: give these columns too (they need per-sample gradient norms).
        tokens: also ``mimic_tokens``, a list with each token's share of ``mimic``, which is their sum: what the layers'
            gradients at the token's position give of it.
        skip_unsupported: score without the layers that cannot be tapped exactly, instead of raising.
        name: name of the first column, and prefix of the others if it is not ``mimic``.

    Raises:
        ValueError: the models' parameters differ in name or shape, in which of them are tied, or in nothing; or
            ``tokens`` of samples that are none, or of a layer whose gradient is not made of single positions'.
    """

    gathers: ClassVar[int | None] = LINEAGE_SAMPLES

    def __init__(
        self,
        model: nn.Module,
        reference: nn.Module,
        task: Task,
        layers: str | Sequence[str] | None = None,
        *,
        cosine: bool = False,
        grad_norm: bool = False,
        tokens: bool = False,
        skip_unsupported: bool = False,
        name: str = "mimic",
    ) -> None:
        self.name = name
        self.model, self.reference, self.task = model, reference, task
        self.cosine, self.grad_norm, self.tokens = cosine, grad_norm, tokens
        self.layers, self.skip_unsupported = layers, skip_unsupported
        self.parameters = tapped_parameters(model, layers, skip_unsupported=skip_unsupported)
        if tokens:
            _check_positions(model, task, self.parameters)
        check_reference(model, reference, self.parameters)
        self._taken: Direction | Moving | None = None
        self._left_out: frozenset[str] = frozenset()  # parameters that could not be tapped after all
        self._pairs: list[tuple[Tensor, Tensor]] = []
        self._lineage: float | None = None

    @property
    def direction(self) -> Mapping[str, Tensor]:
        """v = θ_ref − θ by parameter, those of ``norm``. Copies in size, made when first asked for.

        After ``refresh``, when the model moves, each is made when it is read, and not kept.
        """
        return self._taken if isinstance(self._taken, Moving) else self._direction().steps

    @property
    def norm(self) -> float:
        """‖v‖, over the parameters that could be tapped in what was scored so far."""
        return self._taken.norm(self._left_out) if isinstance(self._taken, Moving) else self._direction().norm

    @property
    def share(self) -> float:
        """The share of ‖v‖² over all trainable parameters that those of ``norm`` hold."""
        return self._direction().share

    def _direction(self) -> Direction:
        taken = self._taken
        if taken is None or isinstance(taken, Moving):
            taken = direction_towards(self.model, self.reference, self.parameters)
        if self._taken is None:
            self._taken = taken
        return taken.without(self._left_out)

    def refresh(self) -> None:
        """The model has moved, or is about to: from now on the direction is that of the weights as they are."""
        if not isinstance(self._taken, Moving):
            self._taken, self._lineage = Moving(self.model, self.reference, self.parameters), None
            self._pairs = []

    @property
    def columns(self) -> Sequence[Column]:
        columns = [
            Column(self.name, "high", "⟨−∇ℓ, θ_ref − θ⟩ / ‖θ_ref − θ‖: step towards the reference"),
            Column(self._named("loss"), "none", "the model's loss"),
            Column(self._named("reference_loss"), "low", "the reference model's loss (the control)"),
            Column(self._named("rho"), "high", "loss − reference_loss (RHO-loss)"),
        ]
        if self.cosine:
            columns.append(Column(self._named("mimic_cosine"), "high", "mimic / grad_norm, in [−1, 1]"))
        if self.grad_norm:
            columns.append(Column(self._named("grad_norm"), "none", "‖∇ℓ‖ over the chosen layers"))
        if self.tokens:
            description = "each token's share of mimic, which is their sum"
            columns.append(Column(self._named("mimic_tokens"), "high", description, None))
        return columns

    def _named(self, score: str) -> str:
        return score if self.name == "mimic" else f"{self.name}_{score}"

    def needs(self) -> Mapping[str, Need]:
        reductions: dict[str, Reduction] = {"direction": Dot(self.direction)}
        if self.cosine or self.grad_norm:
            reductions["sqnorm"] = SqNorm(tuple(self.parameters))
        if self.tokens:
            reductions["tokens"] = TokenDot(self.direction)
        return {
            "model": Need(
                self.model,
                self.task,
                reductions=reductions,
                layers=self.layers,
                skip_unsupported=self.skip_unsupported,
            ),
            "reference": Need(self.reference, self.task),
        }

    def score(self, signals: Mapping[str, Signals]) -> dict[str, Tensor]:
        model, reference = signals["model"], signals["reference"]
        self._left_out = model.left_out
        nothing = model.losses.isnan()  # to predict: such a row has gradient 0, which would rank it above harmful ones
        dot = model.reduced["direction"].masked_fill(nothing, torch.nan)
        mimic = -dot / self.norm
        rho = model.losses - reference.losses
        scores = {
            self.name: mimic,
            self._named("loss"): model.losses,
            self._named("reference_loss"): reference.losses,
            self._named("rho"): rho,
        }
        if self.cosine or self.grad_norm:
            sqnorm = model.reduced["sqnorm"].masked_fill(nothing, torch.nan)
            if self.cosine:
                scores[self._named("mimic_cosine")] = cosines(mimic, sqnorm)
            if self.grad_norm:
                scores[self._named("grad_norm")] = sqnorm.sqrt()
        if self.tokens:
            shares = -model.reduced["tokens"] / self.norm
            scores[self._named("mimic_tokens")] = shares.masked_fill(nothing[:, None].to(shares.device), torch.nan)
        self._check_lineage(-dot, rho)
        return scores

    def _check_lineage(self, first_order: Tensor, excess: Tensor) -> None:
        """Correlate ‖v‖·m with loss − reference loss on the first samples; warn once if they disagree."""
        if self._lineage is not None or bool(excess.isnan().all()):  # in a trainer the reference may not have run
            return
        self._pairs = [*self._pairs, (first_order.double().cpu(), excess.double().cpu())]  # a copy gathers its own
        if sum(len(x) for x, _ in self._pairs) < LINEAGE_SAMPLES:
            return
        self._lineage = self._correlation()
        if not self._lineage >= LINEAGE_MINIMUM:
            _log.warning("%s: %s", self.name, self._lineage_warning())

    def _known(self) -> Tensor:
        """(2, n): the pairs that were gathered of numbers."""
        pairs = torch.cat([torch.stack(pair) for pair in self._pairs] or [torch.empty(2, 0)], 1)
        return pairs[:, pairs.isfinite().all(0)]

    def _correlation(self) -> float:
        known = self._known()
        return float(torch.corrcoef(known)[0, 1]) if known.shape[1] > 1 else math.nan

    def _lineage_warning(self) -> str:
        return (
            f"‖v‖·mimic and loss − reference loss correlate only {self._lineage:.2f} (expected at least "
            f"{LINEAGE_MINIMUM}): the direction to this reference means little. Does it descend from this model's own "
            "initialisation or checkpoint? Otherwise use reference_loss or rho"
        )

    def metadata(self) -> dict[str, str]:
        if self._lineage is None and self._known().shape[1] >= LINEAGE_LEAST:
            self._lineage = self._correlation()
        facts = {"direction_norm": f"{self.norm:.6g}", "direction_share": f"{self.share:.4f}"}
        if self._lineage is not None:
            facts["lineage_correlation"] = f"{self._lineage:.4f}"
            if not self._lineage >= LINEAGE_MINIMUM:
                facts["warning"] = self._lineage_warning()
        return facts


def _check_positions(model: nn.Module, task: Task, parameters: Sequence[str]) -> None:
    if not isinstance(base_task(task), ByToken):
        raise ValueError(f"GradMimic: tokens: {type(task).__name__}'s samples are no tokens; leave it out")
    for tap in make_taps(model, parameters):
        if tap.rule is None or not tap.rule.by_position:
            raise ValueError(
                f"GradMimic: tokens: the gradient of layer {tap.layer!r} ({type(tap.module).__name__}) is not made of "
                f"single tokens'; leave the layer out: layers=['*', '!{tap.layer}']"
            )
