"""How the samples of a batch lie in the inputs of a model's layers, decided call by call."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from assay.probe.layouts import Layout, possible
from assay.probe.packing import Packing
from assay.probe.selection import Tap
from assay.probe.shared import Region, Shared
from assay.probe.starts import coincidences, untapped
from assay.tasks.output_layer import UnmadeLogits


@dataclass
class Placement:
    """What is known of one forward pass.

    Args:
        region: of the pass, which knows the batch's size and its positions.
        packing: of a batch whose samples lie end to end in rows.
        known: by layer, how samples lie in its input, for where the shape leaves a choice.
        guess: whether a layout that only the shape speaks for may be taken: it is checked.
        patterns: how layers met their inputs; it grows.

    Attributes:
        ambiguous: by layer, the layout that its input was taken to have and others that it may have by its shape.
    """

    region: Region
    packing: Packing | None
    known: Mapping[str, Layout]
    guess: bool
    patterns: set[tuple[Any, ...]]
    ambiguous: dict[str, list[Layout]] = field(default_factory=dict)
    # By layer: the only layouts that its calls' inputs can have, None where there is a choice.
    _seen: dict[str, set[Layout | None]] = field(default_factory=lambda: defaultdict(set))

    @property
    def learned(self) -> dict[str, Layout]:
        """By layer, the only layout that its input can have, in all of its calls."""
        alone = {layer: next(iter(seen)) for layer, seen in self._seen.items() if len(seen) == 1}
        return {layer: layout for layer, layout in alone.items() if layout is not None}

    def of(self, tap: Tap, inputs: Tensor, output: Any) -> Layout:
        """How samples lie in a layer's input. Untapped if they cannot be told apart there."""
        if not torch.is_grad_enabled():
            raise Untapped(
                f"layer {tap.layer!r} ran without gradients (torch.no_grad, or reentrant checkpointing); use "
                "torch.utils.checkpoint with use_reentrant=False, or leave the layer out"
            )
        assert tap.rule is not None
        place = tuple(tap.parameters.values())
        trailing, deep = tap.rule.trailing, inputs.ndim >= tap.rule.ndim(tap.module)
        if isinstance(output, Tensor) and inputs.ndim > 0 and output.shape[:1] == inputs.shape[:1]:
            if self.packing is not None:
                return self._packed(tap, inputs, output, self.packing)
            if isinstance(inputs, Shared) and trailing:
                return "shared"
            if self.region.size == 1 and trailing and (len(inputs) != 1 or not deep):
                return "windows"  # whatever the dimensions are, they are the sample's
            if found := self._layouts(tap, inputs, output, deep):
                known = self.known.get(tap.layer)
                layout = known if known in found else found[0]
                if len(found) > 1:
                    self.ambiguous.setdefault(tap.layer, [layout, *(other for other in found if other != layout)])
                self._seen[tap.layer].add(layout if len(found) == 1 else None)
                self.patterns.add((place, *(() if layout == "first" else (layout,))))
                if self.region.size > 1 and layout != "shared":
                    self.patterns.add((place, layout, inputs.ndim, *coincidences(inputs.shape, self.region.size)))
                return layout
        raise Untapped(
            untapped(called(tap, inputs, output, self.region.size), "its first dimension is not the batch's")
        )

    def _packed(self, tap: Tap, inputs: Tensor, output: Tensor, packing: Packing) -> Layout:
        assert tap.rule is not None
        lead = inputs.shape[:-1] if inputs.is_floating_point() else inputs.shape
        by_position = tap.rule.trailing and packing.lead(lead) and packing.lead(output.shape)
        if isinstance(inputs, Shared) or not by_position:
            why = f"it has no row of its own for each of the {tuple(packing.sample_of.shape)} packed positions"
            raise Untapped(untapped(called(tap, inputs, output, self.region.size), why))
        place, count = tuple(tap.parameters.values()), packing.sample_of.numel()
        self.patterns |= {(place, "packed"), (place, "packed", inputs.ndim, *coincidences(inputs.shape, count))}
        return "packed"

    def _layouts(self, tap: Tap, inputs: Tensor, output: Tensor, deep: bool) -> list[Layout]:
        assert tap.rule is not None
        positions = self.region.all_positions(len(inputs))
        guess = self.guess and not isinstance(output, UnmadeLogits)
        found = possible(inputs, output, self.region.size, tap.rule.trailing, positions, guess)
        return found if deep else [layout for layout in found if layout in ("positions", "shared")]

    def owner(self, tokens: int) -> Tensor | None:
        """(N,), the sample of each of all positions; None: these are not they."""
        if self.packing is not None:
            return self.packing.sample_of.flatten() if tokens == self.packing.sample_of.numel() else None
        known = self.region.size == 1 or tokens == self.region.size or self.region.all_positions(tokens)
        return torch.arange(tokens) // (tokens // self.region.size) if known and tokens else None


class Untapped(Exception):
    """A layer cannot be tapped as the model calls it."""


def called(tap: Tap, inputs: Tensor, output: Any, size: int) -> str:
    shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    return (
        f"layer {tap.layer!r} ({type(tap.module).__name__}) was called with an input of shape {tuple(inputs.shape)} "
        f"and gave {shape}, in a batch of {size}"
    )
