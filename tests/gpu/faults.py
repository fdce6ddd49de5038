"""Faults on purpose, in a rehearsal only: ``GPU_FAULTS="smoke/grad_dot bfloat16=trap bench/topk_scan=hang"``.

Each is phase/part of a row's name=kind, separated by commas: every such row meets the fault.
"""

from __future__ import annotations

import os
import signal
import time

from tests.gpu.settings import REHEARSAL

VARIABLE = "GPU_FAULTS"
KINDS = ("trap", "hang", "compile", "kill", "context", "wrong")


def parse(text: str) -> list[tuple[str, str, str]]:
    """(phase, part of a row's name, kind) of each."""
    found = []
    for item in filter(None, map(str.strip, text.split(","))):
        where, _, kind = item.rpartition("=")
        phase, slash, part = where.partition("/")
        if kind not in KINDS or not slash:
            raise SystemExit(
                f"{VARIABLE}: expected PHASE/PART OF A ROW=KIND with a kind of {', '.join(KINDS)}: {item!r}"
            )
        found.append((phase, part, kind))
    return found


def plant(phase: str, row: str) -> None:
    """Do to this process what the fault for the row does, if there is one."""
    text = os.environ.get(VARIABLE, "")
    if text and not REHEARSAL:
        raise SystemExit(f"{VARIABLE} is for a rehearsal (ASSAY_GPU_TESTS_ON=cpu); unset it")
    for where, part, kind in parse(text):
        if where == phase and part in row:
            {
                "trap": lambda: os.kill(os.getpid(), signal.SIGSEGV),
                "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
                "hang": _hang,
                "compile": _compile,
                "context": _lose_context,
                "wrong": _be_wrong,
            }[kind]()


def _hang() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        time.sleep(3600)


def _compile() -> None:
    """A Triton kernel whose product's sides do not fit, through Triton's compiler."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tests.gpu.out_of_bounds import does_not_compile

    triton.compile(ASTSource(does_not_compile, {"x": "*fp32"}), target=GPUTarget("cuda", 90, 32))


def _lose_context() -> None:
    raise RuntimeError("CUDA error: an illegal memory access was encountered (planted)")


def _be_wrong() -> None:
    raise AssertionError("1 of 1 wrong (planted)")
