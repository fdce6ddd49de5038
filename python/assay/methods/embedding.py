"""Embeddings as methods take them: of which layer, pooled how, at length 1."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from assay.methods.base import Need
from assay.methods.checks import check_one_of
from assay.methods.parts import State, states
from assay.methods.sums import Folded, unit
from assay.methods.targets import TargetSet
from assay.probe import Pooled, Probe, Signals
from assay.probe.selection import find_module
from assay.tasks import Task
from assay.tasks.base import unlabelled

Pooling = Literal["mean", "position"]
Take = Callable[[Tensor], Tensor]
"""Embeddings (B, D) -> what a fit takes of each sample, (B, …)."""


@dataclass(frozen=True)
class Embedder:
    """Gives samples' embeddings: the pooled input of one layer.

    Attributes:
        name: of the method, for messages.
        model, task: what is run.
        at: name or glob of the layer; None: the output layer, which is what transformers calls so, else the last
            ``nn.Linear`` among the model's modules.
        pooling: as ``probe.Pooled.weights``.

    Raises:
        ValueError: no such layer, or more than one.
    """

    name: str
    model: nn.Module
    task: Task
    at: str | None = None
    pooling: Pooling = "mean"

    def __post_init__(self) -> None:
        check_one_of(f"{self.name}: pooling", self.pooling, ("mean", "position"))
        if self.at is not None:
            find_module(self.model, self.at)
        elif _output_layer(self.model) is None:
            raise ValueError(
                f"{self.name}: {type(self.model).__name__} has no output layer that is known to be one; say with at= "
                "which layer's input is the embedding"
            )

    @cached_property
    def pooled(self) -> Pooled:
        layer = self.at if self.at is not None else _output_layer(self.model)
        assert layer is not None
        return Pooled(find_module(self.model, layer)[0], self.pooling)

    @property
    def width(self) -> int | None:
        """How many numbers an embedding has, if the layer tells."""
        layer = self.model.get_submodule(self.pooled.layer)
        return layer.in_features if isinstance(layer, nn.Linear) else None

    def need(self) -> Need:
        return Need(self.model, self.task, embeddings=self.pooled)

    def embeddings(self, signals: Signals) -> Tensor:
        """(B, D) float32, NaN where the task has nothing to predict of a sample, as all its scores are."""
        found = signals.embeddings
        assert found is not None
        # Told by the labels where that is possible: a language model's losses would have to be made.
        silent = None if signals.labels is None else unlabelled(signals, signals.samples)
        nothing = signals.losses.isnan() if silent is None else silent
        return found.masked_fill(nothing.to(found.device)[:, None], torch.nan)

    def run(self, batches: Iterable[Any]) -> Iterator[Signals]:
        probe = Probe(self.model, self.task, factors=(), embeddings=self.pooled, logits=False)
        for batch in batches:
            if (signals := probe(batch)).embeddings is not None:  # a batch without samples has none
                yield signals

    def fitted(self, signals: Signals, folded: Folded, take: Take) -> Tensor:
        """(n, …): what a fit takes of a batch's embeddings, of the samples of which it is finite. All are noted in
        ``folded``."""
        found = take(self.embeddings(signals))
        fine = found.isfinite().all(1)
        folded.note(signals, fine)
        return found[fine]

    def finite(self, batches: Iterable[Any], folded: Folded, take: Take = lambda each: each) -> Tensor:
        """(N, D): ``fitted`` of the samples of all batches; (0, 0) of none."""

        def part(batches: Iterable[Any], first: int) -> State:
            own = Folded()
            each = [self.fitted(signals, own, take) for signals in self.run(batches)]
            return {"embeddings": torch.cat(each) if each else torch.empty(0, 0), "folded": own.state()}

        found = []
        for state in states(batches, part):
            folded.join(state["folded"])
            found.append(state["embeddings"])
        return torch.cat([each for each in found if len(each)] or found[:1])

    def of_targets(self, targets: TargetSet) -> tuple[dict[str, Tensor], Folded]:
        """By target, the embeddings at length 1 of those samples that have a direction; and what all of them are.

        Raises:
            ValueError: a target without such samples.
        """
        found, folded = {}, Folded()
        for name, batches in targets.batches.items():
            found[name] = self.finite(batches, folded, unit)
            if not len(found[name]):
                raise ValueError(f"{self.name}: target {name!r} has no sample with a finite embedding that is not 0")
        return found, folded


def _output_layer(model: nn.Module) -> str | None:
    get = getattr(model, "get_output_embeddings", None)
    said: Any = get() if callable(get) else None
    names: dict[int, str] = {id(module): name for name, module in model.named_modules()}
    if isinstance(said, nn.Module) and id(said) in names:
        return names[id(said)]
    return next((name for name, m in reversed(list(model.named_modules())) if isinstance(m, nn.Linear)), None)
