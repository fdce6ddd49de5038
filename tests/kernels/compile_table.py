"""``python -m tests.kernels.compile_table``: every GPU kernel compiled for every target, and what the code takes.

Collects ``cases()`` of each cases_*.py beside it (Triton) and ``rows()`` of nvcc_rows.py (CUDA C++). Prints one table;
exits 1 if a hot kernel spills or has a stack frame, or a kernel's threads make different bits of one sum. ``--quick``
compiles every kernel once, for one target, and no CUDA C++: tests/cuda looks into that library. ``--counts FILE``
writes what each hot kernel's loop holds, too; ``--beside FILE`` prints such a file, another Triton's, beside its own
and fails where the two compile a loop differently. ``--only PART`` is for kernels with PART in their names.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import triton

from tests.kernels import aot, loop
from tests.kernels.loop import Loop
from tests.kernels.table import Row, check, render

PROCESSES = 2
QUICK = 90  # the target of the quick table
HERE = Path(__file__).parent


def collect() -> list[tuple[aot.Case, int]]:
    """Every case with every capability that it is launched on; what two names specialise alike, once."""
    found: dict[str, tuple[aot.Case, int]] = {}
    for path in sorted(HERE.glob("cases_*.py")):
        for case in importlib.import_module(f"tests.kernels.{path.stem}").cases():
            for cc in case.capabilities:
                found.setdefault(repr((cc, replace(case, name="", capabilities=()))), (case, cc))
    return list(found.values())


def heaviest(work: Sequence[tuple[aot.Case, int]]) -> list[tuple[aot.Case, int]]:
    """For the quick table's target each kernel, once: of its launches the one that holds the most."""
    chosen: dict[str, tuple[aot.Case, int]] = {}
    for case, cc in work:
        kernel = case.fn.fn.__name__
        if cc == QUICK and (kernel not in chosen or weight(case) > weight(chosen[kernel][0])):
            chosen[kernel] = case, cc
    return list(chosen.values())


def tile(case: aot.Case) -> tuple[int, int, tuple[tuple[str, int], ...]]:
    """What a launcher's table says: warps, stages, and the sizes among the constants."""
    sizes = tuple((name, value) for name, value in case.constexprs.items() if type(value) is int and value > 1)
    return case.num_warps, case.num_stages, sizes


def weight(case: aot.Case) -> tuple[int, int]:
    """What a launch asks of its kernel: a warp's share of the tile, then how much is given, arguments and flags."""
    warps, _, sizes = tile(case)
    flags = [value for value in case.constexprs.values() if value is True]
    arguments = [kind for kind in case.signature.values() if kind != "constexpr"]
    return math.prod(size for _, size in sizes) // warps, len(flags) + len(arguments)


_counting = False
_work: list[tuple[aot.Case, int]] = []  # forked into the pool: a Triton function does not pickle


def _compile(index: int) -> tuple[Row | str, Loop | None]:
    """The row, or one line that says what did not compile; and the row's longest loop."""
    case, cc = _work[index]
    try:
        row = aot.compile_case(case, cc)
        return row, loop.longest(aot.compiled(case, cc).asm["cubin"]) if _counting and case.hot else None
    except Exception as error:  # Triton's passes raise RuntimeError, its front end several kinds of its own
        return f"{case.name} for sm_{cc} does not compile: {type(error).__name__}: {error}", None


def triton_rows(work: Sequence[tuple[aot.Case, int]], counting: bool) -> list[tuple[Row | str, Loop | None]]:
    global _counting
    _work[:], _counting = work, counting
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # empty: what is read is the code of this source
        with get_context("fork").Pool(PROCESSES) as pool:
            return pool.map(_compile, range(len(_work)), chunksize=1)


def nvcc_rows() -> list[Row]:
    if not (HERE / "nvcc_rows.py").exists():
        return []
    rows: list[Row] = importlib.import_module("tests.kernels.nvcc_rows").rows()
    if not rows:
        print("skipped: the CUDA C++ kernels, nvcc is absent; pip install nvidia-cuda-nvcc nvidia-cuda-runtime")
    return rows


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.kernels.compile_table")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", default="")
    parser.add_argument("--counts", type=Path)
    parser.add_argument("--beside", type=Path)
    arguments = parser.parse_args(words)
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("compile_table: TRITON_INTERPRET=1 makes every kernel interpreted; unset it", file=sys.stderr)
        return 2
    start = time.monotonic()
    work = [(case, cc) for case, cc in collect() if arguments.only in case.name]
    counting = bool(arguments.counts or arguments.beside)
    compiled = triton_rows(heaviest(work) if arguments.quick else work, counting)
    found: list[Row | str] = [row for row, _ in compiled]
    if not (arguments.quick or arguments.only):
        found += nvcc_rows()
    rows = [row for row in found if isinstance(row, Row)]
    print(render(rows))
    problems = [line for line in found if isinstance(line, str)] + check(rows)
    counts = {f"{row.kernel} {row.target}": inner for row, inner in compiled if isinstance(row, Row) and inner}
    if arguments.counts:
        arguments.counts.write_text(json.dumps(loop.to_json(counts, triton.__version__)))
    if arguments.beside:
        other, version = loop.from_json(json.loads(arguments.beside.read_text()))
        print("", loop.render(counts, triton.__version__, other, version), sep="\n")
        problems += loop.differences(counts, triton.__version__, other, version)
    print(f"\n{len(rows)} rows in {time.monotonic() - start:.0f} s, {len(problems)} problems", *problems, sep="\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
