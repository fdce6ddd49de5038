"""What the derivatives of a run will cost, before anything is spent."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from assay.retrain.magic_checks import Checked
from assay.retrain.magic_replay import replayed_steps
from assay.retrain.magic_training import Training

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class Plan:
    """The cost of ``magic``: exact in steps and in the bytes of checkpoints, an estimate in seconds.

    Attributes:
        steps: T of the run.
        parameters: P, the trained ones.
        checkpoints: states kept at a time, besides the start.
        state_bytes: of one state: parameters and moments.
        checkpoint_bytes: of all that are kept, in memory, or on disk where there is a folder.
        working_bytes: of the derivatives in the state and in the weights of all targets, held twice while they are
            pulled back or written, and of the states and gradients at hand. Activations of one batch, and of its second
            derivatives, come on top.
        forward_steps: made in all, the first time and again.
        smoothness_steps: made for metasmoothness.
        backward_steps: pulled back, one per step and target.
        seconds: what the first step's pace makes of these; None where it was not taken.
    """

    steps: int
    parameters: int
    checkpoints: int
    state_bytes: int
    checkpoint_bytes: int
    working_bytes: int
    forward_steps: int
    smoothness_steps: int
    backward_steps: int
    seconds: float | None = None

    @classmethod
    def of(cls, training: Training, *, targets: int = 1, checkpoints: int | None = None, directions: int = 2) -> Self:
        """Of a run, for so many targets.

        Args:
            checkpoints: None: about log₂ T.
            directions: of metasmoothness.

        Raises:
            ValueError: no checkpoints, or no whole number of them.
        """
        most = max(1, math.ceil(math.log2(training.steps))) if checkpoints is None else checkpoints
        if not isinstance(most, int) or isinstance(most, bool) or most < 1:
            raise ValueError(f"checkpoints: expected an integer of at least 1, or None, got {checkpoints!r}")
        kept, state = min(most, training.steps), training.state_bytes
        at_hand = 5 * (state + training.start.nbytes)  # measured: the optimiser's own graph is most of it
        return cls(
            steps=training.steps,
            parameters=training.start.numel(),
            checkpoints=most,
            state_bytes=state,
            checkpoint_bytes=kept * state,
            working_bytes=2 * targets * state + 8 * targets * training.size + at_hand,
            forward_steps=replayed_steps(training.steps, most),
            smoothness_steps=2 * directions * training.steps,
            backward_steps=training.steps * targets,
        )

    def paced(self, pace: Checked) -> Self:
        """With ``seconds``."""
        forward = self.forward_steps + self.smoothness_steps + self.steps
        return replace(self, seconds=forward * pace.forward + self.backward_steps * pace.backward)

    def __str__(self) -> str:
        time = "" if self.seconds is None else f"; about {self.seconds:.3g} s"
        return (
            f"{self.steps} steps of {self.parameters:,} parameters: {self.forward_steps + self.smoothness_steps} made, "
            f"{self.backward_steps} pulled back; {self.checkpoints} checkpoints of {_size(self.state_bytes)}, "
            f"{_size(self.checkpoint_bytes)}, beside {_size(self.working_bytes)}{time}"
        )


def _size(count: int) -> str:
    return f"{count / 1e6:.3g} MB" if count < 1e9 else f"{count / 1e9:.3g} GB"
