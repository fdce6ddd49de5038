"""What the launchers share: a launch as data, and the facts about a device that choose its blocks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Fused multiply-add: one rounding less, and what float32 products are made of. Triton's default for it is about to
# change, and every bit of a result with it.
FP_FUSION = True
# Registers a thread may have, all of them with up to 8 warps a block. Left to itself, ptxas takes fewer to fit more
# blocks on a processor, and spills a few bytes for it.
MAX_REGISTERS = 255
# Enough programs to fill any card several times over. Work is cut by the shape and this constant alone, never by the
# card's own size: two cards give the same partial sums.
PROGRAMS = 512

HALF = (torch.bfloat16, torch.float16)
# A float32 FLOP in half-precision ones: it runs outside the tensor cores, at about a fifteenth of their rate by the
# makers' figures (A100 19.5 of 312 TFLOP/s, H100 67 of 989).
FLOAT_COST = 15


@dataclass(frozen=True)
class Tile:
    """A block of rows × columns of a product, made from ``k`` terms at a time, and how it runs."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    registers: int = MAX_REGISTERS


@dataclass(frozen=True)
class Launch:
    """One kernel launch, as data: what runs on a GPU is what the ahead-of-time check compiles."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    num_warps: int
    num_stages: int
    registers: int = MAX_REGISTERS

    def run(self, tensor: Tensor) -> None:
        """Launch on the device of ``tensor``, whichever device is current."""
        with torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext():
            self.kernel[self.grid](**self.arguments, **self.options())

    def options(self) -> dict[str, Any]:
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": FP_FUSION,
            "maxnreg": self.registers,
        }


def run(launches: Iterable[Launch]) -> None:
    """One after the other, each beside the first tensor among its arguments."""
    for launch in launches:
        launch.run(next(a for a in launch.arguments.values() if isinstance(a, Tensor)))


def generation(tensor: Tensor) -> int:
    """Major compute capability: 8 Ampere and Ada, 9 Hopper, 10 data-centre Blackwell; 8 under the interpreter."""
    return torch.cuda.get_device_capability(tensor.device)[0] if tensor.is_cuda else 8


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def round_up(a: int, multiple: int) -> int:
    return ceil_div(a, multiple) * multiple


def unit_stride(x: Tensor) -> Tensor:
    """``x``, or a copy if its last dimension is not contiguous: each factor is read many times, a copy is read once."""
    return x if x.shape[-1] == 1 or x.stride(-1) == 1 else x.contiguous()


def aligned(arguments: Iterable[Any]) -> bool:
    """Whether Triton sees 16-byte addresses: tensors that lie at one, sizes and strides that are 1 or multiples of 16.

    Otherwise elements are loaded one by one, which takes many more registers.
    """
    return all(x.data_ptr() % 16 == 0 if isinstance(x, Tensor) else x == 1 or x % 16 == 0 for x in arguments)
