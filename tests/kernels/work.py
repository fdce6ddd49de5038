"""What an operator gives a GPU to do: its launches, and every torch operator that is a kernel of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from assay.kernels._common import Launch
from tests.kernels import scratch

# No kernels.
_FREE = {"empty", "new_empty", "view", "unsqueeze", "slice", "select", "transpose", "permute", "detach", "alias"}


class _Recording(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, found: list[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = found

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name not in _FREE:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def work_of(run: Callable[[], Any]) -> list[str]:
    """Names of Triton kernels and of torch's operators, in their order; allocations and views are no work."""
    found: list[str] = []

    def record(launch: Launch, tensor: torch.Tensor) -> None:
        found.append(launch.kernel.__name__)

    scratch_as_it_is = mock.patch.object(scratch, "fill", lambda x: x)
    with scratch_as_it_is, mock.patch.object(Launch, "run", record), _Recording(found):
        run()
    return found
