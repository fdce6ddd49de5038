"""What the GPU tests share: the yardstick, inputs that catch what randn does not, CUDA graphs, memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

import assay
from assay.ops import ensemble
from assay.ops.ensemble import FIELDS, EnsembleStats
from tests.gpu.settings import REHEARSAL

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FLOAT_FIELDS = FIELDS[:-1]
TOLERANCE = 2e-6  # of the numeric contract in docs/architecture.md
GIB = 1 << 30

# The kind of GPU kernel each op has. Tests force it: "auto" would fall back to the reference and pass.
KERNELS = {
    "ensemble_stats": "cuda",
    "linear_ensemble_stats": "triton",
    "head_scores": "triton",
    "linear_cross_entropy": "triton",
    "grad_dot": "triton",
    "grad_sqnorm": "triton",
    "topk_scan": "triton",
    "scan_scores": "triton",
    "grad_sketch": "triton",
    "project": "triton",
}

T = TypeVar("T")


def here(full: T, rehearsal: T) -> T:
    """What a GPU gets, or what a rehearsal has time for."""
    return rehearsal if REHEARSAL else full


def backend(op: str) -> Any:
    """The context in which ``op`` runs its GPU kernel or raises."""
    return assay.backend("auto" if REHEARSAL else KERNELS[op])


def kernel(op: str) -> Callable[..., Any]:
    """``assay.ops.<op>``, forced onto its GPU kernel."""

    def run(*args: Any, **options: Any) -> Any:
        with backend(op):
            return getattr(assay.ops, op)(*args, **options)

    return run


# ---- inputs ---------------------------------------------------------------------------------------------------------


def distributions(n: int, c: int, device: torch.device) -> dict[str, Tensor]:
    """Rows of logits by name, each (n, c) float32."""
    base = torch.randn(n, c, device=device)
    peaks = torch.randint(c, (n,), device=device)
    peaked = torch.full((n, c), -20.0, device=device).scatter(1, peaks[:, None], 20.0)
    scattered = base.clone()
    scattered[:, 1::2] = -math.inf
    onehot = torch.full((n, c), -math.inf, device=device).scatter(1, peaks[:, None], 0.0)
    last = torch.full((n, c), -math.inf, device=device)
    last[:, -1] = 1.0  # whole blocks of −inf before the only possible class
    low_and_peaked = peaked - 200  # far below the 0 that a column padded without a mask would have
    return {
        "randn": base,
        "5 randn": 5 * base,
        "peaked": peaked,
        "low and peaked": low_and_peaked,
        "offset up": base + 1e4,
        "offset down": base - 1e4,
        "flat": torch.zeros(n, c, device=device),
        "tied": (2 * base).round(),
        "scattered -inf": scattered,
        "blocks of -inf": last,
        "one-hot": onehot,
        "lognormal": base.exp(),
        "cauchy": base / torch.randn(n, c, device=device),
        "subnormal probabilities": torch.linspace(-103, 0, c, device=device).repeat(n, 1),
    }


def unaligned(x: Tensor) -> Tensor:
    """The same values one element past an allocation's start: no vector load is aligned."""
    storage = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
    return storage[1:].view(x.shape).copy_(x)


def needs_memory(gib: float) -> None:
    """Skip where the GPU has not this much left."""
    if REHEARSAL:
        return
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / GIB
    if free < gib:
        pytest.skip(f"needs {gib:.0f} GiB of GPU memory, {free:.0f} are free")


# ---- the yardstick --------------------------------------------------------------------------------------------------


def assert_within(value: Tensor, exact: Tensor, plain: Tensor, scale: Tensor | float, what: str) -> None:
    """|value − exact| ≤ max(|plain torch in the same dtype − exact|, 2e-6 · scale) everywhere, NaN where exact is."""
    assert value.dtype == torch.float32, f"{what}: results are float32, got {value.dtype}"
    assert value.shape == exact.shape, f"{what}: shape {tuple(value.shape)}, expected {tuple(exact.shape)}"
    value = value.double()
    same = (value == exact) | (value.isnan() & exact.isnan())  # covers infinities
    error = (value - exact).abs().masked_fill(same, 0)  # NaN in only one of them stays NaN
    noise = (plain.double() - exact).abs().nan_to_num(0, 0, 0)
    allowed = torch.maximum(noise, torch.as_tensor(TOLERANCE * scale, device=noise.device).expand_as(noise))
    good = error <= allowed
    if not bool(good.all()):
        where = tuple(int(i) for i in (~good).nonzero()[0])
        raise AssertionError(
            f"{what}: {int((~good).sum())} of {good.numel()} wrong, first at {where}: {value[where].item()}, "
            f"exact {exact[where].item()}, allowed error {allowed[where].item():.3g}"
        )


