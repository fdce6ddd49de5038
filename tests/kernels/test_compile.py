"""Every GPU kernel compiles for every target and spills nothing, and the check itself would say so."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.kernels.table import Row, check, render

ROW = Row("grad_dot large", "sm_90", 224, 0, 0, 147456, True)


@pytest.mark.slow
def test_every_kernel_compiles_without_spills() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_table"],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "sm_80" in run.stdout
    assert "sm_90" in run.stdout
    assert "sm_100" in run.stdout


def test_a_spill_or_a_stack_frame_fails_only_hot_kernels() -> None:
    assert check([ROW]) == []
    for worse in (replace(ROW, spill_bytes=8), replace(ROW, stack_bytes=16)):
        assert len(check([ROW, worse])) == 1
        assert "grad_dot large for sm_90" in check([worse])[0]
        assert check([replace(worse, hot=False)]) == []


def test_the_table_is_aligned() -> None:
    head, line, other = render([ROW, replace(ROW, kernel="x", registers=8, hot=False)]).splitlines()
    assert head.split() == ["kernel", "target", "registers", "spill", "stack", "shared", "hot"]
    assert line.split()[-6:] == ["sm_90", "224", "0", "0", "147456", "hot"]
    assert line.index("224") + 3 == other.index(" 8 ") + 2
