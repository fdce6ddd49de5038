"""A run as a table, as JSON and as a roofline."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from assay._json import dumps
from benchmarks.case import REHEARSAL, Target
from benchmarks.gpu.ceilings import Ceilings

HEADINGS = ("#", "op", "shape", "dtype", "MB", "GFLOP", "ms (p20–p80)", "achieved", "÷ ceiling", "rivals ÷ assay")
HEADINGS += ("memory ÷ logits (≤ 1 %)", "target", "")
MEMORY_SHARE = 0.01  # of the logits' bytes: the contract of the ops that do not store them


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers were measured on."""
    import triton

    import assay

    facts = {"commit": commit(), "assay": assay.__version__, "torch": torch.__version__, "triton": triton.__version__}
    if REHEARSAL:
        return {"device": "rehearsal on a CPU: no measurements", **facts}
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0],
        "cuda": torch.version.cuda,
        **facts,
    }


def commit() -> str:
    """GPU_COMMIT, or git's word: a copy of a working tree may hold more than its last commit."""
    head = _output("git", "rev-parse", "--short", "HEAD") or "unknown"
    changed = ", with changes" if _output("git", "status", "--porcelain", "--untracked-files=no") else ""
    return os.environ.get("GPU_COMMIT") or head + changed


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def judged(result: Mapping[str, Any], ceiling: Ceilings | None) -> dict[str, Any]:
    """A case's measurement beside the card's ceilings, where these were measured, and DESIGN's contract."""
    memory_bound = result["bound"] == "read"
    work, unit = (result["bytes"] / 1e6, "GB/s") if memory_bound else (result["flops"] / 1e9, "TFLOP/s")
    achieved = work / result["median"]
    limit = (ceiling.read if memory_bound else ceiling.gemm.get(result["dtype"])) if ceiling else None
    case = {**result, unit: achieved, "ceiling": limit, "fraction": achieved / limit if limit else None}
    target = Target(**result["contract"]) if result.get("contract") else None
    if target and (target.of == "gemm" or limit):
        case["target"], case["met"] = target.verdict(case["fraction"] or 0.0, result["ratios"])
        case["met"] &= (result.get("peak_bytes") or 0) <= MEMORY_SHARE * result.get("logits_bytes", 0)
    return case


def slug(facts: Mapping[str, Any]) -> str:
    """A device's name in files' names."""
    return re.sub(r"[^a-z0-9]+", "-", str(facts["device"]).lower()).strip("-")


def write(
    folder: Path,
    facts: Mapping[str, Any],
    ceilings: Ceilings | None,
    cases: Sequence[dict[str, Any]],
    problems: Sequence[str],
    baseline: Sequence[dict[str, Any]] = (),
) -> list[Path]:
    """``<device>-kernels.json``, ``<device>-kernels.md`` and ``<device>-roofline.png`` in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    document = {
        "machine": facts,
        "ceilings": dataclasses.asdict(ceilings) if ceilings else None,
        "problems": problems,
        "cases": cases,
        "baseline": baseline,
    }
    paths = [folder / f"{slug(facts)}-kernels.json", folder / f"{slug(facts)}-kernels.md"]
    paths[0].write_text(dumps(document, indent=1, ensure_ascii=False, default=list) + "\n")
    paths[1].write_text(markdown(facts, ceilings, cases, problems))
    if not ceilings or not cases:
        return paths  # no roof to draw
    try:
        from benchmarks.gpu.roofline import draw
    except ModuleNotFoundError as error:
        print(f"no roofline figure: {error.name} is not installed")
        return paths
    paths.append(folder / f"{slug(facts)}-roofline.png")
    draw(paths[-1], facts, ceilings, cases)
    return paths


def markdown(
    facts: Mapping[str, Any],
    ceilings: Ceilings | None,
    cases: Sequence[dict[str, Any]],
    problems: Sequence[str],
) -> str:
    lines = [
        f"# Kernels on {facts['device']}",
        "",
        f"torch {facts['torch']}, triton {facts['triton']}, driver {facts.get('driver')}, assay at {facts['commit']}.",
        f"Ceilings, measured in the same run: {roofs(ceilings)}.",
        f"Peers: {', '.join(f'{name} {version}' for name, version in facts.get('peers', {}).items())}.",
        "Medians of interleaved CUDA-graph replays over rotating buffers; * was timed with its launch gaps.",
        "",
        "| " + " | ".join(HEADINGS) + " |",
        "|" + "---|" * len(HEADINGS),
    ]
    lines += ["| " + " | ".join(_cells(i, case)) + " |" for i, case in enumerate(cases, 1)]
    decided = [case["met"] for case in cases if "met" in case]
    lines += ["", f"Targets: {sum(decided)} of {len(decided)} met."]
    lines += ["", "Problems:", *(f"- {p}" for p in problems)] if problems else []
    return "\n".join(lines) + "\n"


def roofs(ceilings: Ceilings | None) -> str:
    if not ceilings:
        return "none, they failed"
    gemm = ", ".join(f"{dtype} {rate:.0f}" for dtype, rate in ceilings.gemm.items())
    return f"read {ceilings.read:.0f} GB/s, copy {ceilings.copy:.0f} GB/s, GEMM {gemm} TFLOP/s"


def _cells(number: int, case: Mapping[str, Any]) -> list[str]:
    unit = "GB/s" if case["bound"] == "read" else "TFLOP/s"
    gaps = case["with_launch_gaps"]
    rivals = [f"{name}{'*' if name in gaps else ''} {ratio:.2f}" for name, ratio in case["ratios"].items()]
    rivals += [f"{name}: {error}" for name, error in case["failed"].items()]
    peak = case.get("peak_bytes")
    return [
        str(number),
        case["op"],
        case["shape"],
        case["dtype"],
        f"{case['bytes'] / 1e6:,.0f}",
        f"{case['flops'] / 1e9:,.1f}",
        f"{case['median']:.3f} ({case['p20']:.3f}–{case['p80']:.3f}){'*' if 'assay' in gaps else ''}",
        f"{case[unit]:,.{0 if case[unit] >= 100 else 2}f} {unit}",
        f"{case['fraction']:.1%}" if case["fraction"] else "",
        "; ".join(rivals).replace("|", "\\|"),
        f"{peak / case['logits_bytes']:.2%}" if peak else "",
        case.get("target", ""),
        {True: "met", False: "**not met**", None: ""}[case.get("met")],
    ]
