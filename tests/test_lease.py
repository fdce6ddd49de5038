"""``make gpu``'s machinery without a GPU: what dies, hangs or does not compile costs its own row; the table stays.

The rehearsal itself (docs/gpu.md) takes minutes; here stand-ins for its processes do rows that do nothing.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.gpu import baseline, faults, outcomes, table
from tests.gpu.outcomes import Journal, Outcome, last, read
from tests.gpu.settings import ROOT
from tests.gpu.supervisor import Pool, supervise

WORKER = """
from tests.gpu.worker import End, serve
serve("smoke", {{name: lambda name=name: End("ok", "", {{"name": name}}) for name in {rows}}})
"""


def pool(
    folder: Path, name: str, rows: list[str], planted: str = "", *, limit: float = 2.0, processes: int = 1
) -> Pool:
    environment = {**os.environ, "GPU_RESULTS": str(folder), "ASSAY_GPU_TESTS_ON": "cpu", "GPU_FAULTS": planted}
    environment.pop("TRITON_INTERPRET", None)
    words = [sys.executable, "-c", WORKER.format(rows=rows)]
    return Pool("smoke", name, words, environment, limit, processes=processes)


def states(folder: Path) -> dict[str, str]:
    return {row: outcome.state for (_, row), outcome in last(read(folder)).items()}


@pytest.mark.parametrize("one_at_a_time", [False, True])
def test_each_fault_costs_its_own_row(tmp_path: Path, one_at_a_time: bool) -> None:
    kinds = {"trap": "died", "kill": "died", "hang": "hung", "context": "failed", "wrong": "failed"}
    rows = [f"{row} of {kind}" for kind in kinds for row in ("before", kind, "after")]
    planted = ",".join(f"smoke/{kind} of {kind}={kind}" for kind in kinds)
    pools = [pool(tmp_path, "one", rows, planted), pool(tmp_path, "other", ["another op"])]
    supervise(pools, Journal(tmp_path), time.monotonic() + 60, one_at_a_time=one_at_a_time)
    expected = {f"{kind} of {kind}": state for kind, state in kinds.items()}
    assert states(tmp_path) == {row: expected.get(row, "ok") for row in [*rows, "another op"]}
    details = {row: outcome.detail for (_, row), outcome in last(read(tmp_path)).items()}
    assert "SIGSEGV" in details["trap of trap"]
    assert "SIGKILL" in details["kill of kill"]
    assert "illegal memory access" in details["context of context"]
    text = table.render(last(read(tmp_path)))
    assert text.index("another") < text.index("what is wrong") < text.index("smoke: hang of hang")


def test_a_kernel_that_does_not_compile_costs_its_own_row(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    supervise(
        [pool(tmp_path, "op", ["a", "b", "c"], "smoke/b=compile", limit=60.0)], Journal(tmp_path), time.monotonic() + 90
    )
    assert states(tmp_path) == {"a": "ok", "b": "failed", "c": "ok"}
    assert "CompilationError" in last(read(tmp_path))["smoke", "b"].detail


def test_a_pool_shares_its_rows_and_replaces_its_dead(tmp_path: Path) -> None:
    rows = [str(i) for i in range(20)]
    supervise(
        [pool(tmp_path, "tests", rows, "smoke/7=trap,smoke/3=kill", processes=3)],
        Journal(tmp_path),
        time.monotonic() + 60,
    )
    ended = states(tmp_path)
    assert {row for row, state in ended.items() if state == "died"} == {"3", "7", "13", "17"}
    assert [o.row for o in read(tmp_path) if o.state == "ok"].count("5") == 1
    assert sum(state == "ok" for state in ended.values()) == 16


def test_a_process_that_does_not_start_costs_its_pool_alone(tmp_path: Path) -> None:
    broken = pool(tmp_path, "broken", [])
    broken = Pool("smoke", "broken", [sys.executable, "-c", "raise SystemExit('no such op')"], broken.environment, 2.0)
    supervise([broken, pool(tmp_path, "op", ["a"])], Journal(tmp_path), time.monotonic() + 60)
    assert states(tmp_path) == {"broken": "died", "a": "ok"}
    assert "no such op" in last(read(tmp_path))["smoke", "broken"].detail


def test_the_time_ends(tmp_path: Path) -> None:
    start = time.monotonic()
    supervise([pool(tmp_path, "op", ["a", "b"], "smoke/a=hang", limit=600.0)], Journal(tmp_path), start + 3)
    assert time.monotonic() - start < 6
    assert set(states(tmp_path).values()) == {"not reached"}


DRIVER = """
import sys, time
from pathlib import Path
from tests.gpu.outcomes import Journal
from tests.gpu.supervisor import supervise
from tests.test_lease import pool
folder = Path(sys.argv[1])
supervise([pool(folder, "op", ["a", "b", "c"], "smoke/b=hang", limit=600.0)], Journal(folder), time.monotonic() + 600)
"""


def test_a_killed_run_leaves_its_table_and_no_process(tmp_path: Path) -> None:
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(tmp_path)], cwd=ROOT)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and "begun" not in {o.state for o in _of_row(tmp_path, "b")}:
        time.sleep(0.05)
    worker = int(subprocess.run(["pgrep", "-P", str(driver.pid)], capture_output=True, text=True).stdout.split()[0])
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    command = [sys.executable, "-m", "tests.gpu", "report", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "UNFINISHED smoke: b" in done.stdout, done.stderr
    assert states(tmp_path) == {"a": "ok", "b": "unfinished", "c": "not reached"}
    assert (tmp_path / "table.txt").read_text() in done.stdout
    while Path(f"/proc/{worker}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{worker}").exists(), "the killed run's process goes on"


def _of_row(folder: Path, row: str) -> list[Outcome]:
    return [o for o in read(folder) if o.row == row] if (folder / outcomes.FILE).exists() else []


def test_a_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.add("smoke", "a", "ok")
    journal.add("smoke", "b", "ok")
    whole = journal.path.read_bytes()
    journal.path.write_bytes(whole[:-20])
    assert states(tmp_path) == {"a": "ok"}
    with pytest.raises(FileNotFoundError, match="make gpu"):
        read(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="expected one of planned"):
        journal.add("smoke", "a", "fine")


def test_faults_are_for_rehearsals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "REHEARSAL", False)
    monkeypatch.setenv(faults.VARIABLE, "smoke/a=wrong")
    with pytest.raises(SystemExit, match="for a rehearsal"):
        faults.plant("smoke", "a")
    with pytest.raises(SystemExit, match="expected PHASE/PART OF A ROW=KIND"):
        faults.parse("smoke=sabotage")


def test_only_ops_whose_kernels_differ_have_a_baseline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baseline, "ROOT", tmp_path / "new")
    monkeypatch.setattr(baseline, "SOURCE", tmp_path / "old")
    files = ("kernels/dot.py", "kernels/head_sweep.py", "kernels/_common.py", "csrc/cuda/ensemble.cu")
    for tree in ("new", "old"):
        for file in files:
            path = tmp_path / tree / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("")
    assert baseline.changed_ops() == []
    (tmp_path / "new/kernels/dot.py").write_text("changed")
    (tmp_path / "old/csrc/cuda/ensemble.cu").unlink()
    assert baseline.changed_ops() == ["ensemble_stats", "grad_dot"]
    (tmp_path / "new/kernels/_common.py").write_text("changed")
    assert baseline.changed_ops() == list(baseline.ALL)


# ---- the results of a run -------------------------------------------------------------------------------------------

MACHINE = {"device": "A Card 80GB", "torch": "2", "triton": "3", "commit": "abc", "peers": {}}
CEILINGS = {"read": 3000.0, "copy": 2900.0, "gemm": {"bfloat16": 800.0}, "readers": {}}


def measured(ms: float) -> dict[str, object]:
    return {
        "op": "grad_dot",
        "shape": "B=8 T=1024 4096→14336",
        "dtype": "bfloat16",
        "tier": 1,
        "median": ms,
        "p20": ms,
        "p80": ms,
        "rounds": 9,
        "bytes": 3 * 10**8,
        "flops": 10**12,
        "bound": "gemm",
        "ratios": {"gemm": 1.5 / ms},
        "rivals": {},
        "failed": {},
        "with_launch_gaps": [],
        "clock": None,
        "contract": {"of": "gemm", "limit": 1.1},
    }


def test_a_run_becomes_a_results_file_a_figure_and_readme_s_column(tmp_path: Path) -> None:
    from tests.gpu.publish import publish

    first, second = Journal(tmp_path / "first"), Journal(tmp_path / "second")
    for journal in (first, second):
        journal.add("machine", "machine", "ok", facts=MACHINE)
        journal.add("bench", "ceilings", "ok", facts=CEILINGS)
    row = "grad_dot B=8 T=1024 4096→14336 bfloat16"
    first.add("bench", row, "ok", facts=measured(3.0))
    first.add("bench", "head_scores", "died", "killed by SIGSEGV")
    second.add("bench", row, "ok", facts=measured(1.5))
    readme = tmp_path / "README.md"
    readme.write_text((ROOT / "README.md").read_text())
    publish([tmp_path / "first", tmp_path / "second"], tmp_path, readme)
    found = json.loads((tmp_path / "a-card-80gb-kernels.json").read_text())
    (case,) = found["cases"]
    assert (case["median"], case["met"], case["target"]) == (1.5, True, "≤ 1.10 × the GEMMs, 1.00")
    assert case["fraction"] == pytest.approx(10**12 / 1.5 / 1e9 / 800)
    assert found["problems"] == ["head_scores (bench): died, killed by SIGSEGV"]
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "a-card-80gb-roofline.png").stat().st_size > 10_000
    (line,) = [line for line in readme.read_text().splitlines() if line.startswith("| `grad_dot`")]
    assert line.endswith(" | B=8 T=1024 4096→14336, bfloat16: 1.00 × its GEMMs (met) |")
    assert "GPU: A Card 80GB |" in readme.read_text()
    other = Journal(tmp_path / "other")
    other.add("machine", "machine", "ok", facts={**MACHINE, "device": "B"})
    with pytest.raises(RuntimeError, match="different devices"):
        publish([tmp_path / "first", tmp_path / "other"], tmp_path, readme)


def test_a_table_without_ceilings_or_machine_is_still_a_table(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.mark("run", ["build", "smoke"], "planned")
    journal.add("bench", "grad_dot x bfloat16", "ok", facts=measured(3.0))
    journal.add("baseline", "grad_dot x bfloat16", "ok", facts=measured(6.0))
    text = table.render(last(read(tmp_path)))
    assert "no machine" in text
    (line,) = [line for line in text.splitlines() if line.startswith("grad_dot x")]
    assert line.split()[3] == "3.000"
    assert " 0.50 " in line  # of the baseline's time
    assert "NOT MET" in line


def test_every_op_with_a_kernel_is_in_every_phase() -> None:
    from benchmarks.gpu import measure
    from tests.gpu import phases, sanitize, smoke

    scanning = {"scan_scores"}  # topk_scan's kernel, of which it is the half
    assert set(smoke.OPS) == set(phases.OPS)
    assert set(sanitize.OPS) == set(phases.OPS) - scanning
    assert {measure.op_of(case) for case in measure.cases()} <= set(phases.OPS) - scanning
    assert set(baseline.ALL) == set(phases.OPS) - scanning


WITHOUT_EXTRAS = """
import importlib, sys
for name in sys.argv[1].split(): sys.modules[name] = None
import tests.conftest, benchmarks.gpu.report, benchmarks.gpu.ceilings
from pathlib import Path
from tests.gpu import bench, phases
for file in sorted(Path(bench.__file__).parent.glob("*.py")):
    if file.stem not in ("__init__", "__main__"): importlib.import_module(f"tests.gpu.{file.stem}")
