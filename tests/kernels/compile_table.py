"""``python -m tests.kernels.compile_table``: every GPU kernel compiled for every target, and what the code takes.

Collects ``cases()`` of each cases_*.py beside it (Triton) and ``rows()`` of nvcc_rows.py (CUDA C++). Prints one table;
exits 1 if a hot kernel spills or has a stack frame.
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
import time
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

from tests.kernels import aot
from tests.kernels.table import Row, check, render

PROCESSES = 2
HERE = Path(__file__).parent


def collect() -> list[tuple[aot.Case, int]]:
    """Every case with every capability that it is launched on; what two names specialise alike, once."""
    found: dict[str, tuple[aot.Case, int]] = {}
    for path in sorted(HERE.glob("cases_*.py")):
        for case in importlib.import_module(f"tests.kernels.{path.stem}").cases():
            for cc in case.capabilities:
                found.setdefault(repr((cc, replace(case, name="", capabilities=()))), (case, cc))
    return list(found.values())


_work: list[tuple[aot.Case, int]] = []  # forked into the pool: a Triton function does not pickle


def _compile(index: int) -> Row | str:
    """The row, or one line that says what did not compile."""
    case, cc = _work[index]
    try:
        return aot.compile_case(case, cc)
    except Exception as error:  # Triton's passes raise RuntimeError, its front end several kinds of its own
        return f"{case.name} for sm_{cc} does not compile: {type(error).__name__}: {error}"


def triton_rows() -> list[Row | str]:
    _work[:] = collect()
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


def main() -> int:
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("compile_table: TRITON_INTERPRET=1 makes every kernel interpreted; unset it", file=sys.stderr)
        return 2
    start = time.monotonic()
    found = [*triton_rows(), *nvcc_rows()]
    rows = [row for row in found if isinstance(row, Row)]
    print(render(rows))
    problems = [line for line in found if isinstance(line, str)] + check(rows)
    print(f"\n{len(rows)} rows in {time.monotonic() - start:.0f} s, {len(problems)} problems", *problems, sep="\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
