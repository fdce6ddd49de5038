"""One case measured on the card: its op beside its rivals, in the same rounds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks.case import REHEARSAL, Case, dtype_name
from benchmarks.gpu.stopwatch import Replay, buffers, interleave, peak_bytes
from benchmarks.kernels import ensemble, gradients, head, scan, sketch

SECONDS = {1: 0.25, 2: 0.5}  # of rounds, by tier; compiling and filling buffers come on top

Result = dict[str, Any]


def settle() -> None:
    """Before the first measurement of a process."""
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False  # a float32 GEMM is one


def cases() -> list[Case]:
    return [case for op in (ensemble, head, gradients, sketch, scan) for case in op.gpu_cases()]


def op_of(case: Case) -> str:
    """The function that a case calls: what follows a comma says how."""
    return case.op.partition(",")[0]


def in_contract(case: Case) -> bool:
    """Tier 1, in the types that models have: what DESIGN sets a target for, and every language model's own loss, for
    which it sets none. All else waits for tier 2."""
    return case.dtype != torch.float32 and (case.target is not None or op_of(case) == "linear_cross_entropy")


def measure(case: Case, tier: int) -> Result:
    """Tier 1: beside the GEMMs alone. Tier 2: beside every rival, and torch.compile. What a case is worth beside the
    card's ceilings, report.py says."""
    torch.manual_seed(0)
    rivals = case.rivals if tier == 2 else {name: run for name, run in case.rivals.items() if name == "gemm"}
    functions = {"assay": case.run, **rivals}
    if tier == 2 and case.to_compile:
        torch._dynamo.reset()  # a shape is compiled for itself, not as the ninth of a kind
        functions["compile"] = torch.compile(case.to_compile, dynamic=False)
    inputs = buffers(case)
    variants, failed = prepare(functions, inputs)
    timings, clock = interleave(variants, SECONDS[tier])
    own = timings.pop("assay")
    result = {
        "op": case.op,
        "shape": case.shape,
        "dtype": dtype_name(case.dtype),
        "tier": tier,
        **dataclasses.asdict(own),
        "bytes": case.bytes,
        "flops": case.flops,
        "bound": case.bound,
        "ratios": {name: t.median / own.median for name, t in timings.items()},
        "rivals": {name: dataclasses.asdict(t) for name, t in timings.items()},
        "failed": failed,
        "with_launch_gaps": [name for name, variant in variants.items() if not variant.captured],
        "clock": clock,
        "contract": dataclasses.asdict(case.target) if case.target else None,
    }
    if case.logits_bytes:
        result["peak_bytes"], result["logits_bytes"] = peak_bytes(lambda: case.run(*inputs[0])), case.logits_bytes
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
