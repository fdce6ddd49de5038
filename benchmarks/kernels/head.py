"""``ops.linear_ensemble_stats`` and ``ops.head_scores``: bound by the output layers' GEMMs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import assay
from assay.ops import head_scores, linear_cross_entropy, linear_ensemble_stats
from benchmarks.case import DEVICE, Case, Target, here
from benchmarks.gpu import peers
from benchmarks.kernels.ensemble import formulas

ONE_SWEEP = ("nll", "mean_nll", "agreement", "expected_entropy", "vote_entropy")  # the mixture's take a second one
SKETCH = assay.Kronecker(16, 16)

Tensors = Sequence[Tensor]


CPU_ROWS, CPU_LAYER = 2048, (576, 49_152)  # SmolLM2-135M's output layer


def logits(hidden: Tensors, weight: Tensors) -> Tensor:
    return torch.stack([h @ w.T for h, w in zip(hidden, weight, strict=True)])


def one_sweep_formulas(z: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """The five fields that need no mixture, as one would write them for torch.compile."""
    z = z.float()
    log_p = z.log_softmax(-1)
    log_py = log_p[:, torch.arange(z.shape[1], device=z.device), y]
    votes = z.argmax(-1)
    share = (votes[:, None] == votes[None]).float().mean(1)
    return (
        math.log(z.shape[0]) - log_py.logsumexp(0),
        -log_py.mean(0),
        (votes == y).float().mean(0),
        -(log_p.exp() * log_p).sum(-1).mean(0),
        -share.log().mean(0),
    )


def scores_eager(hidden: Tensors, weight: Tensors, y: Tensor, directions: Tensors, projection: Tensor) -> Any:
    """Statistics, ⟨(p − y) hᵀ, V⟩, ‖(p − y) hᵀ‖² and P (p − y), with the logits and their gradient stored."""
    z = logits(hidden, weight)
    residual = z.float().softmax(-1)
    rows = torch.arange(len(y), device=y.device)
    residual[:, rows, y] -= 1
    dots = [((h @ v.T) * r).sum(1) for h, v, r in zip(hidden, directions, residual, strict=True)]
    norms = [r.square().sum(1) * h.float().square().sum(1) for h, r in zip(hidden, residual, strict=True)]
    return formulas(z, y), dots, norms, residual @ projection.T


def cases() -> list[Case]:
    """Two models on the CPU, against their GEMMs alone; eager's tensors of the logits' size would not all fit."""
    return [
        _on_cpu("linear_ensemble_stats", lambda h, w, y, v, _: linear_ensemble_stats(h, w, y), 1),
        _on_cpu("head_scores", lambda h, w, y, v, _: head_scores(h, w, y, directions=v, sketch=SKETCH), 2),
    ]


def _on_cpu(op: str, run: Callable[..., Any], products: int) -> Case:
    """``products``: GEMMs per model, with the weight and with the directions."""
    (d, c), k = CPU_LAYER, 2

    def make() -> tuple[Tensor, ...]:
        hidden, weight = torch.randn(k, CPU_ROWS, d), torch.randn(k, c, d) * 3 / d**0.5
        return hidden, weight, torch.randint(c, (CPU_ROWS,)), torch.randn(k, c, d), torch.empty(CPU_ROWS, c)

    def gemms(hidden: Tensor, weight: Tensor, y: Tensor, directions: Tensor, product: Tensor) -> None:
        for matrix in (weight, directions)[:products]:
            for h, w in zip(hidden, matrix, strict=True):
                torch.mm(h, w.T, out=product)

    return Case(
        op=op,
        shape=f"K={k} N={CPU_ROWS} D={d} C={c}",
        dtype=torch.float32,
        bytes=4 * k * d * (CPU_ROWS + c),
        flops=2 * k * CPU_ROWS * d * c * products,
        bound="gemm",
        make=make,
        run=run,
        rivals={"ceiling": gemms},
        ceiling="its GEMMs",
        rounds=5,
        warmup=1,
    )


# ---- on a GPU -------------------------------------------------------------------------------------------------------

ROWS = here(8192, 32)
WIDTHS = here((576, 2048, 4096), (24,))
VOCABULARIES = here((49_152, 128_256), (300,))  # SmolLM2, Llama 3
# Layers where eager's many tensors of the logits' size get their turn, and what is compiled (seconds per shape).
STORED = here({(576, 49_152), (2048, 128_256)}, {(24, 300)})
COMPILED = here({(2, 576, 49_152)}, {(2, 24, 300)})


def gpu_cases() -> list[Case]:
    cases = []
    for c in VOCABULARIES:
        for d in WIDTHS:
            cases += [_stats(1, d, c, None), _stats(2, d, c, ONE_SWEEP), _stats(2, d, c, None)]
    cases.append(_stats(2, WIDTHS[0], VOCABULARIES[0], ONE_SWEEP, torch.float32))
    cases += [case(d, c) for d, c in sorted(STORED) for case in (_loss_alone, _loss_and_gradient)]
    return cases + [_scores(k, d, c) for k in (1, 2) for d, c in sorted(STORED)]


def _inputs(k: int, d: int, c: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Hidden states as after a norm; weights that give logits of standard deviation 3."""
    hidden = [torch.randn(ROWS, d, device=DEVICE).to(dtype) for _ in range(k)]
    weight = [torch.empty(c, d, dtype=dtype, device=DEVICE).normal_(std=3 / d**0.5) for _ in range(k)]
    return hidden, weight, torch.randint(c, (ROWS,), device=DEVICE)


