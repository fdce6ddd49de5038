"""One check of the weights that several models' answers are averaged with."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def shares(weights: Sequence[float] | Tensor | None, models: int) -> list[float]:
    """``models`` weights scaled to sum to 1; None: equal.

    Raises:
        ValueError: not one finite number per model, a negative one, or nothing but zeros.
    """
    if weights is None:
        return [1 / models] * models
    try:
        given = torch.as_tensor(weights, dtype=torch.float64, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"weights: expected one weight per model, {models} numbers, got {weights!r}") from None
    if given.shape != (models,):
        raise ValueError(f"weights: expected one weight per model, shape ({models},), got {tuple(given.shape)}")
    if not bool(given.isfinite().all()) or bool((given < 0).any()) or not bool((given > 0).any()):
        raise ValueError(f"weights: expected finite, not negative, with a positive sum, got {given.tolist()}")
    exponent = math.frexp(float(given.max()))[1]  # the sum of the largest floats would overflow
    values = [math.ldexp(w, -exponent) for w in given.tolist()]
    total = math.fsum(values)
    return [w / total for w in values]
