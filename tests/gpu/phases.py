"""What a run does, phase by phase. Each takes the time at which it must be over; its outcomes go into the journal."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.gpu import baseline
from tests.gpu.commands import Command, run_all, tail
from tests.gpu.outcomes import Journal, Outcome, last, read
from tests.gpu.settings import BASELINE_SITE, REHEARSAL, ROOT, SITE, environment
from tests.gpu.supervisor import Pool, supervise
from tests.gpu.worker import FOLDER

# What has a kernel; benchmarks.kernels and the checks beside this file have each by its function's name.
OPS = ("ensemble_stats", "linear_ensemble_stats", "head_scores", "linear_cross_entropy", "grad_dot", "grad_sqnorm")
OPS += ("grad_sketch", "project", "topk_scan", "scan_scores")
TOOLS = ("memcheck", "racecheck", "initcheck")
PROCESSES = int(os.environ.get("GPU_PROCESSES", "2" if REHEARSAL else "12"))  # of tests and sanitizers
# Seconds for a row, most of them Triton's: after that it hangs. GPU_LIMIT is for rehearsals with planted hangs.
LIMITS = {"machine": 40.0, "smoke": 40.0, "warm": 70.0, "bench": 25.0, "baseline": 25.0, "tier2": 45.0, "test": 60.0}
LIMITS |= dict.fromkeys(LIMITS, float(os.environ["GPU_LIMIT"])) if "GPU_LIMIT" in os.environ else {}
GIGABYTES_SHARE = 0.3  # of the tests' time, for those that run alone


Choice = Callable[[Sequence[str]], Sequence[str]]  # which of the rows that a process can do, and in which order


@dataclass(frozen=True)
class Run:
    folder: Path
    journal: Journal
    recorded: Mapping[tuple[str, str], Outcome]  # how the rows of an earlier run ended; the second run goes by it

    def environment(self, site: Path = SITE, **more: str) -> dict[str, str]:
        return environment(site, **{FOLDER: str(self.folder)}, **more)


# ---- build ----------------------------------------------------------------------------------------------------------


def build(run: Run, deadline: float) -> None:
    """This tree and, where there is one, the baseline, beside each other; without CUDA where that does not build."""
    commands = [_pip("package", ROOT, SITE, REHEARSAL)]
    source = baseline.unpack()
    if source:
        commands.append(_pip("baseline", source, BASELINE_SITE, REHEARSAL))
    run_all(commands, run.journal, deadline, len(commands))
    if last(read(run.folder))["build", "package"].bad and not REHEARSAL:
        # The Triton kernels can be tested all the same; what failed stays in the table.
        run_all([_pip("package, without CUDA", ROOT, SITE, True)], run.journal, deadline, 1)
    found = imported_from(SITE)
    run.journal.add("build", "import", "failed" if found else "ok", found)


def _pip(row: str, source: Path, site: Path, without_cuda: bool) -> Command:
    shutil.rmtree(site, ignore_errors=True)
    settings = [f"cmake.define.ASSAY_CUDA={'OFF' if without_cuda else 'ON'}"]
    if not without_cuda and (cc := capability()):
        settings.append(f"cmake.define.CMAKE_CUDA_ARCHITECTURES={cc}-real")  # the card's own: a third of the time
    settings += os.environ.get("GPU_BUILD", "").split()
    words = [sys.executable, "-m", "pip", "install", str(source), "--no-build-isolation", "--no-deps", "--no-index"]
    words += ["--disable-pip-version-check", "--target", str(site)]
    return Command("build", row, [*words, *(word for s in settings for word in ("-C", s))], dict(os.environ))


def capability() -> str | None:
    """ "90" for 9.0; None where the driver does not say."""
    try:
        words = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        found = subprocess.run(words, capture_output=True, text=True, check=False).stdout.split()
    except OSError:
        return None
    return found[0].replace(".", "") if found else None


def imported_from(site: Path) -> str:
    """What is wrong: an editable install would win over PYTHONPATH, and other code be tested than was built."""
    probe = [sys.executable, "-c", "import assay; print(assay.__file__)"]
    done = subprocess.run(probe, cwd=ROOT, env=environment(site), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return f"the built package does not import: {tail(done.stderr, 1)}"
    if not Path(done.stdout.strip()).is_relative_to(site):
        return f"{sys.executable} imports assay from {done.stdout.strip()}, not from the build; uninstall that"
    return ""


# ---- what is right --------------------------------------------------------------------------------------------------


def smoke(run: Run, deadline: float) -> None:
    """An op to a process, all at once. Beside them the compiler gets to work for the measurements."""
    pools = _machine(run) + [_smoke(run, op) for op in OPS]
    if not REHEARSAL:
        pools += [_bench(run, "warm", 1, op) for op in OPS if op not in ("ensemble_stats", "scan_scores")]
    supervise(pools, run.journal, deadline)


def _smoke(run: Run, op: str, rows: Choice = list) -> Pool:
    words = [sys.executable, "-m", "tests.gpu.smoke", op]
    return Pool("smoke", op, words, run.environment(), LIMITS["smoke"], rows=rows)


def test(run: Run, deadline: float) -> None:
    """The tests' files in turn, each file's most important first: its order. What takes gigabytes runs alone, after."""
    now = time.monotonic()
    supervise([_test(run, "small", PROCESSES, in_turn)], run.journal, deadline - GIGABYTES_SHARE * (deadline - now))
    supervise([_test(run, "gigabytes", 1, in_turn)], run.journal, deadline)


def _test(run: Run, which: str, processes: int, rows: Choice) -> Pool:
    words = [sys.executable, "-m", "pytest", "tests/gpu", "-q", "-s", "-p", "no:cacheprovider", "-p", "no:xdist"]
    environment = run.environment(GPU_TESTS=which)
    return Pool("test", which, [*words, "-o", "addopts="], environment, LIMITS["test"], 60.0, processes, rows)


def in_turn(names: Sequence[str]) -> list[str]:
    """Every file's first test, every file's second, and so on."""
    counts: dict[str, int] = {}
    keyed = []
    for name in names:
        file = name.partition("::")[0]
        counts[file] = counts.get(file, -1) + 1
        keyed.append((counts[file], name))
    return [name for _, name in sorted(keyed, key=lambda pair: pair[0])]


def again(run: Run, deadline: float) -> None:
    """What was wrong in the recorded run; then what that run did not come to."""
    wrong = {key for key, o in run.recorded.items() if o.bad}
    unknown = {key for key, o in run.recorded.items() if o.state in ("not reached", "unfinished")}

    def chosen(phase: str) -> Choice:
        def pick(names: Sequence[str]) -> list[str]:
            first = [name for name in names if (phase, name) in wrong]
            return first + [name for name in names if (phase, name) in unknown]

        return pick

    phases = {phase for phase, _ in wrong | unknown}
    pools = _machine(run)
    pools += [_smoke(run, op, chosen("smoke")) for op in OPS] if "smoke" in phases else []
    if "test" in phases:
        pools.append(_test(run, "small", PROCESSES, chosen("test")))
    supervise(pools, run.journal, deadline)
    if "test" in phases:
        supervise([_test(run, "gigabytes", 1, chosen("test"))], run.journal, deadline)


def sanitize(run: Run, deadline: float) -> None:
    """Every op under every tool, and a control: a wrong kernel that memcheck must find."""
    script = [sys.executable, "-m", "tests.gpu.sanitize"]
    # Every tensor an allocation, so that memcheck sees its bounds.
    env = environment(SITE, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    ops = [op for op in OPS if op != "scan_scores"]  # topk_scan's kernel
    commands = [Command("sanitize", f"plain {op}", [*script, op], env) for op in ops]  # fills Triton's cache, too
    found = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if found and not REHEARSAL:
        # Triton starts ptxas and a C compiler, which are not to be instrumented; torch probes the driver.
        options = ["--target-processes", "application-only", "--report-api-errors", "no", "--error-exitcode", "86"]
        # Memory of nobody behind every allocation: else a read past one's end may be inside the next.
        tools = {tool: ["--tool", tool] for tool in TOOLS} | {"memcheck": ["--tool", "memcheck", "--padding", "4096"]}
        memcheck = [found, *tools["memcheck"], *options, *script]
        commands.append(Command("sanitize", "control", [*memcheck, "--out-of-bounds"], env, judge=control))
        for tool in TOOLS:
            words = [found, *tools[tool], *options, *script]
            commands += [Command("sanitize", f"{tool} {op}", [*words, op], env) for op in ops]
    run_all(commands, run.journal, deadline, PROCESSES)
    if not found or REHEARSAL:
        reason = "a rehearsal has no sanitizer" if REHEARSAL else "no compute-sanitizer on this machine"
        run.journal.mark("sanitize", [f"{tool} {op}" for tool in TOOLS for op in ops], "skipped", reason)


def control(status: int, text: str) -> str:
    missed = "missed an out-of-bounds read made on purpose: what the tools say of the ops means nothing"
    return "" if "Invalid __global__ read" in text else f"{missed}; status {status}; {tail(text, 3)}"


# ---- what is fast ---------------------------------------------------------------------------------------------------


def bench(run: Run, deadline: float) -> None:
    """The contract's cases, op by op in turn, beside the GEMMs alone. A process measures while all others wait."""
    pools = _machine(run) + [_bench(run, "bench", 1, op) for op in ("ceilings", *OPS) if op != "scan_scores"]
    supervise(pools, run.journal, deadline, one_at_a_time=True)