def _stats(k: int, d: int, c: int, fields: Sequence[str] | None, dtype: torch.dtype = torch.bfloat16) -> Case:
    eager = formulas if fields is None else one_sweep_formulas

    def stored(hidden: Tensors, weight: Tensors, y: Tensor) -> Any:
        return eager(logits(hidden, weight), y)

    rivals = {"gemm": lambda hidden, weight, y: [h @ w.T for h, w in zip(hidden, weight, strict=True)]}
    if (d, c) in STORED:
        rivals["eager"] = stored
    one_sweep = k == 1 or fields is not None
    return Case(
        op=f"linear_ensemble_stats, {'one sweep' if one_sweep else 'all fields'}",
        shape=f"K={k} N={ROWS} D={d} C={c}",
        dtype=dtype,
        bytes=dtype.itemsize * k * d * (ROWS + c) + ROWS * (8 + 4 * 11),
        flops=2 * k * ROWS * d * c,  # the second sweep's GEMMs are the op's own affair
        bound="gemm",
        make=lambda: _inputs(k, d, c, dtype),
        run=lambda hidden, weight, y: linear_ensemble_stats(hidden, weight, y, fields=fields),
        rivals=rivals,
        to_compile=stored if (k, d, c) in COMPILED and dtype == torch.bfloat16 else None,
        target=Target("gemm", 1.10 if one_sweep else 2.10),
        logits_bytes=dtype.itemsize * k * ROWS * c,
    )


def _loss_alone(d: int, c: int) -> Case:
    """One model's loss, which is what other projects have kernels for."""

    def stored(hidden: Tensors, weight: Tensors, y: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(hidden[0] @ weight[0].T, y, reduction="none")

    case = _stats(1, d, c, ("nll",))
    rivals = {"gemm": case.rivals["gemm"], "eager": stored, **peers.linear_cross_entropy()}
    return replace(case, op="linear_ensemble_stats, nll alone", rivals=rivals, to_compile=None)


def _loss_and_gradient(d: int, c: int) -> Case:
    """What a language model's scoring runs: each position's loss, and its gradient in the hidden state."""
    dtype = torch.bfloat16

    def make() -> tuple[Tensor, Tensor, Tensor]:
        (hidden,), (weight,), y = _inputs(1, d, c, dtype)
        return hidden.requires_grad_(), weight, y

    def gemms(hidden: Tensor, weight: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            return (hidden @ weight.T) @ weight

    def eager(hidden: Tensor, weight: Tensor, y: Tensor) -> Tensor:
        loss = torch.nn.functional.cross_entropy((hidden @ weight.T).float(), y, reduction="sum")
        return torch.autograd.grad(loss, hidden)[0]

    def fused(hidden: Tensor, weight: Tensor, y: Tensor) -> Tensor:
        return torch.autograd.grad(linear_cross_entropy(hidden, weight, y).sum(), hidden)[0]

    return Case(
        op="linear_cross_entropy, with its gradient",
        shape=f"N={ROWS} D={d} C={c}",
        dtype=dtype,
        bytes=dtype.itemsize * d * (2 * ROWS + c) + ROWS * (8 + 4),
        flops=2 * 2 * ROWS * d * c,  # the logits' second product is the op's own affair
        bound="gemm",
        make=make,
        run=fused,
        rivals={"gemm": gemms, "eager": eager},
    )


def _scores(k: int, d: int, c: int) -> Case:
    dtype = torch.bfloat16

    def make() -> tuple[Any, ...]:
        hidden, weight, y = _inputs(k, d, c, dtype)
        directions = [torch.randn(c, d, device=DEVICE).to(dtype) for _ in range(k)]
        return hidden, weight, y, directions, SKETCH.output_side(c, DEVICE)  # the last only for eager

    def gemms(hidden: Tensors, weight: Tensors, y: Tensor, directions: Tensors, projection: Tensor) -> Any:
        return [(h @ w.T, h @ v.T) for h, w, v in zip(hidden, weight, directions, strict=True)]

    return Case(
        op="head_scores, a direction and a sketch",
        shape=f"K={k} N={ROWS} D={d} C={c}",
        dtype=dtype,
        bytes=dtype.itemsize * k * d * (ROWS + 2 * c) + ROWS * (8 + 4 * 11 + 4 * k * (2 + 16 + 16)),
        flops=2 * 2 * k * ROWS * d * c,
        bound="gemm",
        make=make,
        run=lambda hidden, weight, y, directions, _: head_scores(
            hidden, weight, y, directions=directions, sketch=SKETCH
        ),
        rivals={"gemm": gemms, "eager": scores_eager},
        target=Target("gemm", 1.15),
        logits_bytes=dtype.itemsize * k * ROWS * c,
    )
