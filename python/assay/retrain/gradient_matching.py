"""What clusters of the data are worth: one synthetic sample for each, matched to its gradients along the run backwards,
then runs on these without one of them. After 2404.14006."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from assay._lazy import require
from assay.probe.quiet import exchanged, undisturbed
from assay.retrain.checks import Floats, Rows, finite, positive, whole
from assay.retrain.samples import class_numbers, short, to_numpy

State = dict[str, Tensor]


@dataclass(frozen=True)
class Distilled:
    """A synthetic sample per cluster.

    Attributes:
        inputs: (K, ...).
        labels: (K,) int64, the clusters' classes.
        sizes: (K,) int64, how many samples each stands for.
        before, after: of the clusters' means, which the samples start from, and of the samples: by state the squared
            distance of their gradients to the clusters', summed over clusters and divided by the clusters' own squared
            length; the mean over states.
    """

    inputs: Tensor
    labels: Tensor
    sizes: Tensor
    before: float
    after: float


def clusters_by_class(features: npt.ArrayLike, labels: npt.ArrayLike, per_class: int = 3, seed: int = 0) -> Rows:
    """(N, D) and (N,) -> (N,) numbers of clusters from 0: k-means within each class, the paper's 10 each.

    A class of fewer samples has as many clusters as it has samples; numbers follow the classes.
    """
    x, (y, _) = finite(features, "features"), class_numbers(labels)
    whole("per_class", per_class, 1)
    if x.ndim != 2 or y.shape != x.shape[:1] or not len(x):
        raise ValueError(f"expected features (N, D) and labels (N,), got {x.shape} and {y.shape}")
    means = require("sklearn.cluster", "cli").KMeans
    out, used = np.empty(len(x), np.int64), 0
    for label in np.unique(y):
        rows = np.flatnonzero(y == label)
        count = min(per_class, len(np.unique(x[rows], axis=0)))
        out[rows] = used + means(count, n_init=4, random_state=seed).fit(x[rows]).labels_
        used += count
    return out


def distil(
    model: nn.Module,
    states: Sequence[Mapping[str, Tensor]],
    inputs: Tensor,
    labels: Tensor,
    clusters: npt.ArrayLike,
    *,
    sweeps: int = 20,
    learning_rate: float = 0.01,
) -> Distilled:
    """Match one synthetic sample per cluster to the mean gradients of the cluster's samples.

    The samples begin as the clusters' means. A sweep walks the run's states from the last to the first, and at each
    takes one step of Adam down Σ_k ‖∇ℓ(s_k) − mean_{i∈k} ∇ℓ_i‖² / Σ_k ‖mean_{i∈k} ∇ℓ_i‖².

    Args:
        model: logits (B, C) of inputs (B, ...); run in eval mode, with its own buffers. Its own parameters do not
            matter, but for which of them require gradients: the others are held.
        states: its parameters by name, from the run's start to its end, at some of its steps.
        inputs: (N, ...) floating.
        labels: (N,) int64; the loss is cross entropy.
        clusters: (N,) numbers 0..K−1, all samples of a cluster of one class.
        sweeps, learning_rate: of the matching.

    Raises:
        ValueError: no state, shapes that do not match, a cluster that is empty or of several classes; gradients that
            are all 0 or not finite; nothing to train; a matching that diverges.
    """
    whole("sweeps", sweeps, 1)
    positive("learning_rate", learning_rate)
    own, sizes, classes = _clusters(inputs, labels, clusters)
    path = [_point(model, state, number) for number, state in enumerate(states)]
    if not path:
        raise ValueError("states: expected the parameters at some of the run's steps, got none")
    members = [torch.nonzero(own == k)[:, 0] for k in range(len(sizes))]
    parts = [(inputs[rows], labels[rows]) for rows in members]
    start = torch.stack([x.mean(0) for x, _ in parts])
    synthetic = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([synthetic], learning_rate)
    with undisturbed(model), torch.enable_grad():
        wanted = [_cluster_gradients(point, parts) for point in path]
        for _ in range(sweeps):
            for point, target in zip(reversed(path), reversed(wanted), strict=True):
                optimizer.zero_grad()
                _mismatch(point, synthetic, classes, target).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        both = [_over_states(path, x, classes, wanted) for x in (start, synthetic.detach())]
    if not np.isfinite(both).all():
        raise ValueError("distil: the matching diverged; take a smaller learning_rate")
    return Distilled(synthetic.detach(), classes, sizes, *both)


def cluster_effects(
    model: nn.Module,
    start: Mapping[str, Tensor],
    distilled: Distilled,
    targets: tuple[Tensor, Tensor],
    *,
    steps: int = 100,
    learning_rate: float = 0.1,
) -> Floats:
    """(K, T): how much larger the loss of each target sample is after training without a cluster. Keep high.

    Plain gradient descent from ``start`` on the synthetic samples, each with the share of the samples it stands for:
    once with all, once without each.

    Args:
        model: as in ``distil``.
        start: the parameters to go from: the run's start; or its end, for a brief tuning that moves less.
        distilled: of ``distil``.
        targets: inputs (T, ...) and labels (T,).
        steps, learning_rate: of these runs.

    Raises:
        ValueError: shapes that do not match, a single cluster, or a run that diverges.
    """
    whole("steps", steps, 1)
    positive("learning_rate", learning_rate)
    _check_classes("targets", targets[1])
    first = _point(model, start, 0)
    count = len(distilled.labels)
    if count < 2:
        raise ValueError("distilled: expected two clusters at least; without a single one nothing is left")
    left = ~torch.eye(count + 1, count, dtype=torch.bool, device=distilled.sizes.device)  # the last row: all
    shares = (distilled.sizes * left).to(distilled.inputs.dtype)
    shares = shares / shares.sum(1, keepdim=True)
    runs = {name: p.expand(count + 1, *p.shape).clone() for name, p in first.own.items()}

    def loss(own: State, weights: Tensor) -> Tensor:
        return weights @ first.losses(own, distilled.inputs, distilled.labels)

    slopes = vmap(grad(loss))
    with undisturbed(model):
        for _ in range(steps):
            found = slopes(runs, shares)
            runs = {name: p - learning_rate * found[name] for name, p in runs.items()}
        with torch.no_grad():
            losses = vmap(lambda own: first.losses(own, *targets))(runs).double()
    if not bool(losses.isfinite().all()):
        raise ValueError("cluster_effects: a run diverged; take a smaller learning_rate")
    effects: Floats = (losses[:-1] - losses[-1]).cpu().numpy()
    return effects


@dataclass(frozen=True)
class _Point:
    """A state of the run: the parameters that are trained, cut off from any graph, and those that are held."""

    model: nn.Module
    own: State
    held: State

    def losses(self, own: State, x: Tensor, y: Tensor) -> Tensor:
        """(B,) with these in the place of its own."""
        with exchanged(self.model, self.held | own):
            return nn.functional.cross_entropy(self.model(x), y, reduction="none")


def _cluster_gradients(point: _Point, parts: Sequence[tuple[Tensor, Tensor]]) -> State:
    """By parameter (K, ...): the clusters' mean gradients."""
    slope = grad(lambda own, x, y: point.losses(own, x, y).mean())
    each = [slope(point.own, x, y) for x, y in parts]
    found = {name: torch.stack([one[name] for one in each]).detach() for name in point.own}
    length = _square(found.values())
    if not bool(length > 0) or not bool(length.isfinite()):
        raise ValueError(f"states: the clusters' gradients have the squared length {float(length):.3g} at one of them")
    return found


