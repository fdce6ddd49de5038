"""What the wrapper around a model that is being trained makes of its backward pass."""

from __future__ import annotations

from typing import Any

from torch.nn.parallel import DistributedDataParallel


def looks_for_unused() -> bool:
    """Whether the wrapper whose forward pass is running looks in the graph for parameters that are not used."""
    return bool(getattr(_running(), "find_unused_parameters", False))


def refuse_static_graph() -> None:
    """RuntimeError where gradients would not be averaged: a static graph's are after the first backward pass alone."""
    if getattr(_running(), "static_graph", False):
        raise RuntimeError(
            "DistributedDataParallel(static_graph=True) takes a step for one backward pass and counts its hooks in the "
            "first; a Reweighter makes more than one, and gradients would not be averaged. Leave static_graph off"
        )


def _running() -> Any:
    """The DistributedDataParallel whose forward pass is running, or None."""
    return DistributedDataParallel._get_active_ddp_module()  # type: ignore[no-untyped-call]
