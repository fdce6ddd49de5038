"""The cases of one op, measured as they are told: ``python -m tests.gpu.bench PHASE TIER OP``.

``python -m tests.gpu.bench warm 1 OP`` only compiles what they launch, into Triton's cache, so that the time of the
measurements goes into measuring.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch

from benchmarks.case import DEVICE, Case
from benchmarks.gpu import ceilings, measure, peers, report
from tests.gpu.settings import REHEARSAL
from tests.gpu.worker import End, one_line, serve

CEILINGS = "ceilings"  # in an op's place


def timed(case: Case, tier: int) -> End:
    try:
        result = measure.measure(case, tier)
    finally:
        free()
    return End("ok", f"{result['median']:.3f} ms", result)


def measured_ceilings() -> End:
    found = ceilings.measure()
    free()
    return End("ok", f"read {found.read:.0f} GB/s", dataclasses.asdict(found))


def machine() -> End:
    facts = report.machine(DEVICE)
    return End("ok", str(facts["device"]), {**facts, "peers": peers.versions()})


def free() -> None:
    """The other processes' cases need the memory."""
    if not REHEARSAL:
        torch.cuda.empty_cache()


def compiled(op: str) -> End:
    """Every launch of the op's cases, compiled instead of run; numbers that later launches would read are any."""
    if REHEARSAL:
        return End("skipped", "a rehearsal compiles nothing")
    from benchmarks.gpu.compiling import compile_only

    raised = []
    with compile_only() as launches:
        for case in measure.cases():
            if measure.op_of(case) == op and measure.in_contract(case):
                try:
                    case.run(*case.make())
                except Exception as error:  # with numbers that are any, it may; the launches before it are compiled
                    raised.append(one_line(error))
                free()
    return End("ok", "; ".join([f"{launches.total()} launches", *raised])[:400])


def rows(tier: int, op: str) -> dict[str, Callable[[], End]]:
    if op == CEILINGS:
        return {CEILINGS: measured_ceilings}
    chosen = [c for c in measure.cases() if measure.op_of(c) == op and (tier == 2 or measure.in_contract(c))]
    return {case.name: partial(timed, case, tier) for case in spread(chosen)}


def spread(cases: Sequence[Case]) -> list[Case]:
    """The first, the middle one, those between …: whenever the time ends, cases from all over the list are measured."""
    bits = len(cases).bit_length()
    order = sorted(range(len(cases)), key=lambda i: f"{i:0{bits}b}"[::-1])
    return [cases[i] for i in order]


def main(phase: str, tier: str, op: str) -> None:
    measure.settle()
    if phase == "machine":
        serve(phase, {op: machine})
    elif phase == "warm":
        serve(phase, {op: partial(compiled, op)})
    else:
        serve(phase, rows(int(tier), op))


if __name__ == "__main__":
    main(*sys.argv[1:])
