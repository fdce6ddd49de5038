"""``make gpu``: build, smoke, measure, test and sanitize on an NVIDIA GPU, within a time that is fixed beforehand.

    python -m tests.gpu first | second | PHASE...     a run; its outcomes go into GPU_RESULTS line by line
    python -m tests.gpu report FOLDER                 the table of whatever a run left there
    python -m tests.gpu publish FOLDER...             benchmarks/results, README's column and the roofline from it
    python -m tests.gpu baseline                      packs the commit GPU_BASELINE for a machine without git

docs/gpu.md has the plan for a card that is lent, and the settings.
"""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.gpu import baseline, faults, phases, table
from tests.gpu.outcomes import FILE, Journal, last, read
from tests.gpu.settings import REHEARSAL, ROOT

RESULTS = ROOT / "benchmarks" / "results" / "gpu"
# Seconds of each phase, of the run's; what a phase does not use goes to the next.
RUNS: dict[str, dict[str, float]] = {
    "first": {"build": 50, "smoke": 45, "bench": 105, "test": 70, "sanitize": 30},
    "second": {"build": 45, "again": 45, "changed": 55, "tier2": 65, "sanitize": 30},
}
PHASES: dict[str, Callable[[phases.Run, float], None]] = {
    phase.__name__: phase
    for phase in (
        phases.build,
        phases.smoke,
        phases.bench,
        phases.test,
        phases.again,
        phases.changed,
        phases.tier2,
        phases.sanitize,
    )
}
LEAST = 3.0  # seconds: a phase is not begun with less


def main(words: Sequence[str]) -> int:
    command, *rest = words or [""]
    try:
        if command == "report" and len(rest) == 1:
            return report(Path(rest[0]))
        if command == "publish" and rest:
            importlib.import_module("tests.gpu.publish").publish([Path(folder) for folder in rest])
            return 0
        if command == "baseline" and not rest:
            print("packed", baseline.pack(os.environ.get(baseline.VARIABLE, "")).name, "from", baseline.name())
            return 0
    except (FileNotFoundError, RuntimeError) as error:
        print(f"make gpu: {error}", file=sys.stderr)
        return 1
    if command in RUNS and not rest:
        return start(command, RUNS[command])
    if words and all(word in PHASES for word in words):
        known = {**RUNS["second"], **RUNS["first"]}
        return start("first", {word: known[word] for word in words})
    print(__doc__, file=sys.stderr)
    print(f"phases: {', '.join(PHASES)}; got {' '.join(words) or 'nothing'}", file=sys.stderr)
    return 2


def start(name: str, shares: dict[str, float]) -> int:
    """A run where there is something to run on."""
    faults.parse(os.environ.get(faults.VARIABLE, ""))
    folder = Path(os.environ.get("GPU_RESULTS") or RESULTS / name).absolute()
    if REHEARSAL and folder.is_relative_to(RESULTS.parent):
        print("make gpu: a rehearsal measures nothing: set GPU_RESULTS to a folder outside the repository")
        return 2
    if not REHEARSAL and not torch_sees_a_gpu():
        return nothing_to_run_on()
    if (folder / FILE).exists():
        print(f"make gpu: {folder / FILE} holds an earlier run; move it, or set GPU_RESULTS to another folder")
        return 2
    recorded = Path(os.environ.get("GPU_RECORDED") or RESULTS / "first")
    if name == "second" and not (recorded / FILE).exists():
        print(f"make gpu-second: no {FILE} of the first run in {recorded}; set GPU_RECORDED to its folder")
        return 2
    earlier = last(read(recorded)) if name == "second" else {}
    return go(phases.Run(folder, Journal(folder), earlier), shares)


def nothing_to_run_on() -> int:
    if not driver_lists_a_gpu():
        print("make gpu: skipped: no NVIDIA GPU on this machine")
        return 0
    print(
        f"make gpu: nvidia-smi lists a GPU, but {sys.executable} has no torch that sees it; "
        "name a Python with a CUDA build of torch: make gpu PYTHON=..."
    )
    return 1


def go(run: phases.Run, shares: dict[str, float]) -> int:
    """Every phase, whatever became of the one before; the table in any case."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    seconds = float(os.environ.get("GPU_SECONDS") or sum(shares.values()))
    stop, spare = time.monotonic() + seconds, 0.0
    run.journal.mark("run", shares, "planned")
    try:
        for phase, share in shares.items():
            begun = time.monotonic()
            limit = min(share * seconds / sum(shares.values()) + spare, stop - begun)
            if limit >= LEAST:
                print(f"==== {phase} (at most {limit:.0f} s)", flush=True)
                _phase(run, phase, begun + limit)
            spare = max(0.0, limit - (time.monotonic() - begun))
    finally:
        status = report(run.folder)
    return status


def _phase(run: phases.Run, phase: str, deadline: float) -> None:
    begun, before = time.monotonic(), len(read(run.folder))
    run.journal.add("run", phase, "begun")
    try:
        PHASES[phase](run, deadline)
    except Exception as error:  # the phases after this one still run
        detail = f"{type(error).__name__}: {error}"
        run.journal.add("run", phase, "failed", detail, round(time.monotonic() - begun, 1))
        return
    ended = [o for o in last(read(run.folder)[before:]).values() if o.phase != "run"]
    counts = {state: sum(o.state == state for o in ended) for state in dict.fromkeys(o.state for o in ended)}
    detail = ", ".join(f"{count} {state}" for state, count in counts.items())
    state = "failed" if any(o.bad for o in ended) else "ok"
    run.journal.add("run", phase, state, detail, round(time.monotonic() - begun, 1))
    print(f"     {detail}", flush=True)


def report(folder: Path) -> int:
    """Prints the table and keeps it beside the outcomes; 1 if anything is wrong."""
    outcomes = last(read(folder))
    text = table.render(outcomes)
    (folder / "table.txt").write_text(text)
    print(text, flush=True)
    return int(any(o.bad for o in outcomes.values()))


# ---- is there anything to do? ---------------------------------------------------------------------------------------


def torch_sees_a_gpu() -> bool:
    probe = "import sys, torch; sys.exit(0 if torch.cuda.is_available() and torch.version.cuda else 9)"
    return subprocess.run([sys.executable, "-c", probe], capture_output=True, check=False).returncode == 0


def driver_lists_a_gpu() -> bool:
    try:
        return "GPU 0" in subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    except OSError:
        return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
