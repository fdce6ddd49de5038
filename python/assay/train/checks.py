"""What a ``Reweighter`` is given, checked."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from assay.methods.checks import check_at_least, check_one_of
from assay.probe.recurrent import stepwise
from assay.probe.selection import make_taps


def check_settings(
    mode: str,
    temperature: float,
    warmup_steps: int,
    keep: float | None,
    every: int,
    *,
    exact: bool,
    recompute: bool,
) -> None:
    """ValueError for numbers that there are not, and settings that do not go together."""
    check_one_of("Reweighter: mode", mode, ("reweight", "filter", "observe"))
    if not 0 < temperature < math.inf:
        raise ValueError(f"Reweighter: temperature: expected a finite number above 0, found {temperature}")
    check_at_least("Reweighter: warmup_steps", warmup_steps, 0)
    check_at_least("Reweighter: every", every, 1)
    if (mode == "filter") != (keep is not None):
        raise ValueError(f"Reweighter: keep={keep} with mode {mode!r}; expected a share in (0, 1] with 'filter' alone")
    if keep is not None and not 0 < keep <= 1:
        raise ValueError(f"Reweighter: keep: expected a share in (0, 1], found {keep}")
    if not exact and (mode != "observe" or recompute):
        found = f"mode {mode!r}{' and recompute=True' if recompute else ''}"
        raise ValueError(
            f"Reweighter: exact=False with {found}; expected mode 'observe', whose gradients it is of, and no recompute"
        )


def check_bits(model: nn.Module, parameters: Collection[str]) -> None:
    """ValueError for a layer that computes something else, if only in the last bits, when it is looked at."""
    for tap in make_taps(model, parameters):
        if stepwise(tap.module) is not None:
            raise ValueError(
                f"Reweighter: layer {tap.layer!r} ({type(tap.module).__name__}) runs step by step while its gradients "
                "are scored, and rounds otherwise than by itself, so that mode 'observe' cannot leave every bit of the "
                "training as it is; pass exact=False, or a method with layers that leave it out"
            )


def check_losses(losses: Tensor) -> int:
    """B, of losses that can be trained on."""
    if losses.ndim != 1 or len(losses) == 0:
        raise RuntimeError(
            f"losses of shape {tuple(losses.shape)}; expected one per sample, (B,): reduction='none', and a mean over "
            "each sample's tokens where it has several"
        )
    if not losses.requires_grad:
        raise RuntimeError("the losses have no graph; expected those of a forward pass with gradients")
    if not bool(losses.detach().isfinite().all()):
        bad = torch.nonzero(~losses.detach().isfinite()).flatten().tolist()
        raise RuntimeError(
            f"the loss of sample {bad[0]} of the batch is {float(losses.detach()[bad[0]])}; expected finite losses"
        )
    return len(losses)


def check_given(size: int, **given: Tensor | None) -> None:
    """ValueError unless what came beside B losses is (B, ...), or (B,) where it is a number each."""
    for name, values in given.items():
        if values is None:
            continue
        shape, expected = tuple(values.shape), f"({size}, C)" if name == "logits" else f"({size},)"
        if shape[:1] != (size,) or (name == "reference_losses" and len(shape) != 1):
            raise ValueError(f"{name}: expected one per sample, {expected}, found shape {shape}")


def names_of(ids: Sequence[Any] | Tensor) -> list[str]:
    """Samples' ids as texts. ValueError for what is no sequence of strings or integers."""
    if isinstance(ids, str | bytes) or (isinstance(ids, Tensor) and ids.ndim == 0):
        raise ValueError(f"ids: {ids!r:.80}; expected a sequence, one per sample")
    names = []
    for value in ids.tolist() if isinstance(ids, Tensor) else ids:
        if (name := name_of(value)) is None:
            raise ValueError(f"ids: {value!r:.80} among them; expected strings or integers, one per sample")
        names.append(name)
    return names


def name_of(value: Any) -> str | None:
    """A string or an integer, perhaps a tensor of one, as text; None: it is neither."""
    if isinstance(value, Tensor) and value.ndim == 0:
        value = value.item()
    return None if isinstance(value, bool) or not isinstance(value, str | Integral) else str(value)
