"""``ops.ensemble_stats``: bound by reading the logits once."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from assay.ops import ensemble_stats
from benchmarks.case import DEVICE, Case, Target, here
from benchmarks.gpu import peers

SHAPES = [  # (K, N, C): who has such logits
    (4, 512, 32_000),  # a few small language models
    (2, 64, 128_256),  # Llama 3's vocabulary
    (1, 512, 32_000),  # one model
    (5, 4_000, 1_000),  # ImageNet classifiers
    (8, 20_000, 100),  # CIFAR-100 classifiers
    (8, 100_000, 10),  # ten classes
]


def formulas(z: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """All eleven fields as one would write them for torch.compile: one gather, no one-hot, no loop over models."""
    z = z.float()
    k, n, _ = z.shape
    log_p = z.log_softmax(-1)
    p = log_p.exp()
    mix = p.mean(0)
    log_mix = mix.clamp(min=1e-38).log()
    rows = torch.arange(n, device=z.device)
    log_py = log_p[:, rows, y]
    py = mix[rows, y]
    others = mix.scatter(1, y[:, None], 0.0)
    votes = z.argmax(-1)
    share = (votes[:, None] == votes[None]).float().mean(1)
    entropy = -(mix * log_mix).sum(-1)
    expected = -(p * log_p).sum(-1).mean(0)
    confidence, prediction = mix.max(-1)
    return (
        math.log(k) - log_py.logsumexp(0),
        -log_py.mean(0),
        py - others.amax(-1),
        (votes == y).float().mean(0),
        (others.square().sum(-1) + (1 - py).square()).sqrt(),
        entropy,
        expected,
        entropy - expected,
        confidence,
        -share.log().mean(0),
        prediction,
    )


def cases() -> list[Case]:
    return [_on_cpu(k, n, c, dtype) for k, n, c in SHAPES for dtype in (torch.float32, torch.bfloat16)]


def _on_cpu(k: int, n: int, c: int, dtype: torch.dtype) -> Case:
    def make() -> tuple[Tensor, Tensor, Tensor]:
        logits = 3 * torch.randn(k, n, c)
        return logits.to(dtype), torch.randint(c, (n,)), logits

    return Case(
        op="ensemble_stats",
        shape=f"K={k} N={n} C={c}",
        dtype=dtype,
        bytes=k * n * c * dtype.itemsize,
        flops=0,
        bound="read",
        make=make,
        run=lambda z, y, _: ensemble_stats(z, y),
        rivals={"ceiling": lambda z, y, logits: logits.sum(), "eager": lambda z, y, _: formulas(z, y)},
        to_compile=lambda z, y, _: formulas(z, y),
        ceiling="float32 sum",
        rounds=9,
    )


# ---- on a GPU -------------------------------------------------------------------------------------------------------

LOGITS = here(1 << 29, 1 << 14)  # per case: about 0.3 ms of a fast card's memory, several times its L2
VOCABULARIES = here((32_000, 128_256, 151_936, 262_144), (999,))  # Llama 2, Llama 3, Qwen, Gemma
CLASSES = here((10, 100, 1000), (10,))
COMPILED = {(5, 128_256), (8, 100)}  # compiling costs seconds per shape
# Per logit: maximum, difference, exponential, three sums of which two weighted, the mixture and its logarithm's share.
# Nominal: it places these kernels on the roofline, and no ceiling is derived from it.
OPERATIONS = 10


def gpu_cases() -> list[Case]:
    both = (torch.bfloat16, torch.float32)
    wide = [_all_fields(k, c, dtype, 0.90) for dtype in both for c in VOCABULARIES for k in (1, 5, 8)]
    narrow = [_all_fields(5, c, dtype, 0.80 if c <= 100 else 0.90) for dtype in both for c in CLASSES]
    return wide + narrow + [_loss_alone(c) for c in VOCABULARIES]


def _inputs(k: int, n: int, c: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits as language models have them: standard deviation 3, the label raised in most rows."""
    y = torch.randint(c, (n,), device=DEVICE)
    z = torch.empty(k, n, c, dtype=dtype, device=DEVICE).normal_(std=3)
    raised = (9 + 3 * torch.randn(k, n, 1, device=DEVICE)).to(dtype)
    return z.scatter_(2, y[None, :, None].expand(k, n, 1), raised), y


def _all_fields(k: int, c: int, dtype: torch.dtype, share_of_read: float) -> Case:
    n = max(8, LOGITS // (k * c))
    return Case(
        op="ensemble_stats",
        shape=f"K={k} N={n} C={c}",
        dtype=dtype,
        bytes=n * (k * c * dtype.itemsize + 8 + 10 * 4 + 8),  # logits, label, ten fields and the prediction
        flops=OPERATIONS * k * n * c,
        bound="read",
        make=lambda: _inputs(k, n, c, dtype),
        run=ensemble_stats,
        rivals={"eager": formulas},
        to_compile=formulas if (k, c) in COMPILED and dtype == torch.bfloat16 else None,
        target=Target("read", share_of_read),
    )


def _loss_alone(c: int) -> Case:
    """One model's loss, which is what other projects have kernels for."""
    n, dtype = max(8, LOGITS // c), torch.bfloat16
    return Case(
        op="ensemble_stats, nll alone",
        shape=f"K=1 N={n} C={c}",
        dtype=dtype,
        bytes=n * (c * dtype.itemsize + 8 + 4),
        flops=4 * n * c,  # maximum, difference, exponential, sum; nominal
        bound="read",
        make=lambda: _inputs(1, n, c, dtype),
        run=lambda z, y: ensemble_stats(z, y, fields=["nll"]),
        rivals={
            "eager": lambda z, y: torch.nn.functional.cross_entropy(z[0], y, reduction="none"),
            **peers.cross_entropy(),
        },
        target=Target("read", 0.90),
    )
