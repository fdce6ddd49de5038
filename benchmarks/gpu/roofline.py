"""The roofline: arithmetic intensity against what was achieved, under the ceilings of the same run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.gpu.ceilings import Ceilings

COLOURS = {
    "ensemble_stats": "tab:blue",
    "linear_ensemble_stats": "tab:red",
    "head_scores": "tab:purple",
    "linear_cross_entropy": "tab:brown",
    "grad_dot": "tab:green",
    "grad_sqnorm": "tab:olive",
    "topk_scan": "tab:pink",
    "grad_sketch": "tab:orange",
    "project": "tab:cyan",
}
MARKERS = {"bfloat16": "o", "float16": "^", "float32": "s", "int8": "D"}

Case = Mapping[str, Any]


def draw(path: Path, facts: Mapping[str, Any], ceilings: Ceilings, cases: Sequence[Case]) -> None:
    """Left the roofline. Right the same cases one by one, by name, as a share of the roof above them."""
    if not cases:
        return
    figure, (roof, shares) = plt.subplots(
        1, 2, figsize=(18, max(7.0, 1.2 + 0.155 * len(cases))), width_ratios=(1.3, 1), layout="constrained"
    )
    figure.suptitle(f"{facts['device']}: kernels of assay at {facts['commit']}", fontsize=13)
    _roofline(roof, ceilings, cases)
    _shares(shares, cases)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _roofline(axes: Axes, ceilings: Ceilings, cases: Sequence[Case]) -> None:
    points = [(c["flops"] / c["bytes"], c["flops"] / c["median"] / 1e9) for c in cases]  # FLOP/byte, TFLOP/s
    low, high = min(x for x, _ in points) / 3, max(x for x, _ in points) * 3
    _ceilings(axes, ceilings, cases, low, high)
    labelled = set()
    for case, (x, y) in zip(cases, points, strict=True):
        label = f"{_op(case)}, {case['dtype']}"
        _marker(axes, case, x, y, None if label in labelled else label)
        labelled.add(label)
    axes.set(xscale="log", yscale="log", xlim=(low, high))
    axes.set_ylim(min(y for _, y in points) / 6, 2 * max(ceilings.gemm.values()))
    axes.set(xlabel="minimal FLOP ÷ minimal byte", ylabel="minimal FLOP ÷ time (TFLOP/s)")
    axes.grid(True, alpha=0.3)
    axes.legend(loc="lower right", fontsize=9)


def _ceilings(axes: Axes, ceilings: Ceilings, cases: Sequence[Case], low: float, high: float) -> None:
    """Bandwidth lines end at the highest GEMM line; of these, the ones of dtypes that the cases have."""
    gemm = {case["dtype"]: ceilings.gemm[case["dtype"]] for case in cases if case["dtype"] in ceilings.gemm}
    top = max(gemm.values())
    for name, rate, style, share in (("read", ceilings.read, "-", 0.2), ("copy", ceilings.copy, ":", 0.08)):
        axes.plot([low, 1e3 * top / rate], [low * rate / 1e3, top], style, color="black", linewidth=1)
        label = f"{name} {rate:,.0f} GB/s"
        spot = (share * 1e3 * top / rate, share * top)  # above the lines, where no case can be
        axes.annotate(label, spot, xytext=(-8, 0), textcoords="offset points", ha="right", va="center")
    for dtype, rate in gemm.items():
        axes.plot([max(low, 1e3 * rate / ceilings.read), high], [rate, rate], color="black", linewidth=1)
        label = f"GEMM {dtype} {rate:,.0f} TFLOP/s"
        axes.annotate(label, (high, rate), xytext=(-4, 4), textcoords="offset points", ha="right")


def _shares(axes: Axes, cases: Sequence[Case]) -> None:
    for i, case in enumerate(cases):
        axes.plot([0, case["fraction"]], [i, i], color=COLOURS[_op(case)], linewidth=0.8, alpha=0.5)
        _marker(axes, case, case["fraction"], i)
    names = [f"{case['op']}  {case['shape']}  {case['dtype']}  {i}" for i, case in enumerate(cases, 1)]
    axes.set_yticks(range(len(cases)), names, fontsize=7)
    axes.set_ylim(len(cases) - 0.3, -0.7)
    axes.axvline(1, color="black", linewidth=1)
    axes.set(xlim=(0, max(1.05, 1.05 * max(c["fraction"] for c in cases))), xlabel="achieved ÷ its ceiling")
    axes.grid(True, axis="x", alpha=0.3)


def _marker(axes: Axes, case: Case, x: float, y: float, label: str | None = None) -> None:
    style = {"color": COLOURS[_op(case)], "markersize": 6, "markeredgecolor": "white", "linestyle": ""}
    axes.plot(x, y, marker=MARKERS[case["dtype"]], zorder=3, label=label, **style)


def _op(case: Case) -> str:
    return str(case["op"]).partition(",")[0]
