"""CLIP-powered selection: does an image fit its class's text, and how far is it from its class's other images?

*A CLIP-Powered Framework for Robust and Generalizable Data Selection*, 2410.11215; ``select.clip_powered`` makes the
choice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from assay.methods.checks import check_at_least
from assay.methods.sums import unit

# So many rows meet at once.
_ROWS = 1024


def semantic_alignment(images: Tensor, labels: Tensor, texts: Tensor) -> Tensor:
    """SAS: the cosine of each image's feature with its class's text's: keep high.

    Args:
        images: (N, D) features of an image encoder, adapted to the data set or not.
        labels: (N,) integer classes.
        texts: (C, D) features of each class's text ("a photo of a …") by the text encoder beside it.

    Returns:
        (N,) float32; NaN where either feature is 0 or not finite.

    Raises:
        ValueError: shapes that do not fit, or a label that is none of the C classes.
    """
    _check(images, labels)
    if texts.ndim != 2 or texts.shape[1] != images.shape[1]:
        raise ValueError(
            f"texts: expected (classes, {images.shape[1]}) as the images' features, got {tuple(texts.shape)}"
        )
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(texts):
        raise ValueError(
            f"labels: expected classes in [0, {len(texts)}), got {int(labels.min())} to {int(labels.max())}"
        )
    directions, classes = unit(texts.to(images.device)), labels.to(images.device).long()
    parts = [
        (unit(own) * directions[which]).sum(1)
        for own, which in zip(images.split(_ROWS), classes.split(_ROWS), strict=True)  # type: ignore[no-untyped-call]
    ]
    return torch.cat([part.float() for part in parts]) if len(images) else images.new_empty(0).float()


def sample_diversity(images: Tensor, labels: Tensor, k: int = 10) -> Tensor:
    """SDS: the mean distance of an image's feature to its k nearest of the same class: keep high.

    Distances are of features at length 1. Of a class with fewer other images than k, the mean is over those there are.
    A value follows from the class's whole pool; memory: blocks of 1,024 rows against 1,024, and k numbers a row.

    Args:
        images: (N, D) features.
        labels: (N,) integer classes.
        k: uncertain in the paper.

    Returns:
        (N,) float32; NaN of an image whose feature is 0 or not finite, or that is alone in its class.
    """
    _check(images, labels)
    check_at_least("k", k, 1)
    diversity = torch.full((len(images),), torch.nan, device=images.device)
    known = torch.cat([unit(own).isfinite().all(1) for own in images.split(_ROWS)])  # type: ignore[no-untyped-call]
    classes = labels.to(images.device)
    for label in classes.unique().tolist():  # type: ignore[no-untyped-call]
        rows = torch.nonzero((classes == label) & known)[:, 0]
        for part in rows.split(_ROWS):  # type: ignore[no-untyped-call]
            diversity[part] = _mean_distance(images, part, rows, k)
    return diversity


def _mean_distance(images: Tensor, part: Tensor, rows: Tensor, k: int) -> Tensor:
    """Of ``part``'s rows to the k nearest of ``rows`` but themselves; NaN if there are none."""
    own, nearest = unit(images[part]), images.new_empty(len(part), 0, dtype=torch.float32)
    for others in rows.split(_ROWS):  # type: ignore[no-untyped-call]
        distances = torch.cdist(own, unit(images[others]), compute_mode="donot_use_mm_for_euclid_dist").float()
        distances[part[:, None] == others] = torch.inf
        both = torch.cat([nearest, distances], 1)
        nearest = both.topk(min(k, both.shape[1]), 1, largest=False).values
    there = nearest.isfinite()
    return nearest.masked_fill(~there, 0).sum(1) / there.sum(1)


def _check(images: Tensor, labels: Tensor) -> None:
    if images.ndim != 2 or labels.shape != images.shape[:1] or labels.is_floating_point():
        raise ValueError(
            f"expected features (N, D) and an integer class of each, (N,), got {tuple(images.shape)} and "
            f"{labels.dtype} {tuple(labels.shape)}"
        )
