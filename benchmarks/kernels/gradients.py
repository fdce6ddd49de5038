"""``ops.grad_dot`` (bound by one GEMM) and ``ops.grad_sqnorm`` (by the cheaper of two)."""

from __future__ import annotations

import torch
from torch import Tensor

from assay.ops import grad_dot, grad_sqnorm
from assay.ops.sqnorm import gram_is_cheaper
from benchmarks.case import DEVICE, Case, Target, here

CPU = torch.device("cpu")
SHAPES = [  # (B, T, I, O)
    (8, 256, 384, 1152),  # a small GPT-2's attention
    (8, 256, 768, 3072),  # GPT-2's MLP, up
    (8, 256, 3072, 768),  # and down
    (64, 196, 27, 64),  # a convolution's patches
    (512, 1, 512, 512),  # a classifier's layer
]


def dot_eager(a: Tensor, g: Tensor, v: Tensor) -> Tensor:
    return ((a @ v.T) * g).sum((1, 2))


def gram_gemms(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    return a @ a.mT, g @ g.mT


def product_gemm(a: Tensor, g: Tensor) -> Tensor:
    return g.mT @ a


def sqnorm_eager(a: Tensor, g: Tensor) -> Tensor:
    return torch.bmm(g.mT, a).square().sum((1, 2))


def cases() -> list[Case]:
    return [on_cpu(*shape) for shape in SHAPES for on_cpu in (_dot_on_cpu, _sqnorm_on_cpu)]


def _dot_on_cpu(b: int, t: int, i: int, o: int) -> Case:
    return Case(
        op="grad_dot",
        shape=f"B={b} T={t} {i}→{o}",
        dtype=torch.float32,
        bytes=4 * b * t * (i + o),
        flops=2 * b * t * i * o,
        bound="gemm",
        make=lambda: _inputs(b, t, i, o, torch.float32, CPU),
        run=grad_dot,
        rivals={"ceiling": lambda a, g, v: a @ v.T, "eager": dot_eager},
        to_compile=dot_eager,
        ceiling="A Vᵀ",
    )


def _sqnorm_on_cpu(b: int, t: int, i: int, o: int) -> Case:
    gram = t == 1 or gram_is_cheaper(t, i, o)
    return Case(
        op="grad_sqnorm",
        shape=f"B={b} T={t} {i}→{o}",
        dtype=torch.float32,
        bytes=4 * b * t * (i + o),
        flops=2 * b * t * t * (i + o) if gram else 2 * b * t * i * o,
        bound="gemm",
        make=lambda: _inputs(b, t, i, o, torch.float32, CPU)[:2],
        run=grad_sqnorm,
        rivals={"ceiling": gram_gemms if gram else product_gemm, "eager": sqnorm_eager},
        to_compile=sqnorm_eager,
        ceiling="Gram GEMMs" if gram else "GᵀA",
    )


# ---- on a GPU -------------------------------------------------------------------------------------------------------

LAYERS = here([(8, 1024, 768, 3072), (8, 1024, 4096, 14_336)], [(2, 16, 24, 32)])  # GPT-2's and an 8B Llama's MLP, up
# ... where samples are long and layers narrow, the norm's product plan is the cheaper one.
LONG = here([(4, 8192, 768, 768), (2, 16_384, 768, 3072)], [(2, 64, 16, 16)])
COMPILED = LAYERS[:1]


def gpu_cases() -> list[Case]:
    both = (torch.bfloat16, torch.float32)
    dots = [_dot(*shape, dtype) for dtype in both for shape in LAYERS]
    return dots + [_sqnorm(*shape, dtype) for dtype in both for shape in LAYERS + LONG]


def _inputs(b: int, t: int, i: int, o: int, dtype: torch.dtype, device: torch.device = DEVICE) -> tuple[Tensor, ...]:
    return tuple(torch.randn(shape, device=device).to(dtype) for shape in ((b, t, i), (b, t, o), (o, i)))


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
    """The contract is for the plan whose GEMMs take torch less operations; the other plan's stand beside it."""
    gram, product = t * t * (i + o), 2 * t * i * o  # Gram matrices are symmetric: half of 2T²(I + O)
    plans = [("Gram GEMMs", gram_gemms), ("product GEMM", product_gemm)]
    (_, cheaper), (other, dearer) = plans if 2 * gram <= product else plans[::-1]
    return Case(
        op="grad_sqnorm",
        shape=f"B={b} T={t} {i}→{o}",
        dtype=dtype,
        bytes=dtype.itemsize * b * t * (i + o) + 4 * b,
        flops=b * min(gram, product),
        bound="gemm",
        make=lambda: _inputs(b, t, i, o, dtype)[:2],
        run=grad_sqnorm,
        rivals={"gemm": cheaper, other: dearer, "eager": sqnorm_eager},
        to_compile=sqnorm_eager if (b, t, i, o) in COMPILED else None,
        target=Target("gemm", 1.0),
    )