def _mismatch(point: _Point, x: Tensor, y: Tensor, wanted: State) -> Tensor:
    """Of the synthetic samples' gradients, relative."""

    def loss(own: State, one: Tensor, label: Tensor) -> Tensor:
        return point.losses(own, one[None], label[None])[0]

    found = vmap(grad(loss), (None, 0, 0))(point.own, x, y)
    return _square(found[name] - target for name, target in wanted.items()) / _square(wanted.values())


def _over_states(path: Sequence[_Point], x: Tensor, y: Tensor, wanted: Sequence[State]) -> float:
    return float(np.mean([float(_mismatch(point, x, y, w)) for point, w in zip(path, wanted, strict=True)]))


def _square(parts: Iterable[Tensor]) -> Tensor:
    return torch.stack([part.square().sum() for part in parts]).sum()


def _point(model: nn.Module, given: Mapping[str, Tensor], number: int) -> _Point:
    found = _Point(model, {}, {})
    for name, own in model.named_parameters():
        tensor = given.get(name)
        if not isinstance(tensor, Tensor) or tensor.shape != own.shape:
            what = tuple(tensor.shape) if isinstance(tensor, Tensor) else "none"
            raise ValueError(f"states[{number}]: expected parameter {name!r} {tuple(own.shape)}, found {what}")
        (found.own if own.requires_grad else found.held)[name] = tensor.detach().clone()
    if not found.own:
        raise ValueError("model: has no parameter that requires a gradient; nothing to train")
    return found


def _check_classes(name: str, labels: Tensor) -> None:
    """ValueError for a label below 0: cross entropy takes a sample of -100 for one that loses nothing."""
    if len(labels) and (least := int(labels.min())) < 0:
        raise ValueError(f"{name}: expected class numbers from 0 on, got {least}; leave such samples out")


def _clusters(inputs: Any, labels: Any, clusters: npt.ArrayLike) -> tuple[Tensor, Tensor, Tensor]:
    """(N,) clusters, (K,) sizes and (K,) classes."""
    given = np.asarray(to_numpy(clusters))
    if not isinstance(inputs, Tensor) or not isinstance(labels, Tensor) or not inputs.is_floating_point():
        raise ValueError("expected inputs and labels as tensors, the inputs floating")
    shapes = (len(inputs), tuple(labels.shape), given.shape)
    if not len(inputs) or shapes[1:] != ((len(inputs),), (len(inputs),)) or given.dtype.kind not in "iu":
        raise ValueError(f"expected N inputs, labels (N,) and integer clusters (N,), got {shapes} of {given.dtype}")
    _check_classes("labels", labels)
    own = torch.from_numpy(given.astype(np.int64))
    if int(own.min()) < 0 or not bool((sizes := torch.bincount(own)).all()):
        raise ValueError(f"clusters: expected numbers 0..K−1 with samples in each, got {short(np.unique(given))}")
    classes = torch.empty(len(sizes), dtype=torch.int64)
    classes[own] = labels.long().cpu()
    if wrong := torch.nonzero(classes[own] != labels.cpu()).flatten().tolist():
        raise ValueError(f"clusters: cluster {int(own[wrong[0]])} has samples of several classes")
    return own, sizes.to(inputs.device), classes.to(inputs.device)
