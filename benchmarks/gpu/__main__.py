"""``python -m benchmarks.gpu``: ceilings, then every case; a table, JSON and a roofline figure."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import ceilings, peers, report
from benchmarks.gpu.case import DEVICE, REHEARSAL, Case, dtype_name
from benchmarks.gpu.stopwatch import Replay, buffers, interleave, peak_bytes
from benchmarks.kernels import ensemble, gradients, head, scan, sketch
from benchmarks.timing import RESULTS

SECONDS_PER_CASE = 0.5  # of rounds; compiling and filling buffers come on top
MEMORY_SHARE = 0.01  # of the logits' bytes: the contract of the ops that do not store them
LEAST_SECONDS = 3.0  # a case is not begun with less time than this left

Result = dict[str, Any]


def measure(case: Case, ceiling: ceilings.Ceilings) -> Result:
    """One case's JSON object."""
    inputs = buffers(case)
    variants, failed = prepare({"assay": case.run, **case.rivals}, inputs)
    timings, clock = interleave(variants, SECONDS_PER_CASE)
    own = timings.pop("assay")
    memory_bound = case.bound == "read"
    achieved = case.bytes / own.median / 1e6 if memory_bound else case.flops / own.median / 1e9
    limit = ceiling.read if memory_bound else ceiling.gemm[dtype_name(case.dtype)]
    result = {
        "op": case.op,
        "shape": case.shape,
        "dtype": dtype_name(case.dtype),
        **dataclasses.asdict(own),
        "bytes": case.bytes,
        "flops": case.flops,
        "bound": case.bound,
        "GB/s" if memory_bound else "TFLOP/s": achieved,
        "ceiling": limit,
        "fraction": achieved / limit,
        "ratios": {name: t.median / own.median for name, t in timings.items()},
        "rivals": {name: dataclasses.asdict(t) for name, t in timings.items()},
        "failed": failed,
        "with_launch_gaps": [name for name, variant in variants.items() if not variant.captured],
        "clock": clock,
    }
    if case.logits_bytes:
        result["peak_bytes"], result["logits_bytes"] = peak_bytes(lambda: case.run(*inputs[0])), case.logits_bytes
    if case.target:
        result["target"], result["met"] = case.target.verdict(result["fraction"], result["ratios"])
        result["met"] &= (result.get("peak_bytes") or 0) <= MEMORY_SHARE * case.logits_bytes
    return result


def prepare(
    functions: Mapping[str, Callable[..., Any]], inputs: list[tuple[Any, ...]]
) -> tuple[dict[str, Replay], dict[str, str]]:
    """What can be timed, and why the rest cannot. The op itself must."""
    pool = None if REHEARSAL else torch.cuda.graph_pool_handle()
    variants: dict[str, Replay] = {}
    failed: dict[str, str] = {}

    def attempt(name: str, function: Callable[..., Any]) -> None:
        try:
            variants[name] = Replay([lambda x=x: function(*x) for x in inputs], pool)
        except Exception as error:
            if name == "assay" or "CUDA error" in str(error):  # after which nothing more can run
                raise
            failed[name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"

    for name, function in functions.items():
        attempt(name, function)
    return variants, failed


def add_compiled(result: Result, case: Case) -> None:
    """torch.compile's time, measured beside the op's own in the same rounds."""
    torch._dynamo.reset()  # a shape is compiled for itself, not as the ninth of a kind
    variants, failed = prepare(
        {"assay": case.run, "compile": torch.compile(case.to_compile, dynamic=False)}, buffers(case)
    )
    result["failed"] |= failed
    if not failed:
        timings, _ = interleave(variants, SECONDS_PER_CASE)
        result["ratios"]["compile"] = timings["compile"].median / timings["assay"].median
        result["rivals"]["compile"] = dataclasses.asdict(timings["compile"])


def run(deadline: float, results: list[Result], problems: list[str], ceiling: ceilings.Ceilings) -> None:
    """All cases into ``results``; first everything without torch.compile, which takes what time is left."""
    ops = (ensemble, head, gradients, sketch, scan)
    cases = [case for op in ops for case in op.gpu_cases()]
    measured: list[tuple[Result, Case]] = []

    def attempt(case: Case, step: Callable[[], None]) -> None:
        try:
            step()
        except Exception as error:
            problems.append(f"{case.name}: {type(error).__name__}: {error}")
        if not REHEARSAL:
            torch.cuda.empty_cache()

    for i, case in enumerate(cases):
        if time.monotonic() > deadline - LEAST_SECONDS:
            problems += [f"{c.name}: not measured, out of time" for c in cases[i:]]
            return
        attempt(case, lambda case=case: measured.append((measure(case, ceiling), case)))
        results[:] = [result for result, _ in measured]
    for result, case in measured:
        if case.to_compile and time.monotonic() > deadline - 5 * LEAST_SECONDS:
            result["failed"]["compile"] = "not reached in the time given"
        elif case.to_compile:
            attempt(case, lambda result=result, case=case: add_compiled(result, case))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600, help="stop beginning new cases in time for this")
    arguments = parser.parse_args()
    folder = Path(os.environ.get("GPU_RESULTS") or RESULTS)
    if REHEARSAL and folder.resolve() == RESULTS.resolve():
        parser.error("a rehearsal measures nothing: set GPU_RESULTS to a directory outside the repository")
    if not REHEARSAL and not torch.cuda.is_available():
        parser.error("no CUDA device")
    deadline = time.monotonic() + arguments.seconds
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    torch.backends.cuda.matmul.allow_tf32 = False  # a float32 GEMM is one
    results: list[Result] = []
    problems: list[str] = []
    ceiling = ceilings.measure()
    try:
        run(deadline, results, problems, ceiling)
    finally:  # whatever happened, what was measured is kept
        facts = report.machine(DEVICE)
        report.write(folder, facts, ceiling, peers.versions(), results, problems)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
