"""Sums of whole gradients over samples, and what is made of one sample's: what takes them without a projection."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from assay.methods.parts import State, states
from assay.probe import PerSampleGradient, Probe, Signals
from assay.tasks import Sampled, Task
from assay.tasks.base import unlabelled


@dataclass
class Sums(ABC):
    """A feature that adds something of the gradients up over samples, and marks those that it could not add.

    Attributes:
        parameters: by name; sample b has a 1 in a parameter's place where its gradient there was left out, else 0.
    """

    parameters: Sequence[str]

    def __post_init__(self) -> None:
        self._places = {name: slice(i, i + 1) for i, name in enumerate(self.parameters)}

    @property
    def size(self) -> int:
        return len(self.parameters)

    def place(self, parameter: str) -> slice:
        return self._places[parameter]

    def __call__(self, parameter: str, gradient: PerSampleGradient) -> Tensor:
        return (~self.add(parameter, gradient))[:, None].float()

    @abstractmethod
    def add(self, parameter: str, gradient: PerSampleGradient) -> Tensor:
        """Add the samples with a finite gradient -> which those are, (B,) bool."""

    @property
    def given(self) -> State:
        """What gradients are added up by, beside the parameters."""
        return None

    @abstractmethod
    def fresh(self) -> Sums:
        """The same, of no sample yet."""

    @abstractmethod
    def state(self) -> State:
        """What was added up."""

    @abstractmethod
    def join(self, state: State) -> None:
        """Add what another one has added up, of samples that come after these."""


@dataclass
class Total(Sums):
    """The gradients' own sum, by parameter."""

    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, parameter: str, gradient: PerSampleGradient) -> Tensor:
        total, finite = gradient.total()
        add_to(self.sums, {parameter: total})
        return finite

    def fresh(self) -> Total:
        return Total(self.parameters)

    def state(self) -> State:
        return self.sums

    def join(self, state: State) -> None:
        add_to(self.sums, state)


def add_to(sums: dict[str, Tensor], others: Mapping[str, Tensor]) -> None:
    """Add tensors up by name, out of place."""
    for name, tensor in others.items():
        sums[name] = sums[name] + tensor if name in sums else tensor


@dataclass
class Folded:
    """The samples that a ``Sums`` has seen.

    Attributes:
        samples: all of them.
        with_loss: those with something to predict that can be; the gradient of another is 0, or not finite.
        broken: by parameter, those of ``with_loss`` whose gradient in it was left out.
        broken_samples: those that a fit left out although something is predicted of them: whose gradient is not finite
            throughout, or whose feature or embedding is not, and texts without a word.
        left_out: parameters that could not be tapped, with the reason.
    """

    samples: int = 0
    with_loss: int = 0
    broken: Counter[str] = field(default_factory=Counter)
    broken_samples: int = 0
    left_out: dict[str, str] = field(default_factory=dict)

    def state(self) -> State:
        return {**vars(self), "broken": dict(self.broken)}

    def join(self, other: Mapping[str, Any]) -> None:
        """Count what another one has counted, of which this is the ``state``."""
        self.samples += other["samples"]
        self.with_loss += other["with_loss"]
        self.broken.update(other["broken"])
        self.broken_samples += other["broken_samples"]
        self.left_out |= other["left_out"]

    def note(self, signals: Signals, fine: Tensor) -> None:
        """Count the samples of a batch, of which a fit can take those that are ``fine``, (B,) bool."""
        silent = unlabelled(signals, len(fine))
        self.samples += len(fine)
        self.broken_samples += int((~fine if silent is None else ~(fine | silent.to(fine.device))).sum())

    def count(self, parameter: str) -> int:
        """The samples that a mean over the parameter's gradients is of."""
        return self.with_loss - self.broken[parameter]

    def check(self, what: str, parameters: Iterable[str]) -> None:
        """ValueError if nothing was seen, or nothing finite in one of the parameters."""
        if not self.samples:
            raise ValueError(f"{what} has no samples")
        if all(map(self.count, parameters)) and self.with_loss:
            return
        raise ValueError(
            f"{what} has no samples with a finite gradient: of {self.samples}, {self.with_loss} have a loss"
        )


