"""What has been made of a model that is being trained: compiled, sharded, wrapped."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel


def check_can_be_tapped(model: nn.Module) -> None:
    """ValueError of a model whose layers' inputs and output gradients nobody sees, or whose weights lie elsewhere."""
    for module in model.modules():
        if type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None:
            raise ValueError(
                f"{type(module).__name__}: the model, or a layer of it, is compiled (torch.compile), and its layers' "
                "inputs cannot be seen; train it uncompiled, or score offline with assay.score"
            )
    shards = any(cls.__name__ == "FSDPModule" for module in model.modules() for cls in type(module).__mro__)
    for name, parameter in model.named_parameters():
        if shards or type(parameter).__name__ == "DTensor" or type(parameter.data).__name__ == "DTensor":
            raise ValueError(
                f"parameter {name!r} is sharded (of FSDP2 or tensor parallelism): its layer's weight is not whole when "
                "its gradient is made, and FSDP reduces gradients once. Use DistributedDataParallel, or score offline "
                "with assay.score"
            )


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
