"""Pooled hidden states."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from assay.probe.layouts import check_is_first
from assay.probe.selection import find_module


@dataclass(frozen=True)
class Pooled:
    """Which layer's input is averaged over a sample's positions, and how.

    Attributes:
        layer: name or glob of the one layer.
        weights: ``"mean"``: every position that holds data counts alike; ``"position"``: the t-th of them counts t
            times (2503.01807), for a causal model's later states have read more.
    """

    layer: str
    weights: Literal["mean", "position"] = "mean"


class Pooling:
    """Averages the input of one layer over positions. A glob must match exactly one layer; a name alone is its mean."""

    def __init__(self, model: nn.Module, pooled: str | Pooled) -> None:
        self._pooled = Pooled(pooled) if isinstance(pooled, str) else pooled
        self.layer, self._module = find_module(model, self._pooled.layer)

    @contextmanager
    def attached(self) -> Iterator[list[Tensor]]:
        """Gives the list in which the forward pass leaves the layer's inputs."""
        caught: list[Tensor] = []

        def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            if inputs is None:
                raise RuntimeError(f"embeddings: layer {self.layer!r} was called without a tensor")
            caught.append(inputs.detach())

        handle = self._module.register_forward_pre_hook(catch, with_kwargs=True)
        try:
            yield caught
        finally:
            handle.remove()

    def pool(self, caught: list[Tensor], size: int, mask: Tensor | None, alone: Callable[[], Any]) -> Tensor:
        """The caught (B, T, D) averaged over ``mask`` (B, T), or the caught (B, D) -> (B, D) float32.

        A sample without positions is NaN. ``alone`` runs the model on the batch's first sample.
        """
        if len(caught) != 1:
            raise RuntimeError(
                f"embeddings: layer {self.layer!r} ran {len(caught)} times in the forward pass; expected once"
            )
        hidden = caught[0]
        if hidden.ndim not in (2, 3) or len(hidden) != size:
            raise RuntimeError(
                f"embeddings: the input of layer {self.layer!r} has shape {tuple(hidden.shape)} in a batch "
                f"of {size}; expected (B, D) or (B, T, D)"
            )
        if hidden.ndim == 2:
            return hidden.float()
        check_is_first(f"embeddings: the input of layer {self.layer!r}", hidden, lambda: self._caught(alone))
        if mask is None and self._pooled.weights == "mean":
            return hidden.float().mean(1)
        if mask is None:
            mask = hidden.new_ones(hidden.shape[:2], dtype=torch.bool)
        if mask.shape != hidden.shape[:2]:
            raise RuntimeError(
                f"embeddings: the input of layer {self.layer!r} has shape {tuple(hidden.shape)} but the "
                f"task's mask {tuple(mask.shape)}; expected one value per position"
            )
        # Select, do not multiply: what padding holds may be NaN.
        known = hidden.float().masked_fill(~mask[..., None], 0)
        if self._pooled.weights == "mean":
            return known.sum(1) / mask.sum(1, keepdim=True)
        weights = (mask.cumsum(1) * mask).float()
        return known.mul_(weights[..., None]).sum(1) / weights.sum(1, keepdim=True)

    def _caught(self, run: Callable[[], Any]) -> Tensor | None:
        """The layer's input in another run; None unless it runs once."""
        with self.attached() as caught, torch.no_grad():
            run()
        return caught[0] if len(caught) == 1 else None