print(sum(len(bench.rows(2, op)) for op in phases.OPS))
"""


def test_a_run_needs_none_of_the_extras() -> None:
    """A lent machine had torch and Triton, and no pydantic: the first run measured nothing."""
    extras = "pydantic pydantic_core typer rich yaml zstandard safetensors sklearn transformers gguf peft datasets"
    environment = {**os.environ, "ASSAY_GPU_TESTS_ON": "cpu"}
    words = [sys.executable, "-c", WITHOUT_EXTRAS, extras]
    run = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) > 30


def test_a_phase_that_raises_is_told_and_the_next_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.gpu import __main__ as command
    from tests.gpu import phases

    def broken(run: phases.Run, deadline: float) -> None:
        raise RuntimeError("no such phase")

    def whole(run: phases.Run, deadline: float) -> None:
        run.journal.add("smoke", "grad_dot float32 1", "ok")

    monkeypatch.setattr(command, "PHASES", {"build": broken, "smoke": whole})
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # this process keeps its own
    status = command.go(phases.Run(tmp_path, Journal(tmp_path), {}), {"build": 10.0, "smoke": 10.0})
    assert status == 1
    assert {o.row: o.state for o in table.of(last(read(tmp_path)), "run")} == {"build": "failed", "smoke": "ok"}
    assert "RuntimeError: no such phase" in capsys.readouterr().out


def test_every_file_s_first_test_comes_first() -> None:
    from tests.gpu.phases import in_turn

    assert in_turn(["a::1", "a::2", "a::3", "b::1", "c::1", "c::2"]) == ["a::1", "b::1", "c::1", "a::2", "c::2", "a::3"]
