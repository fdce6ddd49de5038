"""``ops.grad_dot`` (bound by one GEMM) and ``ops.grad_sqnorm`` (by the cheaper of two)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from assay.ops import grad_dot, grad_sqnorm
from assay.ops.sqnorm import gram_is_cheaper
from benchmarks.gpu.case import DEVICE, Case, Target, here
from benchmarks.timing import interleave

SHAPES = [  # (B, T, I, O)
    (8, 256, 384, 1152),  # a small GPT-2's attention
    (8, 256, 768, 3072),  # GPT-2's MLP, up
    (8, 256, 3072, 768),  # and down
    (64, 196, 27, 64),  # a convolution's patches
    (512, 1, 512, 512),  # a classifier's layer
]


def dot_eager(a: Tensor, g: Tensor, v: Tensor) -> Tensor:
    return ((a @ v.T) * g).sum((1, 2))


def sqnorm_eager(a: Tensor, g: Tensor) -> Tensor:
    return torch.bmm(g.mT, a).square().sum((1, 2))


def cases() -> list[dict[str, Any]]:
    torch.manual_seed(0)
    dot_compiled = torch.compile(dot_eager, dynamic=False)
    sqnorm_compiled = torch.compile(sqnorm_eager, dynamic=False)
    out = []
    for b, t, i, o in SHAPES:
        a, g, v = torch.randn(b, t, i), torch.randn(b, t, o), torch.randn(o, i)
        shape = f"B={b} T={t} {i}→{o}"
        common = {
            "shape": shape,
            "dtype": "float32",
            "bound": "compute",
            "bytes": 4 * (a.numel() + g.numel()),
        }
        timings = interleave(
            {
                "assay": lambda a=a, g=g, v=v: grad_dot(a, g, v),
                "ceiling": lambda a=a, v=v: a @ v.T,
                "eager": lambda a=a, g=g, v=v: dot_eager(a, g, v),
                "compile": lambda a=a, g=g, v=v: dot_compiled(a, g, v),
            }
        )
        out.append({"op": "grad_dot", "ceiling": "A Vᵀ", "flops": 2 * b * t * i * o, "timings": timings, **common})
        gram = t == 1 or gram_is_cheaper(t, i, o)
        timings = interleave(
            {
                "assay": lambda a=a, g=g: grad_sqnorm(a, g),
                "ceiling": (lambda a=a, g=g: (a @ a.mT, g @ g.mT)) if gram else (lambda a=a, g=g: g.mT @ a),
                "eager": lambda a=a, g=g: sqnorm_eager(a, g),
                "compile": lambda a=a, g=g: sqnorm_compiled(a, g),
            }
        )
        flops = 2 * b * t * t * (i + o) if gram else 2 * b * t * i * o
        out.append(
            {
                "op": "grad_sqnorm",
                "ceiling": "Gram GEMMs" if gram else "GᵀA",
                "flops": flops,
                "timings": timings,
                **common,
            }
        )
    return out


# ---- on a GPU -------------------------------------------------------------------------------------------------------

LAYERS = here([(8, 1024, 768, 3072), (8, 1024, 4096, 14_336)], [(2, 16, 24, 32)])  # GPT-2's and an 8B Llama's MLP, up
# ... where samples are long and layers narrow, the norm's product plan is the cheaper one.
LONG = here([(4, 8192, 768, 768), (2, 16_384, 768, 3072)], [(2, 64, 16, 16)])
COMPILED = LAYERS[:1]


def gpu_cases() -> list[Case]:
    both = (torch.bfloat16, torch.float32)
    dots = [_dot(*shape, dtype) for dtype in both for shape in LAYERS]
    return dots + [_sqnorm(*shape, dtype) for dtype in both for shape in LAYERS + LONG]


def _inputs(b: int, t: int, i: int, o: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(shape, device=DEVICE).to(dtype) for shape in ((b, t, i), (b, t, o), (o, i)))


def _dot(b: int, t: int, i: int, o: int, dtype: torch.dtype) -> Case:
    return Case(
        op="grad_dot",
        shape=f"B={b} T={t} {i}→{o}",
        dtype=dtype,
        bytes=dtype.itemsize * (b * t * (i + o) + o * i) + 4 * b,
        flops=2 * b * t * i * o,
        bound="gemm",
        make=lambda: _inputs(b, t, i, o, dtype),
        run=grad_dot,
        rivals={"gemm": lambda a, g, v: a @ v.T, "eager": dot_eager},
        to_compile=dot_eager if (b, t, i, o) in COMPILED else None,
        target=Target("gemm", 1.10),
    )


def _sqnorm(b: int, t: int, i: int, o: int, dtype: torch.dtype) -> Case:
    """The contract sets no time: that the cheaper plan is taken shows against both plans' GEMMs."""
    gram, product = t * t * (i + o), 2 * t * i * o  # Gram matrices are symmetric: half of 2T²(I + O)
    plans = {"Gram GEMMs": lambda a, g: (a @ a.mT, g @ g.mT), "product GEMM": lambda a, g: g.mT @ a}
    return Case(
        op="grad_sqnorm",
        shape=f"B={b} T={t} {i}→{o}",
        dtype=dtype,
        bytes=dtype.itemsize * b * t * (i + o) + 4 * b,
        flops=b * min(gram, product),
        bound="gemm",
        make=lambda: _inputs(b, t, i, o, dtype)[:2],
        run=grad_sqnorm,
        rivals={**plans, "eager": sqnorm_eager},
        to_compile=sqnorm_eager if (b, t, i, o) in COMPILED else None,
    )
