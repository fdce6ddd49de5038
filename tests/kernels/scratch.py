"""Scratch memory that shows when it is read before it is written, as initcheck does on a GPU.

While ``poisoned()`` lasts, what the kernels' launchers and the ops leave empty is full of a pattern that no computation
makes, and an interpreted load that finds it fails. In floating point the pattern is NaN: torch cannot add it up
unseen either.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

FILLED = ("assay.kernels", "assay.ops")  # whose empty tensors
# NaNs with a payload, integers that no index and no packed sign is expected to be; a byte alone says too little.
PATTERN = {2: 0xFF85, 4: 0xFFA5A5C3, 8: 0xFFF5A5A5C3C3A5A5}
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_WORDS = {2: np.uint16, 4: np.uint32, 8: np.uint64}


def fill(x: Tensor) -> Tensor:
    """``x``, all of it the pattern."""
    size = x.element_size()
    if x.device.type == "cpu" and size in PATTERN:
        signed = PATTERN[size] - (1 << 8 * size)
        x.view(_INTEGERS[size]).fill_(signed)
    return x


def poison_in(values: Any, mask: Any) -> bool:
    """Whether a load with this mask found the pattern."""
    size = values.dtype.itemsize
    if size not in PATTERN:
        return False
    found = np.ascontiguousarray(values).view(_WORDS[size]) == PATTERN[size]
    return bool((found & mask).any())


@contextmanager
def poisoned() -> Iterator[None]:
    """As the module says; on a GPU, where kernels are compiled, the pattern alone."""

    def filled(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*arguments: Any, **options: Any) -> Tensor:
            x = make(*arguments, **options)
            module = sys._getframe(1).f_globals.get("__name__", "")
            return fill(x) if module.startswith(FILLED) else x

        return made

    load = InterpreterBuilder.create_masked_load

    def checked_load(builder: object, pointers: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        loaded = load(builder, pointers, mask, *rest, **options)
        if poison_in(loaded.data, np.asarray(getattr(mask, "data", mask))):
            raise AssertionError("a kernel read scratch memory that nothing had written")
        return loaded

    with (
        mock.patch.object(torch, "empty", filled(torch.empty)),
        mock.patch.object(torch, "empty_like", filled(torch.empty_like)),
        mock.patch.object(Tensor, "new_empty", filled(Tensor.new_empty)),
        mock.patch.object(InterpreterBuilder, "create_masked_load", checked_load),
    ):
        yield
