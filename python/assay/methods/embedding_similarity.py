"""Embedding similarity: how near is a sample to the targets' samples, in a model's own space?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from assay.methods.base import Column, Keeper, Kept, Need
from assay.methods.checks import check_one_of
from assay.methods.embedding import Embedder, Pooling
from assay.methods.sums import Folded, samples_left_out, unit
from assay.methods.targets import Targets, TargetSet
from assay.ops import scan_scores
from assay.probe import Signals
from assay.tasks import Classification, Task
from assay.tasks.base import base_task

if TYPE_CHECKING:
    from typing_extensions import Self


class EmbeddingSimilarity(Keeper):
    """cos(e_i, e_t) with e the pooled hidden states, over a target's samples t: keep high.

    Columns: ``embedding_similarity``, and one per target if there are several. NaN for a sample with nothing to
    predict, or whose embedding is 0 or not finite.

    ``fit`` must run first: it embeds the targets' samples. A target's embeddings are kept, (samples, D); with
    ``within="mean"`` they are one.

    Args:
        model: a forward pass of it, and nothing else, is what a sample costs.
        task: what a sample is.
        targets: batches by name.
        within: what becomes of a target's samples: ``"mean"`` of the cosines, or ``"max"``, the nearest sample's.
        across: what becomes of several targets, in the column for all.
        at: name or glob of the layer whose input is the embedding; None: the output layer (as transformers says, else
            the last ``nn.Linear``), so that it is the last hidden state.
        pooling: ``"mean"`` over a sample's positions, or ``"position"``: the t-th position weighs t / Σt.
        name: of the aggregated column, and prefix of the targets'.

    Attributes:
        queries: by target, once fitted: (samples, D) embeddings at length 1; with ``within="mean"`` their mean, (1, D).

    Raises:
        ValueError: no target, a word that is none of those, or no such layer.
    """

    gathers: ClassVar[int | None] = 0

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        targets: Targets,
        *,
        within: Literal["mean", "max"] = "mean",
        across: Literal["mean", "max"] = "mean",
        at: str | None = None,
        pooling: Pooling = "mean",
        name: str = "embedding_similarity",
    ) -> None:
        self.name, self.model, self.task = name, model, task
        check_one_of(f"{name}: within", within, ("mean", "max"))
        check_one_of(f"{name}: across", across, ("mean", "max"))
        self.within, self.targets = within, TargetSet(name, targets, across).required()
        self.embedder = Embedder(name, model, task, at, pooling)
        self.left_out: Mapping[str, str] = {}  # as of methods that take gradients: nothing is
        self.queries: dict[str, Tensor] = {}
        self._of_targets = Folded()

    @property
    def columns(self) -> Sequence[Column]:
        return self.targets.columns(f"cosine of embeddings, {self.within} over the samples")

    def needs(self) -> Mapping[str, Need]:
        return {"model": self.embedder.need()}

    def fit(self, pool: Iterable[Any] = ()) -> Self:
        """Embed the targets' samples; the pool is not looked at.

        Raises:
            ValueError: a target without a sample that has a finite embedding.
        """
        queries, folded = self.embedder.of_targets(self.targets)
        if self.within == "mean":  # the mean of the cosines is the cosine with the mean, but for its length
            queries = {name: each.double().mean(0, keepdim=True).to(each) for name, each in queries.items()}
        self.queries, self._of_targets = queries, folded
        return self

    @property
    def kept(self) -> Sequence[Kept]:
        """What ``raw_features`` gives: directions and, of a classifier's samples, their classes."""
        width = self.embedder.width
        if width is None:
            raise ValueError(
                f"{self.name}: keep_features: layer {self.embedder.pooled.layer!r} does not tell how long its input "
                "is; expected at= to name an nn.Linear"
            )
        classes = isinstance(base_task(self.task), Classification)
        return [Kept(width, extra="label" if classes else None)]

    def raw_features(self, signals: Mapping[str, Signals]) -> tuple[list[Tensor], list[Tensor] | None]:
        """Embeddings at length 1 (B, D), which depend on nothing but the model and the sample and are in the range of
        every stored type, and classes (B,) as float32, NaN of labels that are no single class."""
        own = signals["model"]
        embeddings = unit(self.embedder.embeddings(own))
        if not isinstance(base_task(self.task), Classification):
            return [embeddings], None
        missing = torch.full((len(embeddings),), torch.nan)
        return [embeddings], [missing if own.labels is None else own.labels.float()]

    def score(self, signals: Mapping[str, Signals]) -> dict[str, Tensor]:
        return self.score_features([self.embedder.embeddings(signals["model"])])

    def score_features(self, features: Sequence[Tensor], extras: Sequence[Tensor] | None = None) -> dict[str, Tensor]:
        """Scores of one tensor of embeddings (B, D), fresh from the model or stored; classes are not looked at."""
        if not self.queries:
            raise RuntimeError(f"{self.name}: call fit() before scoring")
        directions = unit(features[0])
        each = [
            scan_scores(directions, queries.to(directions.device), reduce=self.within)
            for queries in self.queries.values()
        ]
        return self.targets.scores(torch.stack(each, 1))

    def metadata(self) -> dict[str, str]:
        pooled = self.embedder.pooled
        return {
            "targets": str(self.targets),
            "embedding": f"input of layer {pooled.layer!r}, {pooled.weights} over positions",
            "targets_left_out": samples_left_out(self._of_targets),
        }
