"""The CUDA kernels without a GPU: nothing spills, and the module says in one line why it cannot run here."""

from __future__ import annotations

import importlib
import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import assay
from assay.ops import _cuda, _native
from tests.kernels import nvcc_rows
from tests.kernels.table import Row, check

SPEC = importlib.util.find_spec("assay._cuda")
MODULE = Path(str(SPEC and SPEC.origin))
needs_kernels = pytest.mark.skipif(SPEC is None, reason="this build has no CUDA kernels (no nvcc, or ASSAY_CUDA=OFF)")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """What is found out once per process is found out again by each test."""
    _cuda._unusable.cache_clear()
    yield
    _cuda._unusable.cache_clear()


def cuobjdump() -> str | None:
    """The tool from the PATH, or the one that Triton brings."""
    triton = importlib.util.find_spec("triton")
    bundled = Path(str(triton and triton.origin)).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return shutil.which("cuobjdump") or (str(bundled) if bundled.exists() else None)


@needs_kernels
def test_no_hot_kernel_of_the_module_has_a_stack() -> None:
    """In the binary itself; ``make compile-table`` compiles the sources again and prints the spills."""
    tool = cuobjdump()
    if tool is None:
        pytest.skip("cuobjdump is absent; pip install nvidia-cuda-cuobjdump")
    command = [tool, "--dump-resource-usage", str(MODULE)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = [
        Row(
            nvcc_rows._readable(name),
            target,
            int(registers),
            0,
            int(stack) + int(local),
            int(shared),
            nvcc_rows._readable(name).partition("<")[0] not in nvcc_rows.COLD,
        )
        for target, functions in re.findall(r"arch = (sm_\d+)\n(.*?)(?=\nFatbin|\Z)", text, re.DOTALL)
        for name, registers, stack, shared, local in re.findall(
            r"Function (\w+):\n\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", functions
        )
    ]
    # 3 dtypes × (narrow and warp of all three sweeps; once of one model's, kept, twice and twice_global of two)
    kernels = {row.kernel for row in rows if row.hot}
    assert len({name for name in kernels if name.startswith("ensemble_kernel")}) == 3 * (2 * 3 + 4 * 2), kernels
    assert any(name.startswith("sparse") for name in kernels), kernels
    assert len({row.target for row in rows}) * len(kernels) == sum(row.hot for row in rows)
    assert check(rows) == []


PTXAS = """\
ptxas info    : Compiling entry function '_ZN5assay4cuda4slowEi' for 'sm_90'
ptxas info    : Function properties for _ZN5assay4cuda4slowEi
    48 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 80 registers, used 1 barriers, 48 bytes cumulative stack size, 1024 bytes smem
"""


def test_a_spill_is_read_from_the_compilers_report() -> None:
    """The report of one kernel that spills: a pattern that matches nothing would pass every kernel."""
    (match,) = nvcc_rows._ENTRY.finditer(PTXAS)
    row = nvcc_rows._row(match, "sm_90")
    assert (row.registers, row.spill_bytes, row.stack_bytes, row.shared_bytes, row.hot) == (80, 28, 48, 1024, True)
    assert len(check([row])) == 1


@pytest.mark.timeout(120)
def test_a_kernel_that_spills_is_caught(tmp_path: Path) -> None:
    if nvcc_rows.nvcc() is None:
        pytest.skip("nvcc is absent")
    source = tmp_path / "spilling.cu"
    source.write_text(
        "__global__ void spilling(float* x, int i) {\n"
        "  float local[512];\n"
        "  for (int j = 0; j < 512; ++j) local[j] = x[j * i];\n"
        "  x[0] = local[i];\n"  # a run-time index: the array cannot be registers
        "}\n"
    )
    rows: list[Row] = nvcc_rows._compile(source, "sm_90")
    assert [row.hot for row in rows] == [True]
    assert check(rows), rows


@needs_kernels
def test_the_module_knows_itself() -> None:
    assert re.fullmatch(r"CUDA \d+\.\d+, sm_\d+( sm_\d+)*", _cuda.build_info())


@needs_kernels
def test_the_module_needs_no_driver_and_no_runtime() -> None:
    """Static cudart, and libcuda opened by it when first used: the module loads on a machine without a GPU."""
    if shutil.which("ldd"):
        needed = subprocess.run(["ldd", str(MODULE)], capture_output=True, text=True, check=False).stdout
        for foreign in ("libcuda", "libtorch", "not found"):
            assert foreign not in needed, needed
    if shutil.which("nm"):
        command = ["nm", "-D", "--defined-only", str(MODULE)]
        names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[2::3]
        names = [name for name in names if not name.startswith("_ZT")]  # type information, weak, has to be visible
        assert names == ["PyInit__cuda"], f"more than the module is visible: {names}"


@needs_kernels
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_no_device_is_one_line_and_an_error_not_a_crash() -> None:
    reason = _cuda.missing()
    assert reason is not None
    assert re.match(r"no CUDA device can be used: cudaError\w+: ", reason), reason
    assert "\n" not in reason
    z = torch.randn(2, 5)  # never read: the module asks for a device first
    with pytest.raises(RuntimeError, match=r"ensemble_stats: .*cudaError"):
        _launch(z)


def _launch(z: torch.Tensor) -> None:
    """As ``_cuda.ensemble`` calls the module, which needs a torch with CUDA before it comes that far."""
    arguments, _, _ = _native.ensemble_arguments([z], None, [1.0], -100, 1)
    kernels = importlib.import_module("assay._cuda")
    kernels.ensemble(**arguments, allocate=lambda size: pytest.fail("a workspace before a device"), stream=0)


@needs_kernels
def test_no_rows_need_no_device() -> None:
    _launch(torch.empty(0, 5))


def test_a_build_without_the_module_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "assay._cuda", None)  # as if there were none
    assert "ASSAY_CUDA=ON" in str(_cuda.missing())
    assert _cuda.build_info() == "not built"


def test_a_module_that_does_not_load_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / f"_cuda{EXTENSION_SUFFIXES[0]}"
    file.write_bytes(b"not a library")
    broken = importlib.util.spec_from_file_location("assay._cuda", file)
    finder = SimpleNamespace(find_spec=lambda name, *_: broken if name == "assay._cuda" else None)
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    monkeypatch.delitem(sys.modules, "assay._cuda", raising=False)
    monkeypatch.delattr(assay, "_cuda", raising=False)
    reason = str(_cuda.missing())
    assert "cannot be loaded" in reason
    assert str(file) in reason
    assert str(file) in _cuda.build_info()


def test_importing_opens_nothing() -> None:
    code = "import sys, assay; print('assay._cuda' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
