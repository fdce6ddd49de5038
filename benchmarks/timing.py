"""Interleaved timing: what is compared runs in turn, in one process, so that a drifting machine drifts for all."""

from __future__ import annotations

import json
import platform
import random
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from assay._json import dumps
from benchmarks.case import Case, dtype_name

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Timing:
    """Milliseconds over the rounds."""

    median: float
    p20: float
    p80: float
    rounds: int


@dataclass(frozen=True)
class Ratio:
    """A variant's time ÷ another's in the same round: the median and the extremes of the rounds."""

    median: float
    least: float
    most: float


def interleave(variants: Mapping[str, Callable[[], Any]], *, rounds: int = 15, warmup: int = 2) -> dict[str, Timing]:
    """Time every variant once per round, after ``warmup`` uncounted rounds."""
    return {name: summary(values) for name, values in in_turn(variants, rounds=rounds, warmup=warmup).items()}


def in_turn(variants: Mapping[str, Callable[[], Any]], *, rounds: int, warmup: int) -> dict[str, list[float]]:
    """Milliseconds of every variant, round by round.

    Each round has an order of its own: whoever always came after the one that takes most memory would pay for it.
    """
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for i in range(warmup + rounds):
        order = list(variants.items())
        random.Random(i).shuffle(order)
        for name, run in order:
            # torch.compile's kernels bring an OpenMP runtime of their own, whose threads spin for a while after each
            # call; whoever comes next would pay for that.
            time.sleep(0.01)
            start = time.perf_counter()
            run()
            elapsed = time.perf_counter() - start
            if i >= warmup:
                samples[name].append(1e3 * elapsed)
    return samples


def ratio(values: Sequence[float], beside: Sequence[float]) -> Ratio:
    """Of two variants of ``in_turn``."""
    each = sorted(value / other for value, other in zip(values, beside, strict=True))
    return Ratio(statistics.median(each), each[0], each[-1])


def measure(case: Case) -> dict[str, Any]:
    """A case on the CPU, as a results file has it."""
    torch.manual_seed(0)
    inputs = case.make()
    runs = {"assay": case.run, **case.rivals}
    if case.to_compile:
        torch._dynamo.reset()  # a shape is compiled for itself, not as the ninth of a kind
        runs["compile"] = torch.compile(case.to_compile, dynamic=False)
    variants = {name: partial(run, *inputs) for name, run in runs.items()}
    return {
        "op": case.op,
        "shape": case.shape,
        "dtype": dtype_name(case.dtype),
        "bound": {"read": "memory", "gemm": "compute"}[case.bound],
        "ceiling": case.ceiling,
        "bytes": case.bytes,
        "flops": case.flops,
        "timings": interleave(variants, rounds=case.rounds, warmup=case.warmup),
        **({"absent": dict(case.absent)} if case.absent else {}),
    }


def summary(values: list[float]) -> Timing:
    """Median and quantiles of some milliseconds."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return Timing(statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)], len(ordered))


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    import assay

    try:
        model = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        model = None
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "processor": model.group(1) if model else platform.processor(),
        "threads": torch.get_num_threads(),
        "isa": assay.ops.build_info()["isa"],
        "torch": torch.__version__,
        "assay": assay.__version__,
        "commit": commit.stdout.strip(),
    }


def path(name: str) -> Path:
    """Where this machine's results of this name lie: ``results/<processor>-<name>.json``."""
    facts = machine()
    slug = re.sub(r"[^a-z0-9]+", "-", f"{facts['processor']}-{facts['threads']}-threads".lower()).strip("-")
    return RESULTS / f"{slug}-{name}.json"


def write(name: str, cases: list[dict[str, Any]]) -> Path:
    """Write them to ``path(name)``, with what they were measured on."""
    RESULTS.mkdir(exist_ok=True)
    written = path(name)
    written.write_text(dumps({"machine": machine(), "cases": cases}, indent=1, default=_plain) + "\n")
    return written


def read(path: Path) -> Any:
    """A file of results with the numbers that were written: JSON has no NaN and no infinities, they are texts there."""

    def numbers(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: numbers(item) for key, item in value.items()}
        if isinstance(value, list):
            return [numbers(item) for item in value]
        return float(value) if value in ("NaN", "Infinity", "-Infinity") else value

    return numbers(json.loads(path.read_text()))


def _plain(value: Any) -> Any:
    if isinstance(value, Timing | Ratio):
        return {k: round(v, 4) for k, v in asdict(value).items()}
    raise TypeError(f"{type(value).__name__} does not go into JSON")
