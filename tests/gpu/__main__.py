"""``make gpu``: build, test, sanitize and measure on an NVIDIA GPU, within a time that is fixed beforehand.

A phase that fails does not keep the next ones from running; the exit status is 1 if any did. Settings are environment
variables, described in docs/gpu.md.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
SITE = ROOT / "build" / "gpu-site"  # where the package is installed: nothing is left in the environment
REHEARSAL = os.environ.get("ASSAY_GPU_TESTS_ON") == "cpu"
SECONDS = float(os.environ.get("GPU_SECONDS", "470"))
SHARES = {"build": 0.27, "test": 0.30, "sanitize": 0.13, "bench": 0.30}  # of SECONDS; what is not used goes on
GRACE = 10.0  # seconds between asking a process to finish and killing it
TOOLS = ("memcheck", "racecheck", "initcheck")


def main(phases: Sequence[str]) -> int:
    unknown = [p for p in phases if p not in SHARES]
    if unknown or not phases:
        print(f"make gpu: expected phases among {', '.join(SHARES)}, got {' '.join(phases) or 'none'}")
        return 2
    if not REHEARSAL and not torch_sees_a_gpu():
        if not driver_lists_a_gpu():
            print("make gpu: skipped: no NVIDIA GPU on this machine")
            return 0
        print(
            f"make gpu: nvidia-smi lists a GPU, but {sys.executable} has no torch that sees it; "
            "name a Python with a CUDA build of torch: make gpu PYTHON=..."
        )
        return 1
    run = {"build": build, "test": test, "sanitize": sanitize, "bench": bench}
    report, spare, failed = [], 0.0, False
    for phase in phases:
        limit = SECONDS * SHARES[phase] + spare
        print(f"\n==== {phase} (at most {limit:.0f} s) ====", flush=True)
        start = time.monotonic()
        try:
            outcome = run[phase](start + limit)
        except Exception as error:  # the phases after this one still run
            outcome = f"FAILED: {type(error).__name__}: {error}"
        used = time.monotonic() - start
        spare = max(0.0, limit - used)
        failed |= outcome.startswith("FAILED")
        report.append(f"{phase:<9}{used:6.0f} s   {outcome}")
        print(report[-1], flush=True)
    print("\n==== make gpu ====", *report, sep="\n")
    return int(failed)


# ---- is there anything to do? ---------------------------------------------------------------------------------------


def torch_sees_a_gpu() -> bool:
    probe = "import sys, torch; sys.exit(0 if torch.cuda.is_available() and torch.version.cuda else 9)"
    return subprocess.run([sys.executable, "-c", probe], capture_output=True, check=False).returncode == 0


def driver_lists_a_gpu() -> bool:
    try:
        return "GPU 0" in subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    except OSError:
        return False


# ---- phases: each takes the time at which it must be done and says how it went --------------------------------------


def build(deadline: float) -> str:
    if build_with("ON", deadline):
        return imported_from_site()
    if REHEARSAL or time.monotonic() > deadline:
        return "FAILED: the package does not build"
    # The Triton kernels can be tested all the same; the status stays a failure.
    without = build_with("OFF", deadline)
    return (
        f"FAILED: does not build with CUDA{'; built without, for the phases to come' if without else ', nor without'}"
    )


def imported_from_site() -> str:
    """An editable install would win over PYTHONPATH, and the tests would run other code than was built."""
    probe = [sys.executable, "-c", "import assay; print(assay.__file__)"]
    run = subprocess.run(probe, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    if run.returncode != 0:
        return f"FAILED: the built package does not import: {run.stderr.strip().splitlines()[-1]}"
    if not Path(run.stdout.strip()).is_relative_to(SITE):
        return f"FAILED: {sys.executable} imports assay from {run.stdout.strip()}, not from the build; uninstall that"
    return "ok"


def build_with(cuda: str, deadline: float) -> bool:
    shutil.rmtree(SITE, ignore_errors=True)
    settings = [f"cmake.define.ASSAY_CUDA={'OFF' if REHEARSAL else cuda}", *os.environ.get("GPU_BUILD", "").split()]
    return (
        call(
            [
                *(sys.executable, "-m", "pip", "install", ".", "--no-build-isolation", "--no-deps", "--no-index"),
                *("--quiet", "--disable-pip-version-check", "--target", str(SITE)),
                *(word for setting in settings for word in ("-C", setting)),
            ],
            deadline,
        )
        == 0
    )


def test(deadline: float) -> str:
    # Triton compiles most of this time, on one core per process. Without --strict-config, pytest-timeout may be absent.
    parallel = ["-n", os.environ.get("GPU_TEST_PROCESSES", "4")] if importlib.util.find_spec("xdist") else []
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-q", "-o", "addopts=-ra --tb=short", *parallel]
    code = call(command, deadline)
    return "ok" if code == 0 else "FAILED: out of time" if code is None else f"FAILED: pytest's status is {code}"


def bench(deadline: float) -> str:
    seconds = max(10.0, deadline - time.monotonic() - 10)
    code = call([sys.executable, "-m", "benchmarks.gpu", "--seconds", f"{seconds:.0f}"], deadline)
    return "ok" if code == 0 else "FAILED: out of time" if code is None else f"FAILED: status {code}"


def sanitize(deadline: float) -> str:
    """All tools at once, and beside them a control: a wrong kernel that memcheck must find."""
    script = [sys.executable, "-m", "tests.gpu.sanitize"]
    if REHEARSAL:
        return "ok (rehearsal: no sanitizer)" if call(script, deadline) == 0 else "FAILED: the script itself"
    found = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if not found:
        return "skipped: no compute-sanitizer on this machine"
    # Triton starts ptxas and a C compiler, which are not to be instrumented; torch probes the driver for what it lacks.
    options = ["--target-processes", "application-only", "--report-api-errors", "no", "--error-exitcode", "86"]
    runs = {tool: [found, "--tool", tool, *options, *script] for tool in TOOLS}
    runs["control"] = [found, "--tool", "memcheck", *options, *script, "--out-of-bounds"]
    if call(script, deadline) != 0:  # fills Triton's cache, and is wrong by itself if the kernels are
        return "FAILED: the script itself, without a sanitizer"
    logs = {name: ROOT / "build" / f"gpu-{name}.log" for name in runs}
    started = {name: start(command, logs[name]) for name, command in runs.items()}
    codes = {name: finish(process, deadline) for name, process in started.items()}
    for name, code in codes.items():
        print(f"{name}: {'out of time' if code is None else f'status {code}'}, log in {logs[name].relative_to(ROOT)}")
    if "Invalid __global__ read" not in logs["control"].read_text(errors="replace"):
        tail(logs["control"])
        return "skipped: compute-sanitizer does not work here (it missed an out-of-bounds read made on purpose)"
    wrong = [name for name in TOOLS if codes[name] != 0]
    for name in wrong:
        tail(logs[name])
    return f"FAILED: {', '.join(wrong)}" if wrong else f"ok ({', '.join(TOOLS)}; the control was found)"


# ---- processes ------------------------------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    inherited = os.environ.get("PYTHONPATH")
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(SITE), *([inherited] if inherited else [])]),
        "PYTHONUNBUFFERED": "1",
    }


def start(command: Sequence[str], log: Path | None = None) -> subprocess.Popen[bytes]:
    """In a process group of its own, so that what it starts can be ended with it."""
    env = environment()
    if log is None:
        return subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True)
    env["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # every tensor an allocation: memcheck sees its bounds
    with log.open("wb") as file:
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=file, stderr=file, start_new_session=True)


def finish(process: subprocess.Popen[bytes], deadline: float) -> int | None:
    """The exit status, or None out of time: interrupted first, so that pytest still says what it has."""
    try:
        return process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):  # what it started goes with it
            os.killpg(process.pid, signal.SIGKILL)


def call(command: Sequence[str], deadline: float) -> int | None:
    return finish(start(command), deadline - GRACE)


def tail(log: Path, lines: int = 40) -> None:
    print("\n".join(log.read_text(errors="replace").splitlines()[-lines:]), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
