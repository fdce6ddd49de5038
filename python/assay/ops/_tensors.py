"""What every op asks of its arguments, and what it does to tensors before a kernel sees them."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensor(
    name: str, x: Any, dims: Collection[int] = (), form: str = "", dtypes: Sequence[torch.dtype] = FLOATS
) -> None:
    """TypeError or ValueError unless ``x`` is a dense tensor of these dtypes and numbers of dimensions (``form``)."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got one of layout {x.layout}; x.to_dense() makes one")
    if x.dtype not in dtypes:
        names = [str(d).removeprefix("torch.") for d in dtypes if d != torch.float64]
        listed = ", ".join(names[:-1]) + " or " + names[-1] if len(names) > 1 else names[0]
        raise TypeError(f"{name}: expected {listed}, got {x.dtype}")
    if dims and x.dim() not in dims:
        raise ValueError(f"{name}: expected {form}, got shape {tuple(x.shape)}")


def check_like(name: str, x: Any, shape: tuple[int, ...], device: torch.device) -> None:
    """Errors unless ``x`` is a float tensor of this shape on this device."""
    check_tensor(name, x)
    if tuple(x.shape) != shape or x.device != device:
        raise ValueError(f"{name}: expected shape {shape} on {device}, got {tuple(x.shape)} on {x.device}")


def check_matrices(name: str, value: Any, form: str) -> list[Tensor]:
    """(K, rows, columns), (rows, columns) or K tensors (rows, columns) -> K float matrices on one device, detached."""
    if isinstance(value, Tensor):
        check_tensor(name, value, (2, 3), f"(K, {form}) or K tensors ({form})", [value.dtype])
        matrices = list(value.unbind(0)) if value.dim() == 3 else [value]
    elif isinstance(value, Iterable):
        matrices = list(value)
    else:
        raise TypeError(f"{name}: expected a tensor or a sequence of tensors, got {type(value).__name__}")
    if not matrices:
        raise ValueError(f"{name}: expected at least one model, got none")
    for k, x in enumerate(matrices):
        check_tensor(f"{name}[{k}]", x, (2,), f"two dimensions, ({form})")
        if x.device != matrices[0].device:
            raise ValueError(f"{name}[{k}]: expected device {matrices[0].device} of {name}[0], got {x.device}")
    return [x.detach() for x in matrices]


def check_int(name: str, value: Any, low: int = -(2**63), high: int = 2**63 - 1, what: str = "an int") -> int:
    """``value`` as an int in [low, high]; a bool is none."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: expected {what}, got {value!r}")
    try:
        number = value if isinstance(value, int) else operator.index(value)
    except TypeError:  # an array of several, say
        raise TypeError(f"{name}: expected {what}, got {value!r}") from None
    if not low <= number <= high:
        raise ValueError(f"{name}: expected {what} in [{low}, {high}], got {number}")
    return number


def wide_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any tensor is, else float32: what results and intermediates are held in."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def adjacent_columns(x: Tensor) -> Tensor:
    """``x``, or a copy if its last dimension is not contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def first_order(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """An autograd function's ``backward`` that cannot be differentiated in turn, of the op ``name``.

    torch's once_differentiable gives a gradient without a graph where the one that comes in has none, as that of a sum,
    and the second derivative then lacks this op's part without a word.
    """

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(backward)
        def once(ctx: Any, *outer: Tensor) -> Any:
            if torch.is_grad_enabled():
                raise RuntimeError(
                    f"{name}: has no second derivative; expected a backward pass without create_graph=True, or losses "
                    "from logits in plain torch"
                )
            return backward(ctx, *outer)

        return once

    return decorate
