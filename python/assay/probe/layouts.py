"""How the samples of a batch may lie in a layer's input."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

from torch import Tensor

Layout = Literal["first", "positions", "second", "windows", "shared", "packed"]
"""Where the samples are:

- ``"first"``: (B, …).
- ``"positions"``: (B·T, D), all positions, one sample after the other.
- ``"second"``: (T, B, D).
- ``"windows"``: (B·k, …, D), k parts of a sample, one sample after the other.
- ``"shared"``: nowhere; all samples share the values.
- ``"packed"``: at the positions that a ``Packing`` names.
"""


def possible(inputs: Tensor, output: Tensor, size: int, trailing: bool, positions: bool, guess: bool) -> list[Layout]:
    """What a layer's input may be by its shape, the likeliest first.

    Args:
        inputs: with as many dimensions as a batch's at least.
        output: of the layer.
        size: B, from two on.
        trailing: whether the layer's positions are independent of one another.
        positions: whether a first dimension as long as this one's stands for all positions of all samples.
        guess: whether a guess will be checked.
    """
    lead = inputs.shape[:-1] if inputs.is_floating_point() else inputs.shape
    if not lead or output.shape[:1] != lead[:1]:
        return []
    found: list[Layout] = ["first"] if lead[0] == size else []
    if not trailing:
        return found
    parts = guess and lead[0] > size and lead[0] % size == 0
    if len(lead) > 1:
        found += ["second"] if guess and lead[1] == size and output.shape[1] == size else []
        found += ["windows"] if parts else []
    elif positions and lead[0] != size:
        found += ["positions"]
    elif inputs.is_floating_point():  # ids are a table's
        found += ["windows"] if parts else []
    if not inputs.requires_grad and (not found or guess):
        found += ["shared"] if found != ["first"] or all(n == size for n in lead) else []
    return found


def arranged(tensor: Tensor, layout: Layout, size: int) -> Tensor:
    """(B, …) of an input or an output in a layout where each value is a sample's."""
    if layout == "second":
        return tensor.transpose(0, 1)
    return tensor if layout == "first" else tensor.reshape(size, -1, *tensor.shape[1:])


def choices(ambiguous: Mapping[str, Sequence[Layout]]) -> Iterator[dict[str, Layout]]:
    """First what the layers were taken to have, then one layer at a time otherwise, then all of them alike."""
    taken = {layer: layouts[0] for layer, layouts in ambiguous.items()}
    yield taken
    for other in dict.fromkeys(
        layout for layouts in ambiguous.values() for layout in layouts[1:] if layout != "shared"
    ):
        yield taken | {layer: other for layer, layouts in ambiguous.items() if other in layouts}
    for layer, layouts in ambiguous.items():
        yield from (taken | {layer: other} for other in layouts[1:] if other != "shared")


def check_is_first(what: str, inputs: Tensor, alone: Callable[[], Tensor | None]) -> None:
    """RuntimeError where the samples of (B, B, …) lie in the second dimension, which the shape does not tell.

    Args:
        what: the input's name, for the message.
        alone: the same input where the batch's first sample is the only one; None, or an error, if that cannot be had.
    """
    size = len(inputs)
    if inputs.ndim < 3 or size < 2 or inputs.shape[1] != size:
        return
    try:
        one = alone()
    except Exception:  # whatever a model says of a sample whose other arguments are the batch's
        return
    if one is not None and one.ndim == inputs.ndim and len(one) == size and one.shape[1] == 1:
        raise RuntimeError(
            f"{what} has shape {tuple(inputs.shape)} in a batch of {size}, and {tuple(one.shape)} of one sample alone: "
            "its samples lie in the second dimension; expected them in the first"
        )
