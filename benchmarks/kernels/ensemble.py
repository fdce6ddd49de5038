"""``ops.ensemble_stats``: bound by reading the logits once."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from assay.ops import ensemble_stats
from benchmarks.timing import interleave

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


def cases() -> list[dict[str, Any]]:
    torch.manual_seed(0)
    out = []
    for k, n, c in SHAPES:
        torch._dynamo.reset()  # a shape is compiled for itself, not as the ninth of a kind
        compiled = torch.compile(formulas, dynamic=False)
        y = torch.randint(c, (n,))
        logits = 3 * torch.randn(k, n, c)
        for dtype in (torch.float32, torch.bfloat16):
            z = logits.to(dtype)
            timings = interleave(
                {
                    "assay": lambda z=z, y=y: ensemble_stats(z, y),
                    "ceiling": lambda z=logits: z.sum(),
                    "eager": lambda z=z, y=y: formulas(z, y),
                    "compile": lambda z=z, y=y, f=compiled: f(z, y),
                },
                rounds=9,
            )
            out.append(
                {
                    "op": "ensemble_stats",
                    "shape": f"K={k} N={n} C={c}",
                    "dtype": str(dtype).removeprefix("torch."),
                    "bound": "memory",
                    "ceiling": "float32 sum",
                    "bytes": z.numel() * z.element_size(),
                    "flops": 0,
                    "timings": timings,
                }
            )
    return out
