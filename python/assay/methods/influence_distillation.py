"""Influence Distillation: gradients of a few landmarks, spread over the pool by cheap embeddings, 2505.19051."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from assay.methods.base import Column, Method, Need
from assay.methods.checks import check_at_least, check_one_of
from assay.methods.influence import parameter_shapes
from assay.methods.less import StepsSketched
from assay.methods.sums import Folded, directions, features_of, sample_features, samples_left_out
from assay.methods.targets import Targets, TargetSet
from assay.ops import Kronecker, Rademacher, Sketch
from assay.probe import AdamState, Feature, Jvp, Probe, Signals, Sketched, tapped_parameters
from assay.probe.selection import coverage, find_module, select
from assay.tasks import Task

if TYPE_CHECKING:
    from typing_extensions import Self

# Below, not a hundredth of the variance of p is explained.
_LEAST_CORRELATION = 0.1


class InfluenceDistillation(Method):
    """p = K(E, E_L) (K_LL + δI)⁻¹ p_L with p_L = cos(∇ℓ_L, ∇ℓ_target), section 4 of the paper: keep high.

    Every sample is embedded by directional derivatives of the model's first blocks, a fraction of a forward pass; only
    the L landmarks and the targets have their gradients taken, which are projected and scaled to length 1. Ridge
    regression with a kernel over the embeddings carries the landmarks' p to the pool: one column per target, and their
    mean. The paper picks samples with ``select.round_robin`` over the targets' columns, and weighs them by
    ``select.robust``.

    ``fit`` must run first. The metadata's ``landmark_correlation`` says how well a landmark's p is predicted from the
    others' (exactly, without refitting): near 0 the embeddings tell nothing about gradients, and neither do the scores.

    Args:
        model: one checkpoint, warmed up.
        task: its loss is differentiated.
        targets: batches by name.
        landmarks: L at most, drawn from the pool by position; 4,096 in the paper.
        tangents: how many random directions the parameters are moved in.
        embed_layers: globs of the layers that are moved, the first blocks of a large model; None: all. Layers
            behind ``at`` have no effect.
        at: the layer whose input is differentiated, at the last position: the block behind ``embed_layers``. None: the
            last hidden state, or the logits.
        embed_sketch: of the embeddings, where they are longer than its ``dim``.
        kernel: ``"rbf"``, exp(−‖x − y‖² / 2σ²) with σ the landmarks' median distance, as in the paper's code, or
            ``"linear"``, as in its text.
        damping: δ in units of the mean diagonal of K_LL.
        sketch: of the landmarks' and targets' gradients.
        optimizer: Adam's state; the landmarks' gradients are then scaled as Adam does, by 1 / (√v̂ + ε), the targets'
            stay plain. Momentum, which no sample of a step decides, is left out.
        seed: of landmarks and tangents.
        layers, name, skip_unsupported: as in ``Influence``.

    Raises:
        ValueError: no target, a number out of its range, a layer that there is not, or an optimiser's state without one
            of the parameters.
    """

    uses_pool: ClassVar[bool] = True
    gathers: ClassVar[int | None] = 0

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        targets: Targets,
        *,
        landmarks: int = 4096,
        tangents: int = 2,
        embed_layers: str | Sequence[str] | None = None,
        at: str | None = None,
        embed_sketch: Sketch | None = None,
        kernel: Literal["rbf", "linear"] = "rbf",
        damping: float = 0.01,
        sketch: Sketch | None = None,
        optimizer: AdamState | None = None,
        seed: int = 0,
        layers: str | Sequence[str] | None = None,
        name: str = "influence_distillation",
        skip_unsupported: bool = False,
    ) -> None:
        self.name, self.model, self.task = name, model, task
        self.targets = TargetSet(name, targets).required()
        if landmarks < 2 or tangents < 1:
            raise ValueError(f"{name}: expected 2 landmarks and 1 tangent at least, got {landmarks} and {tangents}")
        check_one_of(f"{name}: kernel", kernel, ("rbf", "linear"))
        check_at_least("damping", damping, 0)
        self.landmarks, self.spread, self.damping = landmarks, kernel, damping
        self.sketch, self.together = sketch or Kronecker(64, 64), True
        self.optimizer, self.seed = optimizer, seed
        self.layers, self.skip_unsupported = layers, skip_unsupported
        self.parameters = tapped_parameters(model, layers, skip_unsupported=skip_unsupported)
        self.shapes = parameter_shapes(model, self.parameters)
        if optimizer is not None:
            optimizer.check(model, self.parameters)
        if at is not None:
            find_module(model, at)
        self._moved = tapped_parameters(model, embed_layers, skip_unsupported=True)
        self._tangents, self._at = tangents, at
        self._embed_sketch = embed_sketch or Rademacher(4096, seed, "embedding")
        self.left_out: dict[str, str] = {}  # parameters that could not be tapped after all
        self._of_pool, self._of_targets = Folded(), Folded()  # samples that fit() went through
        self._samples = 0
        self._anchors = torch.empty(0)  # (L, D), the landmarks' embeddings
        self._bandwidth = 1.0
        self._coefficients: Tensor | None = None  # (L, targets)
        self._correlation: list[float] = []

    @property
    def columns(self) -> Sequence[Column]:
        return self.targets.columns(f"{type(self).__name__} influence")

    @cached_property
    def embedding(self) -> Jvp:
        """What every sample is embedded by. Its tangents, copies of the parameters in size, are made when first asked
        for."""
        tangents = _random_tangents(self.model, self._moved, self._tangents, self.seed)
        return Jvp(tangents, self._at, self._embed_sketch)

    def feature(self, *, target: bool) -> Feature:
        """What is folded from the backward pass of landmarks or of the targets' samples."""
        if target or self.optimizer is None:
            return Sketched(self.shapes, self.sketch, self.together)
        return AdamScaled(self.shapes, self.sketch, self.together, state=self.optimizer)

    def needs(self) -> Mapping[str, Need]:
        return {"model": Need(self.model, self.task, reductions={"embedding": self.embedding})}

    def fit(self, pool: Iterable[Any] = ()) -> Self:
        """Draw the landmarks, take their gradients and the targets', and solve for the regression.

        Args:
            pool: the pool or a random sample of it. Only batches that hold a landmark are run.

        Raises:
            ValueError: a target without samples, fewer than two landmarks, a singular kernel.
        """

        def features_towards(batches: Iterable[Any], folded: Folded) -> Iterator[Tensor]:
            reductions, skip = {"feature": self.feature(target=True)}, self.skip_unsupported
            probe = Probe(self.model, self.task, reductions=reductions, logits=False, skip_unsupported=skip)
            return features_of(probe, batches, folded)

        means, self._of_targets = self.targets.means(features_towards)
        queries = directions(means)
        self.left_out = self.left_out | self._of_targets.left_out
        embeddings, features = self._landmarks(list(pool))
        p = directions(features) @ queries.to(features).T
        distances = torch.pdist(embeddings)
        bandwidth = float(distances[distances > 0].median()) if bool((distances > 0).any()) else 1.0
        gram = self._kernel(embeddings, embeddings, bandwidth)
        gram.diagonal().add_(self.damping * gram.diagonal().mean())
        factor, failed = torch.linalg.cholesky_ex(gram)
        if int(failed):
            raise ValueError(
                f"{self.name}: the kernel of {len(gram)} landmarks is singular with damping {self.damping}; give a "
                "larger damping"
            )
        coefficients = torch.cholesky_solve(p, factor)
        # Each landmark as the regression on all others predicts it: p_i − α_i / (K⁻¹)_ii.
        by_others = p - coefficients / torch.cholesky_inverse(factor).diagonal()[:, None]
        self._anchors, self._bandwidth, self._coefficients, self._samples = embeddings, bandwidth, coefficients, len(p)
        self._correlation = [float(torch.corrcoef(torch.stack(x))[0, 1]) for x in zip(by_others.T, p.T, strict=True)]
        return self

    def _landmarks(self, batches: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Embeddings and features of the landmarks, in the pool's order, float64."""
        sizes = [self.task.size(batch) for batch in batches]
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.zeros(sum(sizes), dtype=torch.bool)
        drawn[torch.randperm(sum(sizes), generator=generator)[: self.landmarks]] = True
        reductions: dict[str, Feature | Jvp] = {"embedding": self.embedding, "feature": self.feature(target=False)}
        probe = Probe(
            self.model, self.task, reductions=reductions, logits=False, skip_unsupported=self.skip_unsupported
        )
        found, folded = list[tuple[Tensor, Tensor]](), Folded()
        for batch, chosen in zip(batches, torch.split(drawn, sizes), strict=True):
            if not bool(chosen.any()):
                continue
            signals = probe(batch)
            both = [signals.reduced["embedding"], sample_features(signals)]
            fine = torch.stack([each.isfinite().all(1).cpu() for each in both]).all(0)
            folded.note(signals, fine | ~chosen)
            embedding, feature = (each[(fine & chosen).to(each.device)].double() for each in both)
            found.append((embedding, feature))
        if sum(len(embedding) for embedding, _ in found) < 2:
            raise ValueError(f"{self.name}: fit() needs at least 2 samples of the pool for landmarks")
        self._of_pool = folded
        embeddings, features = (torch.cat(parts) for parts in zip(*found, strict=True))
        return embeddings, features

    def _kernel(self, embeddings: Tensor, anchors: Tensor, bandwidth: float) -> Tensor:
        """K(embeddings, anchors) in float64: the ridge's small damping leaves no room for float32's rounding."""
        embeddings, anchors = embeddings.double(), anchors.to(embeddings.device)
        if self.spread == "linear":
            return embeddings @ anchors.T
        # Distances from differences: from products, close neighbours would cancel.
        distances = torch.cdist(embeddings, anchors, compute_mode="donot_use_mm_for_euclid_dist")
        return torch.exp(-0.5 * (distances / bandwidth).square())

    def score(self, signals: Mapping[str, Signals]) -> dict[str, Tensor]:
        if self._coefficients is None:
            raise RuntimeError(f"{self.name}: call fit() before scoring")
        embeddings = signals["model"].reduced["embedding"]
        kernel = self._kernel(embeddings, self._anchors, self._bandwidth)
        scores = self.targets.scores(kernel @ self._coefficients.to(kernel.device))
        # Nothing to predict, or an embedding that is infinitely far from all landmarks: its kernel would be 0.
        nothing = signals["model"].losses.isnan().to(kernel.device) | ~embeddings.isfinite().all(1)
        return {column: score.masked_fill(nothing, torch.nan) for column, score in scores.items()}

    def metadata(self) -> dict[str, str]:
        facts = {
            "targets": str(self.targets),
            "sketch": str(self.sketch),
            "landmarks": str(self._samples),
            "landmark_correlation": ", ".join(f"{x:.4f}" for x in self._correlation),
            "kernel": f"{self.spread}, damping {self.damping}",
            "left_out": samples_left_out(self._of_pool),
            "targets_left_out": samples_left_out(self._of_targets),
        }
        if dropped := sorted({*select(self.model, self.layers, self.skip_unsupported).left_out, *self.left_out}):
            facts["coverage"] = f"{coverage(self.model, set(self.parameters) - set(dropped)):.4f}"
            facts["left_out_layers"] = ", ".join(dict.fromkeys(name.rpartition(".")[0] or name for name in dropped))
        if self._correlation and not min(self._correlation) >= _LEAST_CORRELATION:
            facts["warning"] = (
                f"landmarks' scores are hardly predicted from one another's (correlation "
                f"{facts['landmark_correlation']}, expected at least {_LEAST_CORRELATION}): take more landmarks or "
                "tangents, or other embed_layers"
            )
        return facts


@dataclass(frozen=True, kw_only=True)
class AdamScaled(StepsSketched):
    """Of the gradient times Adam's diagonal."""

    state: AdamState
    degree: ClassVar[int] = 1

    def steps(self, parameter: str, gradients: Tensor) -> Tensor:
        return gradients * self.state.scale(parameter, gradients)


def _random_tangents(model: nn.Module, names: Sequence[str], count: int, seed: int) -> tuple[Mapping[str, Tensor], ...]:
    """Standard normal directions, made on the CPU so that they are the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    known = dict(model.named_parameters())
    return tuple(
        {n: torch.randn(known[n].shape, generator=generator).to(known[n].device) for n in names} for _ in range(count)
    )