def changed(run: Run, deadline: float) -> None:
    """Cases of the ops whose kernels changed, here and in the baseline, one after the other; first what did not run."""
    ops = set(baseline.changed_ops()) | {row.partition(",")[0].partition(" ")[0] for row in failed_cases(run)}
    pools = [_bench(run, "bench", 1, "ceilings")]
    for op in OPS:
        if op in ops and op != "scan_scores":
            pools.append(_bench(run, "bench", 1, op))
            if BASELINE_SITE.exists():
                pools.append(_bench(run, "baseline", 1, op, site=BASELINE_SITE))
    supervise(pools, run.journal, deadline, one_at_a_time=True)


def failed_cases(run: Run) -> list[str]:
    return [row for (phase, row), o in run.recorded.items() if phase == "bench" and o.state != "ok"]


def tier2(run: Run, deadline: float) -> None:
    """Every case beside torch eager, torch.compile and the peers that are installed; float32 too."""
    pools = [_bench(run, "tier2", 2, op) for op in OPS if op != "scan_scores"]
    supervise(pools, run.journal, deadline, one_at_a_time=True)


def _machine(run: Run) -> list[Pool]:
    """What it runs on, once a run."""
    known = any(phase == "machine" for phase, _ in last(read(run.folder)))
    return [] if known else [_bench(run, "machine", 1, "machine")]


def _bench(run: Run, phase: str, tier: int, op: str, site: Path = SITE) -> Pool:
    words = [sys.executable, "-m", "tests.gpu.bench", phase, str(tier), op]
    return Pool(phase, op, words, run.environment(site), LIMITS[phase])
