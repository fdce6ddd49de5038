"""SOURCE: training data attribution via approximate unrolled differentiation, 2405.12186."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from assay.methods.checkpoints import AlongTraining, Gradients
from assay.methods.checks import check_at_least, check_one_of
from assay.methods.eigenbases import Bases, Eigenvalues, Moments
from assay.methods.gauss_newton import GaussNewton, trace_of
from assay.methods.krylov import Vector
from assay.methods.parts import kept
from assay.methods.targets import Targets
from assay.methods.unrolling import Eigenbasis, Products, Segment
from assay.probe import AdamState
from assay.tasks import Task
from assay.tasks.base import wide

if TYPE_CHECKING:
    from typing_extensions import Self

_log = logging.getLogger("assay")

# The paper's: three segments of two checkpoints.
_SEGMENTS = 3
# A result that the last product still changed by more than this share is none.
_FAR = 0.2


class SOURCE(AlongTraining):
    """What a sample's weight in training does to the target's loss, training unrolled segment by segment: keep high.

    Training is cut into L segments of consecutive checkpoints. Within each, gradients and curvature H stay as they are
    on average over its checkpoints, so that its steps of gradient descent have a closed form (section 3 of the paper):

      score_i = Σ_ℓ ⟨H_ℓ⁻¹ (1 − e^(−a_ℓ H_ℓ)) q_ℓ, mean_k ∇ℓ_i(θ_k)⟩,  q_(ℓ−1) = e^(−a_ℓ H_ℓ) q_ℓ,

    with q_L the target's gradient at the last checkpoint and a_ℓ the segment's learning rates, added up. There is no
    damping: a direction of little curvature counts as far as training has gone along it. Divided by the number of the
    training's samples a score is about the rise of the target's loss without sample i.

    H is the whole Gauss–Newton matrix, as in ``EKFACCG``, whose functions are found in Krylov spaces: ``iterations``
    products per segment at most, which go through the samples given to ``fit`` at each of its checkpoints, at about
    four backward passes and three more per target; as many vectors as iterations are kept per target. Or it is
    EK-FAC's, as in the paper: eigenvectors of the factors added up over the segment, Λ in their basis over its
    checkpoints, of which each draws its samples' labels anew. Λ counts absolutely, so that it is scaled to the
    Gauss–Newton matrix' trace, which eight products with random signs tell: of a mean over T tokens with a label drawn
    for each, Λ would be T times too small.

    With Adam's states, steps are multiplied with P = 1/(√v̂ + ε), its mean over the segment's checkpoints, and H and P
    are not taken to commute: e^(−aPH) is found in Krylov spaces for either H.

    A sample of the pool costs a forward and a backward pass of every checkpoint. Columns: ``source``, and one per
    target if there are several.

    Args:
        models, task, targets, rates: as in ``checkpoints.AlongTraining``.
        segments: L; None: 3, or fewer where not each would have two checkpoints. They are cut as evenly as can be.
        optimizers: Adam's state at every checkpoint, with its number of steps, if Adam was the optimiser.
        curvature: ``"gauss_newton"`` or ``"ekfac"``.
        iterations: at most per segment, in Krylov spaces; fewer where the last changed nothing by a thousandth.
        layers, name, skip_unsupported: as in ``Influence``.

    Raises:
        ValueError: what ``AlongTraining`` refuses; segments without a checkpoint; not one state per checkpoint, a state
            that does not know its steps, or lacks a parameter.
    """

    uses_pool: ClassVar[bool] = True
    kind: ClassVar[str] = "SOURCE influence"

    def __init__(
        self,
        models: Sequence[nn.Module],
        task: Task,
        targets: Targets,
        rates: Sequence[float],
        *,
        segments: int | None = None,
        optimizers: Sequence[AdamState] | None = None,
        curvature: Literal["gauss_newton", "ekfac"] = "gauss_newton",
        iterations: int = 20,
        layers: str | Sequence[str] | None = None,
        name: str = "source",
        skip_unsupported: bool = False,
    ) -> None:
        super().__init__(models, task, targets, rates, layers=layers, name=name, skip_unsupported=skip_unsupported)
        count = len(self.models)
        self.segments = max(1, min(_SEGMENTS, count // 2)) if segments is None else segments
        if not 1 <= self.segments <= count:
            raise ValueError(f"{name}: segments: expected 1 to {count}, the number of checkpoints, got {segments}")
        check_one_of("curvature", curvature, ("gauss_newton", "ekfac"))
        check_at_least("iterations", iterations, 1)
        self.curvature, self.iterations = curvature, iterations
        self.optimizers = None if optimizers is None else list(optimizers)
        self._check_states()
        self._facts: dict[str, str] = {}

    def _check_states(self) -> None:
        if self.optimizers is None:
            return
        if len(self.optimizers) != len(self.models):
            raise ValueError(
                f"{self.name}: expected one optimiser state per checkpoint, {len(self.models)}, got "
                f"{len(self.optimizers)}"
            )
        for k, (model, state) in enumerate(zip(self.models, self.optimizers, strict=True)):
            state.check(model, self.parameters)
            if not state.steps:
                raise ValueError(
                    f"{self.name}: the optimiser's state at checkpoint {k} does not say how many steps it has made, on "
                    "which its second moment's bias depends; expected one that AdamState.of made of the live optimiser"
                )

    def metadata(self) -> dict[str, str]:
        facts = {
            "segments": str(self.segments),
            "optimizer": "SGD" if self.optimizers is None else "Adam",
            "curvature": self.curvature,
        }
        return super().metadata() | facts | self._facts

    def fit(self, pool: Iterable[Any] = ()) -> Self:
        """Take the targets' gradients at the last checkpoint, and the curvature of the segments, from the last to the
        first.

        Args:
            pool: samples of the training data.

        Raises:
            ValueError: a pool or a target without samples, or none of them with a loss and a finite gradient.
        """
        given, folded = self._gradients(len(self.models) - 1)
        found = _Curvature(self, kept(pool), [name for name in self.parameters if name not in folded.left_out])
        gradients = [found.completed(gradient) for gradient in given.values()]
        directions: list[Gradients] = [{} for _ in self.models]
        remainder = 0.0
        for places in reversed(list(self._segments())):
            unrolled = found.segment(places).unrolled(gradients)
            share = 1 / len(places)  # scores are of the mean over the segment's checkpoints
            own = [{name: share * g for name, g in vector.items()} for vector in unrolled.integrated]
            for k in places:
                directions[k] = dict(zip(given, own, strict=True))
            gradients, remainder = unrolled.before, max(remainder, unrolled.remainder)
        self._directions, self.left_out, self._of_targets = directions, folded.left_out, [folded]
        self._facts = self._told(remainder, found.without)
        return self

    def _segments(self) -> Iterator[range]:
        """The checkpoints of each."""
        cuts = [len(self.models) * number // self.segments for number in range(self.segments + 1)]
        yield from map(range, cuts, cuts[1:])

    def _told(self, remainder: float, without: int) -> dict[str, str]:
        facts = {"remainder": f"{remainder:.2g}", "left_out": str(without)}
        if remainder > _FAR:
            facts["warning"] = "not settled; give more iterations"
            _log.warning(
                "%s: the last of %d products still changed a direction by %.2g: %s",
                self.name, self.iterations, remainder, facts["warning"],
            )  # fmt: skip
        return facts


class _Curvature:
    """H of a method's segments over batches of the pool.

    Attributes:
        without: samples of which no product was finite, at the checkpoint with most of them.
    """

    def __init__(self, method: SOURCE, pool: Iterable[Any], parameters: Sequence[str]) -> None:
        self._method, self._pool, self._batches, self.without = method, pool, list(pool), 0
        if not self._batches:
            raise ValueError(f"{method.name}: the pool that fit() was given has no samples")
        known = dict(method.models[0].named_parameters())
        self._zeros = {name: wide(torch.zeros_like(known[name], requires_grad=False)) for name in parameters}

    def completed(self, gradient: Vector) -> dict[str, Tensor]:
        """With zeros where the target's loss does not reach: the matrix is whole."""
        return {name: wide(gradient[name]) if name in gradient else zero for name, zero in self._zeros.items()}

    def segment(self, places: range) -> Segment:
        method = self._method
        rate, roots = sum(method.rates[k] for k in places), self._roots(places)
        if method.curvature == "gauss_newton":
            return Products(rate, self._products(places), roots, method.iterations)
        bases = self._bases(places)
        if roots is None:
            return Eigenbasis(rate, bases)

        def product(vectors: Sequence[Vector]) -> list[dict[str, Tensor]]:
            return [bases.apply(lambda values: values, v) for v in vectors]

        return Products(rate, product, roots, method.iterations)

    def _roots(self, places: range) -> dict[str, Tensor] | None:
        """√P; 0 where the training never had a gradient, so that a target's there does not drown its others."""
        if (states := self._method.optimizers) is None:
            return None
        found = {}
        for name in self._zeros:
            each = []
            for state in [states[k] for k in places]:
                assert state.steps is not None
                second = wide(state.second[name]).to(self._zeros[name])
                size = (second / (1 - state.betas[1] ** state.steps)).sqrt() + state.eps
                each.append(torch.where(second > 0, 1 / size, 0.0))
            found[name] = torch.stack(each).mean(0).sqrt()
        return found

    def _products(self, places: range) -> _Mean:
        models = [self._method.models[k] for k in places]
        return _Mean(self, [GaussNewton(m, self._method.task, list(self._zeros), self._batches) for m in models])

    def _bases(self, places: range) -> Bases:
        """EK-FAC's, of the segment's mean; Λ as large as the Gauss–Newton matrix."""
        method, moments = self._method, Moments(list(self._zeros))
        for k in places:
            method._run(k, moments, self._pool, drawn=True)
        bases = moments.bases()
        eigenvalues, counts = Eigenvalues(list(self._zeros), bases), dict.fromkeys(self._zeros, 0)
        for k in places:
            folded = method._run(k, eigenvalues, self._pool, drawn=True)
            folded.check(f"{method.name}: the pool that fit() was given", self._zeros)
            self.without = max(self.without, folded.broken_samples)
            counts = {name: count + folded.count(name) for name, count in counts.items()}
        for name, basis in bases.items():
            basis.average(counts[name])
        own = sum(float(b.values.double().sum()) for b in bases.values() if b.values is not None)
        if own > 0:
            whole = trace_of(self._products(places), self._zeros)
            for basis in bases.values():
                basis.values = None if basis.values is None else basis.values * (whole / own)
        return bases


class _Mean:
    """The mean of several models' products."""

    def __init__(self, owner: _Curvature, products: Sequence[GaussNewton]) -> None:
        self._owner, self._products = owner, products

    def __call__(self, vectors: Sequence[Vector]) -> list[dict[str, Tensor]]:
        name, each = self._owner._method.name, []
        for product in self._products:
            try:
                each.append(product(vectors))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            self._owner.without = max(self._owner.without, product.left_out)
        return [
            {name: torch.stack([own[i][name] for own in each]).mean(0) for name in vector}
            for i, vector in enumerate(vectors)
        ]
