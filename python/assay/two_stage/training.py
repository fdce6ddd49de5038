"""Training a recipe's model on some of its samples, and its loss on others: one plain loop for every task."""

from __future__ import annotations

import copy
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from assay.engine.batches import make_batches
from assay.probe.quiet import is_out_of_memory, undisturbed
from assay.recipe.errors import EngineError
from assay.recipe.recipe import BatchSpec
from assay.recipe.tasks import Encoded, Encoder
from assay.tasks import Task
from assay.tasks.base import IGNORE, Outputs

log = logging.getLogger("assay")

WARM_UP = 0.1
MAX_NORM = 1.0


@dataclass(frozen=True)
class Training:
    """AdamW without weight decay, the same number of steps for everybody.

    Attributes:
        steps, batch_size: samples come in a random order, each once before any comes again.
        learning_rate: at its highest: it rises linearly over the first tenth of the steps, and falls linearly to 0.
            Gradients are clipped at length 1.
        seeds: how often everything is trained, in another order, with another random selection.
        evaluations: how often a training is evaluated, at equal distances, the last time at its end.
    """

    steps: int = 500
    batch_size: int = 16
    learning_rate: float = 1e-4
    seeds: int = 3
    evaluations: int = 5

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "seeds", "evaluations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, found {getattr(self, name)}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate: expected a finite number above 0, found {self.learning_rate}")

    def rate(self, step: int) -> float:
        """The share of ``learning_rate`` in a step, from 0."""
        warm = math.ceil(WARM_UP * self.steps)
        return (step + 1) / (warm + 1) if step < warm else (self.steps - step) / (self.steps - warm + 1)

    @property
    def stops(self) -> list[int]:
        """The steps after which is evaluated."""
        return sorted({math.ceil(self.steps * i / self.evaluations) for i in range(1, self.evaluations + 1)})


@dataclass(frozen=True)
class Evaluation:
    """What a model does on held-out samples after so many steps.

    Attributes:
        loss: the mean of the samples' losses.
        accuracy: of the labelled rows, the share whose label has the largest logit; None of a task without classes, and
            of language models.
    """

    step: int
    loss: float
    accuracy: float | None


@dataclass(frozen=True)
class Learner:
    """A model as it is before any training, and what runs it."""

    model: nn.Module
    task: Task
    encoder: Encoder
    limits: BatchSpec

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def batch(self, samples: Sequence[Encoded]) -> Any:
        """On the model's device."""
        return self.task.to(self.encoder.collate([sample.data for sample in samples]), self.device)


def with_a_loss(learner: Learner, samples: Mapping[int, Encoded], what: str) -> dict[int, Encoded]:
    """By row, those of which the untrained model has a finite loss. EngineError if none has one."""
    rows, each = list(samples), list(samples.values())
    found: list[int] = []
    with undisturbed(learner.model), torch.no_grad():
        for places in make_batches(each, learner.limits):
            losses = learner.task.forward(learner.model, learner.batch([each[i] for i in places])).losses
            found += [i for i, loss in zip(places, losses.tolist(), strict=True) if math.isfinite(loss)]
    if not found:
        raise EngineError(f"{what}: none of its {len(samples)} samples has a finite loss")
    if left_out := len(samples) - len(found):
        log.warning(
            "%s: %d of its %d samples have no finite loss (nothing to predict, NaN or infinite); they are left out",
            what,
            left_out,
            len(samples),
        )
    return {rows[i]: each[i] for i in sorted(found)}


def evaluate(learner: Learner, model: nn.Module, held_out: Sequence[Encoded], step: int) -> Evaluation:
    """In eval mode, without gradients. EngineError if a loss is no finite number."""
    total, right, labelled = 0.0, 0, 0
    with undisturbed(model), torch.no_grad():
        for places in make_batches(held_out, learner.limits):
            outputs = learner.task.forward(model, learner.batch([held_out[i] for i in places]))
            total += float(outputs.losses.sum(dtype=torch.float64))
            own, all_ = _right(outputs)
            right, labelled = right + own, labelled + all_
    loss = total / len(held_out)
    if not math.isfinite(loss):
        advice = "take a smaller learning rate" if step else "expected finite losses of the untrained model"
        raise EngineError(f"held-out: the loss after step {step} is {loss}; {advice}")
    return Evaluation(step, loss, right / labelled if labelled else None)


def _right(outputs: Outputs) -> tuple[int, int]:
    """How many labelled rows have the largest logit at their label, and how many there are; of a language model none is
    counted, whose logits nobody has made."""
    if outputs.output_layer is not None or outputs.labels is None or outputs.logits is None:
        return 0, 0
    counts = outputs.labels != IGNORE
    found = (outputs.logits.argmax(-1) == outputs.labels) & counts
    return int(found.sum()), int(counts.sum())


def train(
    learner: Learner,
    samples: Sequence[Encoded],
    held_out: Sequence[Encoded],
    training: Training,
    seed: int,
    on_evaluation: Callable[[Evaluation], None] = lambda evaluation: None,
) -> list[Evaluation]:
    """Train a copy of the learner's model -> its evaluations.

    Raises:
        EngineError: a loss that is not finite, or a batch that does not fit into memory.
    """
    model = copy.deepcopy(learner.model).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=training.learning_rate, weight_decay=0.0)
    batches, found, stops = _batches(samples, training.batch_size, seed), [], set(training.stops)
    devices = [learner.device] if learner.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        for step in range(training.steps):
            for group in optimizer.param_groups:
                group["lr"] = training.learning_rate * training.rate(step)
            optimizer.zero_grad()
            _backward(learner, model, [samples[i] for i in next(batches)], step + 1)
            nn.utils.clip_grad_norm_(parameters, MAX_NORM)
            optimizer.step()
            if step + 1 in stops:
                found.append(evaluate(learner, model, held_out, step + 1))
                on_evaluation(found[-1])
    return found


def _backward(learner: Learner, model: nn.Module, samples: Sequence[Encoded], step: int) -> None:
    try:
        loss = learner.task.forward(model, learner.batch(samples)).losses.mean()
        if not bool(loss.detach().isfinite()):
            found = float(loss.detach())
            raise EngineError(f"training: the loss of step {step} is {found}; take a smaller learning rate")
        loss.backward()  # type: ignore[no-untyped-call]
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, EngineError) or not is_out_of_memory(error):
            raise
        longest = max(sample.length for sample in samples)
        raise EngineError(
            f"training: step {step} ran out of memory on {len(samples)} samples of length {longest} at most; take a "
            "smaller batch"
        ) from error


def _batches(samples: Sequence[Encoded], size: int, seed: int) -> Iterator[list[int]]:
    """Places of samples, of one shape each, in random order, each once before any comes again."""
    rng = np.random.Generator(np.random.Philox(key=seed))
    while True:
        waiting: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for i in rng.permutation(len(samples)).tolist():
            own = waiting[samples[i].shape]
            own.append(i)
            if len(own) == size:
                yield waiting.pop(samples[i].shape)
        yield from waiting.values()
