"""What nvcc says about the CUDA C++ kernels: compiled for each target with warnings as errors, without a GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.kernels.table import Row

SOURCES = sorted((Path(__file__).parents[2] / "csrc" / "cuda").glob("*.cu"))
TARGETS = ("sm_80", "sm_90", "sm_100")
# Copies a few kilobytes once per call, where there are more models than fit the kernel's arguments.
COLD = {"upload_models"}

# `Path` and `Sweeps` in csrc/cuda/ensemble_plan.h: c++filt prints an enumerator as a cast of its number.
PATHS = ("narrow", "warp", "once", "kept", "twice", "twice_global")
SWEEPS = ("one sweep", "squares", "mixture")

_ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?\n"
    r"(?:.*?Function properties for .*?\n)?"
    r"\s*(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads\n"
    r".*?Used (?P<registers>\d+) registers(?P<rest>.*)"
)


def nvcc() -> str | None:
    return shutil.which("nvcc")


def rows() -> list[Row]:
    """One row per kernel and target; none where there is no nvcc.

    Raises RuntimeError with the compiler's words where a source does not compile.
    """
    if nvcc() is None:
        return []
    jobs = [(source, target) for source in SOURCES for target in TARGETS]
    with ThreadPoolExecutor(2) as pool:
        return [row for found in pool.map(lambda job: _compile(*job), jobs) for row in found]


def _compile(source: Path, target: str) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc() or "nvcc", "-std=c++17", f"-arch={target}", "-cubin", "-Xptxas", "-v", "-O3"]
        command += ["-fmad=false", "-Werror", "all-warnings"]  # as CMakeLists.txt
        command += ["-o", f"{folder}/kernel.cubin", str(source)]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"{source.name} for {target}:\n{run.stderr}")
    return [_row(match, target) for match in _ENTRY.finditer(run.stderr)]


def _row(match: re.Match[str], target: str) -> Row:
    shared = re.search(r"(\d+) bytes smem", match["rest"])
    name = _readable(match["name"])
    return Row(
        kernel=name,
        target=target,
        registers=int(match["registers"]),
        spill_bytes=int(match["stores"]) + int(match["loads"]),
        stack_bytes=int(match["stack"]),
        shared_bytes=int(shared[1]) if shared else 0,
        hot=name.partition("<")[0] not in COLD,
    )


def _readable(mangled: str) -> str:
    """Function and template arguments, without namespaces and parameters."""
    filt = shutil.which("c++filt")
    if filt is None:
        return mangled
    text = subprocess.run([filt, mangled], capture_output=True, text=True, check=True).stdout.strip()
    text = re.sub(r"\(anonymous namespace\)::|assay::cuda::|_GLOBAL__N__\w+::|^void ", "", text)
    text = re.sub(r"\(Path\)(\d)", lambda path: PATHS[int(path[1])], text)
    text = re.sub(r"\(Sweeps\)(\d)", lambda sweeps: SWEEPS[int(sweeps[1])], text)
    return text.partition("(assay")[0].partition("(Launch")[0].partition("(ModelBatch")[0]
