"""Launches compiled instead of run, into Triton's cache: so that the time of measurements goes into measuring."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from assay.kernels import _common
from assay.ops import _cuda


@contextmanager
def compile_only() -> Iterator[Counter[str]]:
    """Counts the launches by kernel. Numbers that later launches would read are any, so nothing native runs on them."""
    launches: Counter[str] = Counter()

    def compiled(launch: Any, tensor: Tensor) -> None:
        launches[launch.kernel.fn.__name__] += 1
        with torch.cuda.device(tensor.device):
            launch.kernel.warmup(**launch.arguments, grid=launch.grid, **launch.options())

    with mock.patch.object(_common.Launch, "run", compiled), mock.patch.object(_cuda, "sparse"):
        yield launches
