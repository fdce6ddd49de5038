"""Second moments of features, damped: their units, inverses and roots."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from assay.methods.parts import State

# λ's unit is at least this share of the largest mean in the same layer.
LAYER_FLOOR = 1e-4


class SecondMoments:
    """Σ φ φᵀ by block, in float64; samples without a finite gradient are left out."""

    def __init__(self, blocks: list[slice]) -> None:
        self.blocks, self.count = blocks, 0
        self.sums: list[Tensor] = []

    def add(self, features: Tensor) -> None:
        features = features[features.isfinite().all(1)].double()
        parts = [features[:, place] for place in self.blocks]
        if not self.sums:
            self.sums = [features.new_zeros(p.shape[1], p.shape[1]) for p in parts]
        for total, part in zip(self.sums, parts, strict=True):
            total.addmm_(part.T, part)
        self.count += len(features)

    def state(self) -> State:
        """What was added up."""
        return {"sums": self.sums, "count": self.count}

    def join(self, state: State) -> None:
        """Add what others have added up, of samples that come after these."""
        pairs = zip(self.sums, state["sums"], strict=True)
        self.sums = [mine + its for mine, its in pairs] if self.sums and state["sums"] else self.sums or state["sums"]
        self.count += state["count"]

    def mean(self) -> list[Tensor]:
        return [total / max(self.count, 1) for total in self.sums]


def damping_units(parameters: Iterable[str], means: Sequence[float]) -> list[float]:
    """What λ is measured in, per parameter: the mean of its block, but at least 1e-4 of the largest among the same
    layer's parameters; 0 where the block is 0 throughout.

    Some gradients are 0 but for rounding, an attention key's bias for one (the softmax does not see it). In units of
    its own mean such noise would weigh as much as any other block. Beside the layer's other gradients it stays noise.
    The whole model's largest block is no such measure: in a fresh BERT the queries' mean is 1e-12 of it, and the key
    bias's noise, in float32, 1e-13 of the queries'. A block above a hundredth of its layer's gradient keeps its mean.
    """
    layers = [name.rpartition(".")[0] for name in parameters]
    largest: dict[str, float] = {}
    for layer, mean in zip(layers, means, strict=True):
        largest[layer] = max(largest.get(layer, 0.0), mean)
    floors = [LAYER_FLOOR * largest[layer] for layer in layers]
    return [max(mean, floor) if mean > 0 else 0.0 for mean, floor in zip(means, floors, strict=True)]


def _damped(moment: Tensor, damping: float) -> Tensor:
    """moment + λI; a layer whose gradient is 0 throughout gets I."""
    identity = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    return moment + damping * identity if bool((moment.diagonal() > 0).any()) else identity


def solved(moment: Tensor, queries: Tensor, damping: float) -> Tensor:
    factor, failed = torch.linalg.cholesky_ex(_damped(moment, damping))
    if int(failed):
        raise ValueError(
            f"the second moment of {len(moment)} numbers is singular with damping {damping} (λ): give a larger one, a "
            "smaller sketch, or more samples of the pool"
        )
    found: Tensor = torch.cholesky_solve(queries.T, factor)
    return found.transpose(0, 1)


def inverse_root(moment: Tensor, damping: float) -> Tensor:
    values, vectors = torch.linalg.eigh(_damped(moment, damping))
    least = 1e-12 * float(values[-1])  # relative: the gradients of a converged model are small
    root: Tensor = (vectors * values.clamp(min=least).rsqrt()) @ vectors.mT
    return root
