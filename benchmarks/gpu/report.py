"""A run as a table, as JSON and as a roofline."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import assay
from benchmarks.gpu.case import REHEARSAL
from benchmarks.gpu.ceilings import Ceilings

HEADINGS = ("#", "op", "shape", "dtype", "MB", "GFLOP", "ms (p20–p80)", "achieved", "÷ ceiling", "rivals ÷ assay")
HEADINGS += ("memory ÷ logits (≤ 1 %)", "target", "")


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers were measured on."""
    import triton

    commit = os.environ.get("GPU_COMMIT") or _output("git", "rev-parse", "--short", "HEAD") or "unknown"
    facts = {"commit": commit, "assay": assay.__version__, "torch": torch.__version__, "triton": triton.__version__}
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


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def write(
    folder: Path,
    facts: Mapping[str, Any],
    ceilings: Ceilings,
    peers: Mapping[str, str],
    cases: Sequence[dict[str, Any]],
    problems: Sequence[str],
) -> None:
    """``<device>-kernels.json``, ``<device>-kernels.md`` (also printed) and ``<device>-roofline.png`` in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    slug = re.sub(r"[^a-z0-9]+", "-", facts["device"].lower()).strip("-")
    document = {
        "machine": facts,
        "ceilings": dataclasses.asdict(ceilings),
        "peers": peers,
        "problems": problems,
        "cases": cases,
    }
    (folder / f"{slug}-kernels.json").write_text(
        json.dumps(document, indent=1, ensure_ascii=False, default=list) + "\n"
    )
    text = markdown(facts, ceilings, peers, cases, problems)
    (folder / f"{slug}-kernels.md").write_text(text)
    print(text)
    try:
        from benchmarks.gpu.roofline import draw
    except ModuleNotFoundError as error:
        print(f"no roofline figure: {error.name} is not installed")
    else:
        draw(folder / f"{slug}-roofline.png", facts, ceilings, cases)
    print("written to", folder)


def markdown(
    facts: Mapping[str, Any],
    ceilings: Ceilings,
    peers: Mapping[str, str],
    cases: Sequence[dict[str, Any]],
    problems: Sequence[str],
) -> str:
    gemm = ", ".join(f"{dtype} {rate:.0f}" for dtype, rate in ceilings.gemm.items())
    lines = [
        f"# Kernels on {facts['device']}",
        "",
        f"torch {facts['torch']}, triton {facts['triton']}, driver {facts.get('driver')}, assay at {facts['commit']}.",
        f"Ceilings, measured in the same run: read {ceilings.read:.0f} GB/s, copy {ceilings.copy:.0f} GB/s, "
        f"GEMM {gemm} TFLOP/s.",
        f"Peers: {', '.join(f'{name} {version}' for name, version in peers.items())}.",
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
        f"{case['fraction']:.1%}",
        "; ".join(rivals).replace("|", "\\|"),
        f"{peak / case['logits_bytes']:.2%}" if peak else "",
        case.get("target", ""),
        {True: "met", False: "**not met**", None: ""}[case.get("met")],
    ]