def shares(weights: Sequence[float] | None, k: int) -> list[float]:
    values = [1.0] * k if weights is None else list(weights)
    return [w / math.fsum(values) for w in values]


def assert_stats(
    got: EnsembleStats,
    logits: Sequence[Tensor],
    labels: Tensor | None = None,
    weights: Sequence[float] | None = None,
    *,
    plain: Sequence[Tensor] | None = None,
    rounding: Tensor | None = None,
    what: str = "",
) -> None:
    """Every field of ``got`` against float64 on the same logits, K × (N, C).

    ``plain``: the logits as torch in the same dtype has them, where that differs from exact. ``rounding``: (N,), the
    magnitude that the logits' own float32 sums round at; votes between classes closer than that may fall either way.
    """
    n = logits[0].shape[0]
    share = shares(weights, len(logits))
    wide = [z.double() for z in logits]
    exact, _ = ensemble.reference(wide, labels, share)
    torch32, _ = ensemble.reference([z.float() for z in plain or logits], labels, share)
    scale = exact.abs().nan_to_num(1, 1, 1).clamp(min=1)
    decided = torch.ones(n, dtype=torch.bool, device=exact.device)
    if rounding is not None:
        scale = torch.maximum(scale, rounding.expand_as(scale))
        for z in wide:
            if z.shape[1] > 1:
                top = z.topk(2).values
                decided &= top[:, 0] - top[:, 1] > 2 * TOLERANCE * rounding
    for i, field in enumerate(FLOAT_FIELDS):
        value = getattr(got, field)
        if value is None:
            continue
        rows = decided if field in ("agreement", "vote_entropy") else slice(None)
        assert_within(value[rows], exact[i][rows], torch32[i][rows], scale[i][rows], f"{what}, {field}")
    if got.prediction is not None and n:
        _assert_prediction(got.prediction, wide, share, exact[FIELDS.index("confidence")], scale[0], what)


def _assert_prediction(
    prediction: Tensor, wide: Sequence[Tensor], share: Sequence[float], confidence: Tensor, scale: Tensor, what: str
) -> None:
    """The predicted class is as probable as the most probable one."""
    assert prediction.dtype == torch.int64
    mix = sum(w * z.softmax(-1) for w, z in zip(share, wide, strict=True))
    assert isinstance(mix, Tensor)
    defined = ~confidence.isnan()
    assert bool((prediction[~defined] == -1).all()), f"{what}, prediction: an undefined row has a class"
    found = mix.gather(1, prediction.clamp(min=0)[:, None])[:, 0]
    good = (found >= confidence - TOLERANCE * scale) & (prediction >= 0)
    assert bool(good[defined].all()), f"{what}, prediction: not the most probable class in rows {(~good).nonzero()}"


def assert_same(a: Any, b: Any, what: str) -> None:
    """The same bits, for tensors and for dataclasses of tensors."""
    if a is None or isinstance(a, Tensor):
        same = a is b is None or (a is not None and b is not None and torch.equal(_bits(a), _bits(b)))
        assert same, f"{what}: other bits"
        return
    for name in vars(a):
        assert_same(getattr(a, name), getattr(b, name), f"{what}, {name}")


def assert_close(a: Any, b: Any, what: str) -> None:
    """Equal to float32 rounding, where another layout may mean another order of summation."""
    if isinstance(a, Tensor):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, equal_nan=True, msg=lambda text: f"{what}: {text}")
        return
    for name in vars(a):
        if getattr(b, name) is not None:
            assert_close(getattr(a, name), getattr(b, name), f"{what}, {name}")


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32) if x.dtype == torch.float32 else x  # NaN equals itself only as bits


def row(result: Any, i: int) -> Any:
    """Row i of a result, kept as a batch of one. Statistics are (N,), head scores (K, N, …)."""
    if result is None:
        return None
    if isinstance(result, Tensor):
        return result[i : i + 1] if result.dim() == 1 else result[:, i : i + 1]
    return type(result)(**{name: row(value, i) for name, value in vars(result).items()})


# ---- CUDA -----------------------------------------------------------------------------------------------------------


def capture(run: Callable[[], T]) -> tuple[Callable[[], None], T]:
    """``run`` as a CUDA graph: a function that replays it, and the result that each replay writes."""
    if REHEARSAL:
        result = run()

        def again() -> None:
            _copy_into(result, run())

        return again, result
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()  # compiles kernels and opens libraries, which a capture must not
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph.replay, result


def _copy_into(old: Any, new: Any) -> None:
    if isinstance(old, Tensor):
        old.copy_(new)
    elif old is not None:
        for name in vars(old):
            _copy_into(getattr(old, name), getattr(new, name))


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most GPU memory that ``run`` held at a time, its results included."""
    if REHEARSAL:
        run()
        return 1
    run()  # what stays (libraries, workspaces) is not the op's
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
