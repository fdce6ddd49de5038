"""What the target-aware methods share: features of samples, features of targets, and a kernel between them.

Each of them is ⟨φ_i, M φ_target⟩ with φ a projected per-sample gradient. They differ in the output function that is
differentiated, in M (the identity, or the damped inverse of the pool's second moment), in whether features are scaled
to length 1, in how checkpoints and targets are averaged. ``Influence`` has these as options; ``TRAK``, ``DsDm``,
``LESS``, ``LoGra`` and ``TrackStar`` are the settings that their papers describe.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from assay.methods.base import Column, Keeper, Kept, Need
from assay.methods.checks import check_at_least, check_one_of, difference
from assay.methods.parts import State, kept, states
from assay.methods.second_moments import SecondMoments, damping_units, inverse_root, solved
from assay.methods.sums import Folded, directions, features_of, sample_features, samples_left_out
from assay.methods.targets import Targets, TargetSet
from assay.methods.weights import shares
from assay.ops import Mask, Sketch
from assay.probe import Feature, Probe, Signals, Sketched, tapped_parameters
from assay.tasks import Task

if TYPE_CHECKING:
    from typing_extensions import Self

# Second moments are held in double: this much of them at most. Factoring one takes as much again.
MOMENT_BYTES = 8 << 30


@dataclass(frozen=True)
class Kernel:
    """How features become scores.

    Attributes:
        damping: λ of R = ΦᵀΦ/n + λI, in units of the mean diagonal of ΦᵀΦ/n; None: no second moment, M = I.
        blocks: R by parameter instead of over the whole feature; each is damped by its own, see ``damping_units``.
        whiten: features are multiplied by R^(−1/2) before they are normalised; otherwise M = R⁻¹.
        target_share: R also holds this share of the targets' second moment (whiten only).
        normalize: features of length 1.
        doubt: multiply by Q_i, the checkpoints' mean of 1 − p of the sample's own labels.
        across: how several targets make the aggregated column.
    """

    damping: float | None = None
    blocks: bool = False
    whiten: bool = False
    target_share: float = 0.0
    normalize: bool = False
    doubt: bool = False
    across: Literal["mean", "max"] = "mean"

    def __post_init__(self) -> None:
        if self.damping is not None:
            check_at_least("damping", self.damping, 0)
        if not 0 <= self.target_share <= 1:
            raise ValueError(f"target_share: expected a number from 0 to 1, got {self.target_share}")
        check_one_of("across", self.across, ("mean", "max"))


class Influence(Keeper):
    """score_i = Q_i Σ_k α_k ⟨φ_k(i), M_k mean_t φ_k(t)⟩: keep high.

    ``fit`` must run first: it takes the targets' features and, with damping, the pool's second moment.

    Args:
        models: K checkpoints of one architecture.
        task: what a sample is, and its output function: a loss, or ``tasks.Margin`` of one.
        targets: batches by name. One column each, and ``name`` for all of them.
        kernel: see ``Kernel``.
        sketch: the projection of each parameter's gradient; checkpoint k's has seed + k.
        together: sum the parameters' projections instead of laying them end to end (see ``probe.Sketched``).
        layers: globs of the layers to take gradients of; None: every supported layer.
        weights: α, (K,), scaled to sum to 1; None: equal.
        name: of the aggregated column, and prefix of the targets'.
        skip_unsupported: leave out layers that cannot be tapped exactly, instead of raising.

    Raises:
        ValueError: no model, no target, models of different parameters, weights as in ``Ensemble``, or second moments
            beyond ``MOMENT_BYTES``.
    """

    uses_pool: ClassVar[bool] = True
    gathers: ClassVar[int | None] = 0

    def __init__(
        self,
        models: Sequence[nn.Module],
        task: Task,
        targets: Targets,
        kernel: Kernel,
        sketch: Sketch,
        *,
        together: bool = False,
        layers: str | Sequence[str] | None = None,
        weights: Sequence[float] | None = None,
        name: str = "influence",
        skip_unsupported: bool = False,
    ) -> None:
        self.name, self.kernel, self.task, self.sketch, self.together = name, kernel, task, sketch, together
        self.models = list(models)
        self.layers, self.skip_unsupported = layers, skip_unsupported
        if not self.models:
            raise ValueError(f"{name}: expected at least one checkpoint, got none")
        self.targets = TargetSet(name, targets, kernel.across).required()
        self.weights = shares(weights, len(self.models))
        self.parameters = tapped_parameters(self.models[0], layers, skip_unsupported=skip_unsupported)
        self.shapes = parameter_shapes(self.models[0], self.parameters)
        for k, model in enumerate(self.models[1:], 1):
            if other := difference(self.models[0], model, self.parameters):
                raise ValueError(
                    f"{name}: checkpoint {k} differs from checkpoint 0 in parameter {other.parameter!r}: expected it "
                    f"{other.expected}, found {other.actual}"
                )
        if kernel.damping is not None:
            self._check_moments()
        self.left_out: dict[str, str] = {}  # parameters that could not be tapped after all
        self._of_pool: list[Folded] = []  # samples that fit() went through, by checkpoint
        self._of_targets: list[Folded] = []
        self._roots: list[list[Tensor]] | None = None  # per checkpoint and block: R^(−1/2)
        self._queries: list[Tensor] | None = None  # per checkpoint: (targets, size) with M applied
        self._samples = 0

    def _check_moments(self) -> None:
        needed = 8 * len(self.models) * sum((place.stop - place.start) ** 2 for place in self._blocks())
        if needed > MOMENT_BYTES:
            size = self.feature(0, target=False).size
            raise ValueError(
                f"{self.name}: {self.sketch} gives features of {size:,} numbers, whose second moments take "
                f"{needed / 2**30:,.0f} GiB, more than {MOMENT_BYTES / 2**30:g} GiB; take a smaller sketch"
            )

    @property
    def columns(self) -> Sequence[Column]:
        return self.targets.columns(f"{type(self).__name__} influence")

    def feature(self, k: int, *, target: bool) -> Feature:
        """What is folded from checkpoint k's backward pass, for the pool's samples or for the targets'."""
        return Sketched(self.shapes, self.sketch_of(k), self.together)

    def sketch_of(self, k: int) -> Sketch:
        """Checkpoint k's projection, independent of the others': their mean averages the projections' errors too."""
        return _reseeded(self.sketch, k)

    def needs(self) -> Mapping[str, Need]:
        return {
            f"model{k}": Need(
                model,
                self.task,
                reductions={"feature": self.feature(k, target=False)},
                layers=self.layers,
                skip_unsupported=self.skip_unsupported,
            )
            for k, model in enumerate(self.models)
        }

    def fit(self, pool: Iterable[Any] = ()) -> Self:
        """Take the targets' features and, if the kernel is damped, the second moment of the pool's.

        Args:
            pool: the pool or a random sample of it, several times as many samples as a feature has numbers; not
                looked at without damping.

        Raises:
            ValueError: a target without samples, or no pool where one is needed.
        """
        self._of_pool, self._of_targets = [], []
        if self.kernel.damping is None:
            self._queries = [self._target_means(k) for k in range(len(self.models))]
            return self
        moments, samples = self._pool_moments(pool)
        if self.kernel.whiten:
            share = self.kernel.target_share
            for k, blocks in enumerate(moments if share else []):
                moments[k] = [(1 - share) * r + share * t for r, t in zip(blocks, self._target_moments(k), strict=True)]
            roots = [
                [inverse_root(r, λ) for r, λ in zip(blocks, self._dampings(blocks), strict=True)] for blocks in moments
            ]
            self._queries = [self._target_means(k, own) for k, own in enumerate(roots)]
            self._roots = roots
        else:
            self._queries = [self._solve(self._target_means(k), blocks) for k, blocks in enumerate(moments)]
        self._samples = samples  # as all that is fitted, only when nothing can fail any more
        return self

    def _target_means(self, k: int, roots: Sequence[Tensor] | None = None) -> Tensor:
        """(targets, size) float64: the mean feature of each target's samples."""

        def features(batches: Iterable[Any], folded: Folded) -> Iterator[Tensor]:
            for found in self._features(k, batches, folded, target=True):
                yield self._transformed(found, roots)

        means, folded = self.targets.means(features, roots)
        self.left_out = self.left_out | folded.left_out  # a copy's is its own
        self._of_targets = [*self._of_targets, folded]
        return means

    def _pool_moments(self, batches: Iterable[Any]) -> tuple[list[list[Tensor]], int]:
        """Per checkpoint and block ΦᵀΦ/n in float64, and n."""
        batches = kept(batches)
        sums = [self._moments(k, [batches], target=False) for k in range(len(self.models))]
        if not sums[0].count:
            raise ValueError(f"{self.name}: fit() needs samples of the pool for their second moment, got none")
        return [moments.mean() for moments in sums], sums[0].count

    def _target_moments(self, k: int) -> list[Tensor]:
        return self._moments(k, self.targets.batches.values(), target=True).mean()

    def _moments(self, k: int, each: Iterable[Iterable[Any]], *, target: bool) -> SecondMoments:
        def part(batches: Iterable[Any], first: int) -> State:
            own, folded = SecondMoments(self._blocks()), Folded()
            for features in self._features(k, batches, folded, target=target):
                own.add(features)
            return own.state() | {"folded": folded.state()}

        moments, folded = SecondMoments(self._blocks()), Folded()
        for batches in each:
            for state in states(batches, part):
                moments.join(state)
                folded.join(state["folded"])
        self.left_out = self.left_out | folded.left_out
        if not target:
            self._of_pool = [*self._of_pool, folded]
        return moments

    def _blocks(self) -> list[slice]:
        feature = self.feature(0, target=False)
        if self.kernel.blocks and not self.together:
            return [feature.place(name) for name in self.parameters]
        return [slice(0, feature.size)]

    def _solve(self, queries: Tensor, blocks: list[Tensor]) -> Tensor:
        places, dampings = self._blocks(), self._dampings(blocks)
        parts = [solved(r, queries[:, place], λ) for place, r, λ in zip(places, blocks, dampings, strict=True)]
        return torch.cat(parts, 1)

    def _dampings(self, blocks: list[Tensor]) -> list[float]:
        """λ of each block."""
        assert self.kernel.damping is not None
        means = [float(r.diagonal().mean()) for r in blocks]
        names = self.parameters if len(blocks) == len(self.parameters) else [self.name] * len(blocks)
        return [self.kernel.damping * unit for unit in damping_units(names, means)]

    def _features(self, k: int, batches: Iterable[Any], folded: Folded, *, target: bool) -> Iterator[Tensor]:
        """Those of checkpoint k, as the function ``features_of``."""
        reductions, skip = {"feature": self.feature(k, target=target)}, self.skip_unsupported
        probe = Probe(self.models[k], self.task, reductions=reductions, logits=False, skip_unsupported=skip)
        return features_of(probe, batches, folded)

    def _transformed(self, features: Tensor, roots: Sequence[Tensor] | None) -> Tensor:
        """Raw features as the kernel compares them; ``roots`` as the checkpoint's in ``_roots``."""
        if roots is not None:
            by_block = zip(self._blocks(), roots, strict=True)
            features = torch.cat([features[:, place] @ root.to(features) for place, root in by_block], 1)
        if self.kernel.normalize:  # a sample without a gradient has no direction: it stays 0
            features = directions(features)
        return features

    @property
    def kept(self) -> Sequence[Kept]:
        extra = "doubt" if self.kernel.doubt else None
        return [Kept(self.feature(k, target=False).size, self.sketch_of(k), extra) for k in range(len(self.models))]

    def raw_features(self, signals: Mapping[str, Signals]) -> tuple[list[Tensor], list[Tensor] | None]:
        """What ``score_features`` takes: they depend on the models and the samples, not on targets or the kernel.

        Returns:
            (B, size) features of each checkpoint, and (B,) doubts of each if the kernel has them.
        """
        mine = [signals[f"model{k}"] for k in range(len(self.models))]
        return [sample_features(s) for s in mine], [doubt(s) for s in mine] if self.kernel.doubt else None

    def score(self, signals: Mapping[str, Signals]) -> dict[str, Tensor]:
        self._fitted()
        return self.score_features(*self.raw_features(signals))

    def score_features(self, features: Sequence[Tensor], extras: Sequence[Tensor] | None = None) -> dict[str, Tensor]:
        """Scores of samples by their raw features, fresh from the models or stored.

        Args:
            features: (B, size) for each checkpoint; float16 and bfloat16 are computed with in float32.
            extras: (B,) for each checkpoint, the doubts: 1 − p of the samples' own labels, if ``kernel.doubt``.

        Returns:
            (B,) per column.

        Raises:
            RuntimeError: ``fit`` has not run.
            ValueError: features or doubts of other shapes, or not one for each checkpoint.
        """
        fitted = self._fitted()
        self._check(features, extras)
        total = torch.zeros(())
        for k, (mine, queries, weight) in enumerate(zip(features, fitted, self.weights, strict=True)):
            wide = self._row(k, mine)
            total = total.to(wide.device) + weight * (wide @ queries.to(wide).T)  # (B, targets)
        if extras is not None:
            total = total * torch.stack([d.to(total) for d in extras]).mean(0)[:, None]
        return self.targets.scores(total)

    def scan_rows(self, features: Sequence[Tensor], extras: Sequence[Tensor] | None = None) -> Tensor:
        """Samples as a plain scan takes them: their inner products with ``scan_queries`` are their scores.

        The roots of the second moments, lengths and doubts are in the rows already, the checkpoints side by side. With
        a ``whiten`` kernel rows therefore depend on the samples that ``fit`` saw, and with a ``target_share`` on the
        targets: rows that are stored for targets to come need ``target_share=0`` and one fit's method.

        Args:
            features, extras: as in ``score_features``.

        Returns:
            (B, K · size) float32, or float64 of such features. NaN for samples without a score.

        Raises:
            RuntimeError, ValueError: as in ``score_features``.
        """
        self._fitted()
        self._check(features, extras)
        rows = torch.cat([self._row(k, mine) for k, mine in enumerate(features)], 1)
        if extras is not None:
            rows = rows * torch.stack([d.to(rows) for d in extras]).mean(0)[:, None]
        return rows

    def scan_queries(self) -> Tensor:
        """(targets, K · size) float32: the targets, the inverse second moment and the checkpoints' weights applied.

        ``ops.topk_scan(rows, queries, k)`` ranks by their mean; its ``reduce="max"`` is for ``across="max"``.

        Raises:
            RuntimeError: ``fit`` has not run.
        """
        return torch.cat([weight * q for q, weight in zip(self._fitted(), self.weights, strict=True)], 1).float()

    def _row(self, k: int, features: Tensor) -> Tensor:
        wide = features if features.dtype == torch.float64 else features.float()
        return self._transformed(wide, None if self._roots is None else self._roots[k])

    def _fitted(self) -> list[Tensor]:
        if self._queries is None:
            raise RuntimeError(f"{self.name}: call fit() before scoring")
        return self._queries

    def _check(self, features: Sequence[Tensor], doubts: Sequence[Tensor] | None) -> None:
        count, size = len(self.models), self.feature(0, target=False).size
        rows = len(features[0]) if features else 0
        if [tuple(f.shape) for f in features] != [(rows, size)] * count:
            raise ValueError(
                f"{self.name}: expected features (B, {size}) of {count} checkpoints, got "
                f"{', '.join(str(tuple(f.shape)) for f in features) or 'none'}"
            )
        wanted = [(rows,)] * count if self.kernel.doubt else None
        if (None if doubts is None else [tuple(d.shape) for d in doubts]) != wanted:
            found = "none" if doubts is None else ", ".join(str(tuple(d.shape)) for d in doubts)
            raise ValueError(f"{self.name}: expected doubts {wanted or 'none'}, got {found}")

    def metadata(self) -> dict[str, str]:
        facts = {
            "checkpoints": str(len(self.models)),
            "targets": str(self.targets),
            "sketch": str(self.sketch),
            "kernel": str(self.kernel),
        }
        if self.kernel.damping is not None:
            facts |= {"second_moment_samples": str(self._samples), "left_out": samples_left_out(*self._of_pool)}
        return facts | {"targets_left_out": samples_left_out(*self._of_targets)}


def doubt(signals: Signals) -> Tensor:
    """Q = 1 − p of the sample's labels, averaged over its predicted positions -> (B,)."""
    losses, labels = signals.row_losses, signals.labels
    if losses is None or labels is None:
        raise ValueError("Q = 1 − p needs a task with labels: Classification or CausalLM")
    wrong = -torch.expm1(-losses)
    if losses.ndim == 1:
        return wrong
    predicted = labels.view(losses.shape) >= 0
    return (wrong * predicted).sum(1) / predicted.sum(1)


def _reseeded(sketch: Sketch, k: int) -> Sketch:
    seed = (sketch.seed + k) % 2**64
    if isinstance(sketch, Mask) and sketch.then is not None:
        return replace(sketch, seed=seed, then=replace(sketch.then, seed=(sketch.then.seed + k) % 2**64))
    return replace(sketch, seed=seed)


def parameter_shapes(model: nn.Module, parameters: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """By name, in the order of ``parameters``."""
    by_name = dict(model.named_parameters())
    return {name: tuple(by_name[name].shape) for name in parameters}