def fold(
    model: nn.Module,
    task: Task,
    sums: Sums,
    batches: Iterable[Any],
    *,
    skip_unsupported: bool,
    drawn: int | None = None,
) -> Folded:
    """Run the model over the batches and add their gradients to ``sums``, part by part.

    Args:
        drawn: with labels drawn from the model by this seed, the same whenever the same samples come, in whatever
            batches; None: with their own.
    """

    def part(batches: Iterable[Any], first: int) -> State:
        own, folded = sums.fresh(), Folded()
        probe = Probe(model, task, reductions={"sums": own}, logits=False, skip_unsupported=skip_unsupported)
        for batch in batches:
            if drawn is not None:
                probe.task = Sampled(task, drawn, first=first + folded.samples)
            signals = probe(batch)
            with_loss = ~signals.losses.isnan()
            folded.with_loss += int(with_loss.sum())
            broken = signals.reduced["sums"]
            folded.note(signals, ~broken.any(1))
            counts = broken[with_loss].sum(0, dtype=torch.long).tolist()
            folded.broken.update(dict(zip(sums.parameters, counts, strict=True)))
        folded.left_out |= probe.left_out
        return {"sums": own.state(), "folded": folded.state()}

    whole = Folded()
    for state in states(batches, part, sums.given):
        sums.join(state["sums"])
        whole.join(state["folded"])
    return whole


def features_of(probe: Probe, batches: Iterable[Any], folded: Folded) -> Iterator[Tensor]:
    """(B, size) of each batch; the samples, those with a loss, and what cannot be tapped, are noted in ``folded``."""
    for batch in batches:
        signals = probe(batch)
        folded.note(signals, signals.reduced["feature"].isfinite().all(1))
        folded.with_loss += int((~signals.losses.isnan()).sum())
        folded.left_out |= probe.left_out
        yield sample_features(signals)


def sample_features(signals: Signals) -> Tensor:
    """(B, size), NaN where there is nothing to predict: an influence of 0 would rank such a sample above bad ones."""
    return signals.reduced["feature"].masked_fill(signals.losses.isnan()[:, None], torch.nan)


def samples_left_out(*each: Folded) -> str:
    """For a method's metadata: how many samples were broken in a fit; of several models', with that which has most."""
    return str(max((folded.broken_samples for folded in each), default=0))


def cosines(dots: Tensor, sqnorm: Tensor) -> Tensor:
    """⟨g, direction⟩ / ‖g‖ of samples' gradients: 0 where g is 0, NaN where ‖g‖² is beyond its type, or so small that
    the type has few digits of it left.

    Args:
        dots: (B, ...), with directions of length 1.
        sqnorm: ‖g‖² (B,).
    """
    norm = sqnorm.sqrt().view(-1, *[1] * (dots.ndim - 1))
    nothing = (norm == 0) & (dots == 0)
    few_digits = norm < torch.finfo(norm.dtype).tiny ** 0.5
    return torch.where(nothing, 0.0, dots / norm).masked_fill(norm.isinf() | (few_digits & ~nothing), torch.nan)


def unit(vectors: Tensor) -> Tensor:
    """(B, D) -> (B, D) float32 (float64 of float64) of length 1; NaN where there is no direction: 0, NaN, infinite."""
    wide = vectors if vectors.dtype == torch.float64 else vectors.float()
    if not wide.shape[1]:
        return wide
    scaled = wide / wide.abs().amax(1, keepdim=True)  # so that no square is beyond the type, nor vanishes
    return scaled / scaled.square().sum(1, keepdim=True).sqrt()


def directions(vectors: Tensor) -> Tensor:
    """(B, D) at length 1, however long or short they are: 0 stays 0, and what is not finite is NaN."""
    return unit(vectors).masked_fill((vectors == 0).all(1, keepdim=True), 0)
