"""Other projects' kernels for the single-model cases that they cover. What is not installed is reported as absent."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

PACKAGES = ("liger-kernel", "quack-kernels", "cut-cross-entropy")


def versions() -> dict[str, str]:
    return {package: _version(package) for package in PACKAGES}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def cross_entropy() -> dict[str, Callable[..., Tensor]]:
    """By installed package: (1, N, C) logits and (N,) labels -> (N,) losses, forward only."""
    return _installed({"liger-kernel": _liger, "quack-kernels": _quack})


def linear_cross_entropy() -> dict[str, Callable[..., Tensor]]:
    """By installed package: one model's hidden states and output matrix, and labels -> (N,) losses, forward only."""
    return _installed({"liger-kernel": _liger_linear, "cut-cross-entropy": _cut})


def _installed(peers: dict[str, Callable[..., Tensor]]) -> dict[str, Callable[..., Tensor]]:
    found = versions()
    return {package: torch.no_grad()(run) for package, run in peers.items() if found[package] != "absent"}


# Imported where they run: a package that breaks on import is a failed variant, not a failed benchmark.


def _liger(z: Tensor, y: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_cross_entropy

    return liger_cross_entropy(z[0], y, reduction="none")


def _quack(z: Tensor, y: Tensor) -> Tensor:
    from quack.cross_entropy import cross_entropy

    return cross_entropy(z[0], y, reduction="none")


def _liger_linear(hidden: Sequence[Tensor], weight: Sequence[Tensor], y: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(hidden[0], weight[0], y, reduction="none")


def _cut(hidden: Sequence[Tensor], weight: Sequence[Tensor], y: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden[0], weight[0], y, reduction="none")
