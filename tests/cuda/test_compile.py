"""The CUDA kernels without a GPU: nothing spills, and the library says in one line why it cannot run here."""

from __future__ import annotations

import ctypes
import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from assay import _native
from assay.ops import _cuda
from tests.kernels import nvcc_rows
from tests.kernels.table import Row, check

BUILT = _cuda.LIBRARY.exists()
needs_library = pytest.mark.skipif(not BUILT, reason="this build has no CUDA library (no nvcc, or ASSAY_CUDA=OFF)")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """What is found out once per process is found out again by each test."""
    _cuda._library.cache_clear()
    _cuda._unusable.cache_clear()
    yield
    _cuda._library.cache_clear()
    _cuda._unusable.cache_clear()


def cuobjdump() -> str | None:
    """The tool from the PATH, or the one that Triton brings."""
    triton = importlib.util.find_spec("triton")
    bundled = Path(str(triton and triton.origin)).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return shutil.which("cuobjdump") or (str(bundled) if bundled.exists() else None)


@needs_library
def test_no_hot_kernel_of_the_library_has_a_stack() -> None:
    """In the binary itself; ``make compile-table`` compiles the sources again and prints the spills."""
    tool = cuobjdump()
    if tool is None:
        pytest.skip("cuobjdump is absent; pip install nvidia-cuda-cuobjdump")
    command = [tool, "--dump-resource-usage", str(_cuda.LIBRARY)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = [
        Row(
            nvcc_rows._readable(name),
            target,
            int(registers),
            0,
            int(stack) + int(local),
            int(shared),
            "ensemble_kernel" in name,
        )
        for target, functions in re.findall(r"arch = (sm_\d+)\n(.*?)(?=\nFatbin|\Z)", text, re.DOTALL)
        for name, registers, stack, shared, local in re.findall(
            r"Function (\w+):\n\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", functions
        )
    ]
    # 3 dtypes × (narrow, kept, twice_global) × (one sweep, mixture), and the mixture of `twice`
    kernels = {row.kernel for row in rows if row.hot}
    assert len(kernels) == 3 * (3 * 2 + 1), kernels
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


@needs_library
def test_library_loads_and_knows_itself() -> None:
    library = _cuda._library()
    assert library.assay_cuda_abi_version() == _cuda._ABI
    assert re.fullmatch(r"CUDA \d+\.\d+, sm_\d+( sm_\d+)*", _cuda.build_info())
    assert _cuda._name(1).startswith("cudaErrorInvalidValue: ")


@needs_library
def test_library_needs_no_driver_and_no_runtime() -> None:
    """Static cudart, and libcuda opened by it when first used: the library loads on a machine without a GPU."""
    if shutil.which("ldd"):
        needed = subprocess.run(["ldd", str(_cuda.LIBRARY)], capture_output=True, text=True, check=False).stdout
        for foreign in ("libcuda", "libtorch", "libstdc++", "not found"):
            assert foreign not in needed.replace(_cuda.LIBRARY.name, ""), needed
    if shutil.which("nm"):
        command = ["nm", "-D", "--defined-only", str(_cuda.LIBRARY)]
        names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[2::3]
        assert names, "no symbols"
        assert all(name.startswith("assay_cuda_") for name in names), f"more than the C interface is visible: {names}"


@needs_library
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_no_device_is_one_line_and_an_error_not_a_crash() -> None:
    reason = _cuda.missing()
    assert reason is not None
    assert re.match(r"no CUDA device can be used: cudaError\w+: ", reason), reason
    assert "\n" not in reason
    z = torch.randn(2, 5)  # never read: the library asks for a device first
    with pytest.raises(RuntimeError, match=r"ensemble_stats: .*cudaError"):
        _launch(z)


def _launch(z: torch.Tensor) -> None:
    """The C interface as ``_cuda.ensemble`` calls it, which needs a torch with CUDA before it comes that far."""
    one = ctypes.c_int64 * 1
    args = _cuda._EnsembleArgs(
        logits=(ctypes.c_void_p * 1)(z.data_ptr()),
        row_strides=one(z.stride(0)),
        col_strides=one(z.stride(1)),
        K=1,
        N=z.shape[0],
        C=z.shape[1],
        weights=(ctypes.c_double * 1)(1.0),
        fields=1,
    )
    size = ctypes.c_size_t()
    _cuda._check(_cuda._library().assay_cuda_ensemble_workspace(ctypes.byref(args), ctypes.byref(size)))
    _cuda._check(_cuda._library().assay_cuda_ensemble(ctypes.byref(args), None, 0, None))


@needs_library
def test_no_rows_need_no_device() -> None:
    _launch(torch.empty(0, 5))


def test_missing_library_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_cuda, "LIBRARY", tmp_path / "libassay_cuda.so")
    assert "ASSAY_CUDA=ON" in str(_cuda.missing())
    _cuda.LIBRARY.write_bytes(b"not a library")
    reason = str(_cuda.missing())
    assert "cannot be loaded" in reason
    assert "libassay_cuda.so" in reason


@needs_library
def test_another_interface_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cuda, "_ABI", 99)
    assert f"interface {1}, expected 99" in str(_cuda.missing())


def test_importing_opens_nothing() -> None:
    code = "import assay; print(open('/proc/self/maps').read().count('libassay_cuda'))"
    if not Path("/proc/self/maps").exists():
        pytest.skip("no /proc here")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "0"


def test_library_lies_beside_the_cpu_kernels() -> None:
    assert _cuda.LIBRARY.parent == Path(str(_native.__file__)).parent
