"""Replaying: the fewest steps, the same bits, and a killed run that goes on."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from assay.retrain import SGD, Plan, magic
from assay.retrain.magic_replay import InMemory, Replay, replayed_steps
from tests.retrain.test_magic import OPTIMIZERS, RATES, losses, world


@lru_cache(None)
def fewest(states: int, room: int) -> int:
    """The steps to have states in reverse, by trying every place for the next one that is kept."""
    if states < 2 or room < 2:
        return states * (states - 1) // 2
    return min(m + fewest(states - m, room - 1) + fewest(m, room) for m in range(1, states))


@pytest.mark.parametrize("checkpoints", [1, 2, 3, 6])
def test_no_schedule_makes_fewer_steps(checkpoints: int) -> None:
    for steps in (*range(1, 13), 30):
        store, most = InMemory(), 0
        digests = torch.zeros(steps + 1, dtype=torch.int64)
        replay = Replay(lambda: (torch.zeros(1),), lambda s, t: (s[0] + (s[0] == t),), checkpoints, store, digests)
        for step in range(steps, -1, -1):
            assert int(replay.state(step)[0]) == step
            most = max(most, len(store.steps()))
        assert most <= checkpoints
        assert replay.made == fewest(steps + 1, checkpoints + 1) == replayed_steps(steps, checkpoints)


def test_a_step_that_is_made_otherwise_the_second_time_is_an_error() -> None:
    calls: list[int] = []

    def advance(state: tuple[Tensor, ...], step: int) -> tuple[Tensor, ...]:
        calls.append(step)
        return (state[0] + (1 if len(calls) < 12 else 1.0000002),)

    replay = Replay(lambda: (torch.zeros(3),), advance, 1, InMemory(), torch.zeros(11, dtype=torch.int64))
    replay.state(10)
    replay.state(9)
    with pytest.raises(RuntimeError, match=r"step \d was replayed to other numbers"):
        replay.state(4)


def test_the_plan_is_what_happens() -> None:
    counts = {"losses": 0}

    def counted(model: Any, batch: Any) -> Tensor:
        counts["losses"] += 1
        return losses(model, batch)

    training, targets, _ = world(OPTIMIZERS["momentum"])
    training = replace(training, losses=counted)
    plan = Plan.of(training, targets=2, checkpoints=2, directions=1)
    checks = 2 + 2 + 1 + 4 + 1  # the first gradient and Hu twice, a look at the graph, differences; a target once more
    found = magic(training, targets, checkpoints=2, directions=1)
    made = plan.forward_steps + plan.smoothness_steps + training.steps + 3 * 3  # the targets' three batches
    assert counts["losses"] == made + checks
    assert replace(found.plan, seconds=None) == plan
    assert plan.state_bytes == 2 * 26 * 8
    assert str(plan).startswith("8 steps of 26 parameters: ")
    with pytest.raises(
        ValueError,
        match=r"most_bytes: expected at least 8,304 for 8 steps .* got 6,300; set checkpoints=3, or a folder",
    ):
        magic(training, targets, most_bytes=6300, checkpoints=8)


class Killed(Exception):
    pass


def run(folder: Path | None, stop: Any = None, **changes: Any) -> Tensor:
    """The scores; ``stop`` is called with the number of every call of the losses."""
    training, targets, weights = world(OPTIMIZERS["adamw"])
    calls = iter(range(10**6))

    def watched(model: Any, batch: Any) -> Tensor:
        if stop is not None:
            stop(next(calls))
        return losses(model, batch)

    changed = replace(training, losses=watched, **changes)
    return magic(changed, targets, weights=weights, checkpoints=3, folder=folder, save_every=2, directions=1).scores


@pytest.fixture(scope="module")
def whole() -> Tensor:
    return run(None)


@pytest.mark.parametrize("at", [16, 25, 55])  # on the way there, measuring, on the way back
def test_a_killed_run_goes_on_to_the_same_bytes(at: int, whole: Tensor, tmp_path: Path) -> None:
    def stop(call: int) -> None:
        if call == at:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if not child:
        torch.set_num_threads(1)
        run(tmp_path, stop)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    left = [path.name for path in tmp_path.iterdir()]
    assert any(name.startswith("state-") for name in left)
    assert ("progress.safetensors" in left) == (at > 50)
    (tmp_path / f".{32 * 'a'}.tmp").write_bytes(b"half a file")
    (tmp_path / "notes.txt").write_text("somebody's own")
    calls: list[int] = []
    again = run(tmp_path, calls.append)
    np.testing.assert_array_equal(again, whole)
    calls.clear()
    np.testing.assert_array_equal(run(tmp_path, calls.append), whole)
    assert (
        len(calls) == 11 + 8
    )  # the checks, the first step, batches and a target made again: a finished run only answers
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".lock",
        "notes.txt",
        "progress.safetensors",
        "run.json",
    ]


SCRIPT = """
import os, signal, sys
from pathlib import Path
from tests.retrain.test_magic_replay import run
def stop(call):
    if call == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
print(run(Path(sys.argv[1]), stop).numpy().tobytes().hex())
"""


@pytest.mark.slow
def test_a_killed_process_goes_on_to_the_same_bytes(whole: Tensor, tmp_path: Path) -> None:
    def process(at: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", SCRIPT, str(tmp_path), str(at)]
        return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent.parent)

    assert process(54).returncode == -signal.SIGKILL
    done = process(-1)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == whole.numpy().tobytes().hex()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batches": [[0, 1]] * 8}, "of other batches, data"),
        ({"clip": 0.1}, "of other optimizer;"),
        ({"optimizer": OPTIMIZERS["adam"]}, "of other optimizer;"),
        ({"rows_at_once": 2}, "of other settings;"),
    ],
)
def test_a_folder_is_one_runs(changes: dict[str, Any], words: str, whole: Tensor, tmp_path: Path) -> None:
    def stop(call: int) -> None:
        if call == 16:
            raise Killed

    with pytest.raises(Killed):
        run(tmp_path, stop)
    with pytest.raises(ValueError, match=f"belongs to another run, {words}"):
        run(tmp_path, **changes)


def test_losses_that_compute_something_else_are_found_by_replaying(tmp_path: Path) -> None:
    def stop(call: int) -> None:
        if call == 16:
            raise Killed

    with pytest.raises(Killed):
        run(tmp_path, stop)
    training, targets, weights = world(OPTIMIZERS["adamw"])

    def other(model: Any, batch: Any) -> Tensor:
        return 1.0001 * losses(model, batch)

    with pytest.raises(RuntimeError, match="step 0 was replayed to other numbers"):
        magic(replace(training, losses=other), targets, weights=weights, folder=tmp_path, directions=1)


def test_other_losses_are_found_where_the_rate_begins_at_0(tmp_path: Path) -> None:
    """Of plain SGD: states say nothing of the losses before the first step that moves."""
    training, targets, weights = world(SGD([0.0, 0.0, *RATES[2:]]))
    options: dict[str, Any] = {"weights": weights, "target_losses": losses, "folder": tmp_path, "directions": 0}
    magic(training, targets, **options)

    def other(model: Any, batch: Any) -> Tensor:
        return 1.0001 * losses(model, batch)

    with pytest.raises(RuntimeError, match="step 2 was replayed to other numbers"):
        magic(replace(training, losses=other), targets, **options)


def test_other_losses_that_neither_the_first_batch_nor_the_targets_show_are_found(tmp_path: Path) -> None:
    """As where a rare class weighs otherwise: a finished folder, which makes nothing again, answered for them."""
    training, targets, weights = world(OPTIMIZERS["momentum"])
    options: dict[str, Any] = {"weights": weights, "target_losses": losses, "folder": tmp_path, "directions": 0}
    magic(training, targets, **options)
    rare = next(row for row in training.rows[4] if row not in training.rows[0])

    def other(model: Any, batch: Any) -> Tensor:
        return losses(model, batch) * (1 + 0.1 * (batch[0] == training.data[0][rare]).all(1))

    with pytest.raises(
        RuntimeError, match=r"step .: after the run its batch's mean loss was .* its losses are other ones"
    ):
        magic(replace(training, losses=other), targets, **options)


def test_another_loss_of_the_targets_is_found_by_taking_it_again(tmp_path: Path) -> None:
    training, targets, _ = world(OPTIMIZERS["sgd"])
    for factor, error in ((1, None), (-1, "target 'a': its loss was .* or, where the run was resumed, another one")):

        def of_targets(model: Any, batch: Any, factor: int = factor) -> Tensor:
            return factor * losses(model, batch)

        with pytest.raises(RuntimeError, match=error) if error else contextlib.nullcontext():
            magic(training, targets, target_losses=of_targets, folder=tmp_path, directions=0)


def test_batches_of_which_no_fingerprint_says_what_they_hold_are_refused(tmp_path: Path) -> None:
    training, _, _ = world(OPTIMIZERS["adamw"])

    class Frame:
        def __init__(self, rows: Any) -> None:
            self.rows = rows

        def __iter__(self) -> Any:
            return iter(["x", "y"])  # its columns' names, as a data frame's

    def of_frame(model: Any, batch: Any) -> Tensor:
        rows = torch.from_numpy(batch.rows) if isinstance(batch, Frame) else batch
        return losses(model, (x[rows], y[rows]))

    x, y = training.data
    framed = replace(training, data=Frame, samples=len(x), losses=of_frame)
    on_rows = {"t": [torch.tensor([0])]}
    assert magic(framed, on_rows, directions=0).scores[:5].isfinite().all()
    with pytest.raises(TypeError, match="a batch holds a Frame, of which a folder cannot tell"):
        magic(framed, on_rows, directions=0, folder=tmp_path)


def test_a_folder_is_one_processes(tmp_path: Path) -> None:
    run(tmp_path)
    with open(tmp_path / ".lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process is working in"):
            run(tmp_path)


def test_broken_files_are_named(tmp_path: Path) -> None:
    run(tmp_path)
    (tmp_path / "progress.safetensors").write_bytes(b"\x00" * 40)
    with pytest.raises(ValueError, match=r"progress\.safetensors: cannot be read .*; delete the file"):
        run(tmp_path)
    (tmp_path / "run.json").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"run\.json: is no description of a run"):
        run(tmp_path)
