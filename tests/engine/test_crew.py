"""Several workers: the bytes of one, whatever dies, and nothing left behind."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import random
import signal
import threading
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from assay.corpus.errors import CorpusError
from assay.corpus.storage import Store
from assay.engine import crew, local, messages, processes, shard, units, worker
from assay.engine.crew import DIED_TWICE
from assay.engine.local import run
from assay.engine.progress import Progress
from assay.engine.shard import BLOCK_WINDOWS
from assay.engine.timing import Times
from assay.recipe import models
from assay.recipe.errors import EngineError
from assay.recipe.recipe import load_recipe
from tests.engine import odd_workers, test_text, unimportable
from tests.small_project import make_project, make_rows

TWO = "run.devices='cpu,cpu'"
# What a worker imports, some of it with its first batch.
PRELOADED = ["assay.cli", "assay.engine.worker", "assay.engine.local", "torch._dynamo", "fsspec.implementations.local"]
BLOCK = BLOCK_WINDOWS * odd_workers.SMALL_WINDOW


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _forked(monkeypatch):
    """Workers forked from a process that has imported everything; how one really starts has a test of its own."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    monkeypatch.setattr(processes, "START", "forkserver")
    yield
    assert multiprocessing.active_children() == []


def score(project, *overrides, **options):
    return run(load_recipe(str(project.path), overrides), **options)


def written(folder):
    """Everything that a run leaves under ``folder`` but the recipe, which says where it ran."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "recipe.resolved.yaml"
    }


def odd(monkeypatch, name):
    monkeypatch.setattr(processes.worker, "main", getattr(odd_workers, name))


class Counts(Progress):
    def __init__(self):
        self.rows, self.size, self.shards, self.finished = 0, 0.0, 0, 0

    def start(self, shards, size):
        self.shards, self.whole = shards, size

    def advance(self, rows, size):
        self.rows += rows
        self.size += size

    def finish_shard(self):
        self.finished += 1


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A shard of more than three blocks, with bad rows in all of them and an id that comes back in the last; another
    whose first block has no sample; and three small ones. Scored by one."""
    project = make_project(tmp_path_factory.mktemp("large"))
    rows = make_rows(3 * BLOCK + 100, 7)
    for i in (5, 6, BLOCK - 1, BLOCK, 2 * BLOCK + 17):
        rows[i]["label"] = None
    rows[3 * BLOCK + 50]["id"] = rows[3]["id"]
    project.write_shard("large.parquet", rows)
    project.write_shard("none.jsonl", [])
    bare = [{"id": f"x{i}", "pixels": row["pixels"], "label": None} for i, row in enumerate(rows[:BLOCK])]
    project.write_shard("late.parquet", bare + make_rows(BLOCK, 8))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard, "WINDOW_ROWS", odd_workers.SMALL_WINDOW)
        score(project, "output=one", "run.devices=cpu")
    return project


@pytest.fixture
def small_blocks(monkeypatch):
    odd(monkeypatch, "small_windows")
    monkeypatch.setattr(units, "SPLIT_BYTES", 10_000)


def test_two_workers_write_the_bytes_of_one(large, small_blocks, caplog):
    caplog.set_level(logging.INFO, "assay")
    progress = Counts()
    summary = score(large, TWO, "output=two", progress=progress)
    one, two = (written(large.root / name) for name in ("one", "two"))
    assert sorted(one) == sorted(two)
    assert [path for path in one if one[path] != two[path]] == []
    assert summary.workers == 2
    assert summary.rows_quarantined == 6 + BLOCK
    assert (progress.finished, progress.shards) == (5, 5)
    assert progress.size == pytest.approx(progress.whole)
    # The methods learn from the first samples, which a part with the shard's first block does not hold here.
    assert "late.parquet: has too few samples at its beginning for several workers" in caplog.text
    assert "large.parquet: has too few" not in caplog.text
    assert any("in 2 workers" in line for line in summary.lines())


def test_a_part_of_the_shards_and_several_workers(large, small_blocks):
    assert [score(large, TWO, "output=parted", part=(i, 2)).done_before for i in (1, 2)] == [0, 0]
    assert written(large.root / "one") == written(large.root / "parted")


def test_a_shard_that_breaks_in_the_middle_leaves_no_part(large, small_blocks):
    path = large.root / "cut/large.parquet"
    path.parent.mkdir()
    whole = (large.root / "data/large.parquet").read_bytes()
    path.write_bytes(whole[: len(whole) // 2] + b"\xff" * 2000 + whole[len(whole) // 2 + 2000 :])
    summary = score(large, TWO, "output=broken", "corpus.path=cut")
    assert set(summary.unreadable) == {"large.parquet"}
    assert set(written(large.root / "broken")) == {"manifest.json", "quarantine/large.jsonl"}


def test_unreadable_shards_are_the_same_whoever_finds_them(project):
    whole = (project.root / "data/a.parquet").read_bytes()
    (project.root / "data/cut.parquet").write_bytes(whole[:-100])
    project.write_shard("column.parquet", [{"id": "x", "label": 0}])
    one, two = score(project, "output=one", "run.devices=cpu"), score(project, TWO, "output=two")
    assert one.unreadable == two.unreadable
    assert list(one.unreadable) == list(two.unreadable) == ["column.parquet", "cut.parquet"]
    assert (one.rows, one.nan, one.warnings) == (two.rows, two.nan, two.warnings)
    assert written(project.root / "one") == written(project.root / "two")


def test_kept_features_are_those_of_one_worker(project, monkeypatch):
    monkeypatch.setattr(units, "SPLIT_BYTES", 1)  # but a shard whose features are kept is one unit
    methods = [{"method": "trak", "models": ["a"], "keep_features": "float16", "sketch": {"kind": "sparse", "dim": 8}}]
    project.write_recipe(methods=methods, targets={"t": {"path": "data/a.parquet"}})
    score(project, "output=one", "run.devices=cpu")
    score(project, TWO, "output=two")
    assert any("features" in path for path in written(project.root / "one"))
    assert written(project.root / "one") == written(project.root / "two")
    project.write_recipe(methods=methods, targets={"t": {"path": "data/deep/b.jsonl"}})
    assert score(project, TWO, "output=two", rescore=True).reused == 2


@pytest.mark.parametrize("split", [pytest.param(1, marks=pytest.mark.slow), 1 << 30])
def test_what_a_dead_worker_had_is_done_again(project, monkeypatch, caplog, split):
    monkeypatch.setattr(units, "SPLIT_BYTES", split)
    odd(monkeypatch, "dies_once_on_each")
    progress = Counts()
    summary = score(project, TWO, progress=progress)
    assert summary.clean
    assert (summary.scored, progress.rows) == (2, 80)
    assert progress.size == pytest.approx(progress.whole)
    assert "a worker died on it (killed by SIGKILL); another one tries again" in caplog.text
    score(project, "output=alone", "run.devices=cpu")
    assert written(project.scores) == written(project.root / "alone")


@pytest.mark.parametrize("split", [1, pytest.param(1 << 30, marks=pytest.mark.slow)])
def test_a_shard_on_which_two_die_is_quarantined(project, monkeypatch, split):
    monkeypatch.setattr(units, "SPLIT_BYTES", split)
    project.write_shard("deadly.jsonl", make_rows(20, 3))
    odd(monkeypatch, "dies_on_deadly")
    summary = score(project, TWO)
    assert summary.unreadable == {"deadly.jsonl": f"{DIED_TWICE} (the last one was killed by SIGKILL)"}
    assert (summary.scored, summary.rows_scored) == (2, 80)
    assert [(path, row) for path, row, *_ in project.quarantine()] == [("deadly.jsonl", None)]
    assert [path for path in written(project.scores) if path.endswith(".tmp")] == []
    monkeypatch.undo()
    monkeypatch.setattr(processes, "START", "forkserver")
    again = score(project, TWO)
    assert (again.done_before, again.scored, again.clean) == (2, 1, True)
    assert project.quarantine() == []


class Obedient:
    """A worker of this process, which does what it is told at once and is heard when the staff says so."""

    device = "cpu"

    def __init__(self, place, dies):
        self.place, self.words, self.dies = place, [], dies

    def tell(self, message):
        if isinstance(message, messages.Setup):
            self.workshop, self.output = worker.open_for(message)
            self.words.append(messages.Ready(self.workshop.columns, None, Times()))
        else:
            done = None if self.dies else worker.work(self.workshop, self.output, message, lambda said: None)
            self.words += [messages.Began(), done]

    def hear(self):
        return self.words.pop(0)

    def end_of(self):
        return "killed", True


class Cluster:
    """Hears its workers one at a time, first who has but one word to say, in the order in which they were hired; the
    first one dies of its first unit."""

    sees_local_files, advice, keeps = True, "", 1

    def __init__(self):
        self.hired, self.gone = [], []

    def hire(self, place):
        self.hired.append(Obedient(place, dies=not self.hired))
        return self.hired[-1]

    def wait(self, hands, seconds):
        return [min((hand for hand in hands if hand.words), key=lambda hand: len(hand.words))]

    def let_go(self, hand):
        self.gone.append(self.hired.index(hand))

    def dismiss(self):
        assert len(self.hired) - len(self.gone) == 2  # and one of them has died

    def end(self):
        pass


def test_who_has_nothing_left_to_do_leaves_and_whoever_dies_then_has_a_successor(project, monkeypatch):
    """The first worker has one of two shards, the second the other: the third leaves before it has started. The first
    one dies, its successor takes its shard, and the second, when it has done its own, leaves too."""
    score(project, "run.devices=cpu", "output=alone")
    cluster = Cluster()
    monkeypatch.setattr(local, "Processes", lambda: cluster)
    monkeypatch.setattr(local, "units_at_most", lambda *_: 3)
    summary = score(project, "run.devices='cpu,cpu,cpu'")
    assert (summary.workers, summary.scored, summary.clean) == (3, 2, True)
    assert len(cluster.hired) == 4
    assert cluster.gone == [2, 1]
    assert written(project.scores) == written(project.root / "alone")


def test_a_worker_that_cannot_start_is_one_line(project, monkeypatch, capfd):
    monkeypatch.setattr(processes, "START", "spawn")
    monkeypatch.setattr(processes.worker, "main", unimportable.main)
    with pytest.raises(EngineError, match=r"the worker on cpu ended before it could start \(exit code 1\)") as caught:
        score(project, TWO)
    assert "\n" not in str(caught.value)
    assert "no_such_module" in capfd.readouterr().err
    assert project.tables() == {}


def test_a_worker_that_is_killed_as_it_starts_has_a_second_chance(project, monkeypatch):
    odd(monkeypatch, "killed_while_it_starts")
    with pytest.raises(EngineError, match=r"ended before it could start \(killed by SIGKILL\)"):
        score(project, TWO)


def test_a_worker_that_dies_while_it_is_told_much_is_one_line(project, monkeypatch):
    setup = crew.Setup
    monkeypatch.setattr(crew, "Setup", lambda recipe, *rest: setup(recipe | {"much": "x" * (4 << 20)}, *rest))
    odd(monkeypatch, "dies_before_it_listens")
    with pytest.raises(EngineError, match=r"the worker on cpu ended before it could start \(exit code 3\)"):
        score(project, TWO)


def test_no_process_for_a_worker_is_one_line(project, monkeypatch):
    def start(self):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(multiprocessing.context.ForkServerProcess, "start", start)
    with pytest.raises(EngineError, match=r"^run\.devices: no worker can be started on cpu .*temporarily unavailable"):
        score(project, TWO)


def test_an_interrupt_while_a_worker_starts_ends_it(project, monkeypatch):
    real, pids = multiprocessing.context.ForkServerProcess.start, []

    def start(self):
        real(self)
        pids.append(self.pid)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)  # a thread that does not block the signal takes it meanwhile

    waiting = threading.Event()
    threading.Thread(target=waiting.wait, daemon=True).start()
    monkeypatch.setattr(multiprocessing.context.ForkServerProcess, "start", start)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    collected: list = []  # what would keep the pipe of a forgotten worker open
    new = processes.WorkerProcess
    monkeypatch.setattr(processes, "WorkerProcess", lambda *rest: collected.append(new(*rest)) or collected[-1])
    try:
        with pytest.raises(KeyboardInterrupt):
            score(project, TWO)
    finally:
        waiting.set()
        signal.signal(signal.SIGINT, before)
    assert len(pids) == 1
    assert alive(pids) == []


def test_a_model_that_is_overwritten_meanwhile_is_not_scored_with(project, monkeypatch):
    odd(monkeypatch, "finds_another_model")
    with pytest.raises(
        EngineError, match=r"^models\.b: has changed since the run began, .*; run again, with --rescore"
    ):
        score(project, TWO)
    assert project.tables() == {}


def test_weights_are_hashed_once_for_all_workers(project, monkeypatch):
    monkeypatch.setattr(models, "_SETTLED_NS", -(1 << 62))  # they have just been written
    odd(monkeypatch, "reads_no_model_for_its_hash")
    assert score(project, TWO).clean


def test_workers_trust_the_modules_that_the_caller_trusts(project, monkeypatch):
    (project.root / "mymodels.py").write_text(
        "import torch\n\ndef make(seed):\n    torch.manual_seed(seed)\n    return torch.nn.Linear(6, 3)\n"
    )
    monkeypatch.syspath_prepend(str(project.root))
    models = {
        name: {"kind": "python", "factory": "mymodels:make", "arguments": {"seed": i}} for i, name in enumerate("ab")
    }
    task = {**project.recipe["task"], "shape": [6]}
    project.write_recipe(models=models, task=task, methods=[{"method": "ensemble", "models": ["a", "b"]}])
    for devices in ("cpu", "cpu,cpu"):
        loaded = load_recipe(str(project.path), [f"run.devices='{devices}'", f"output={devices}"], ["mymodels"])
        assert run(loaded).clean
    assert written(project.root / "cpu") == written(project.root / "cpu,cpu")


def test_workers_know_what_the_columns_tell(project):
    """Labels by name: the task is then as the plan has it, not as its keys alone would make it."""
    for i, path in enumerate(("named/a.parquet", "named/b.parquet")):
        rows = [row | {"label": "cab"[row["label"]]} for row in make_rows(20, i)]
        project.write_shard(f"../{path}", rows)
    project.write_recipe(task=project.recipe["task"] | {"labels": ["c", "a", "b"]})
    for name, devices in (("one", "run.devices=cpu"), ("two", TWO)):
        score(project, devices, f"output={name}", "corpus.path=named")
    one, two = (pq.read_table(project.root / name / "a.parquet") for name in ("one", "two"))
    assert one.num_rows == 20
    assert one.equals(two)
    assert written(project.root / "one") == written(project.root / "two")


@pytest.mark.slow
def test_numbers_per_token_of_a_language_model_in_parts(tmp_path, monkeypatch):
    """Lists in a table, a tokenizer in every worker, and batches by length."""
    monkeypatch.setattr(units, "SPLIT_BYTES", 1)
    odd(monkeypatch, "small_windows")
    rng = random.Random(0)
    texts = [" ".join(rng.choices(test_text.WORDS[1:], k=rng.randint(1, 20))) for _ in range(2 * BLOCK + 9)]
    path = test_text.write_text_project(tmp_path, [json.dumps({"text": text}) for text in texts], 500, tokens=True)
    with monkeypatch.context() as patch:
        patch.setattr(shard, "WINDOW_ROWS", odd_workers.SMALL_WINDOW)
        run(load_recipe(str(path), ["output=one", "run.devices=cpu"]))
    run(load_recipe(str(path), ["output=two", TWO]))
    assert any(pa.types.is_list(field.type) for field in pq.read_schema(tmp_path / "one/a.parquet"))
    assert written(tmp_path / "one") == written(tmp_path / "two")


def test_what_does_not_fit_together_is_said_as_by_one(project):
    for devices in (TWO, "run.devices=cpu"):
        with pytest.raises(EngineError, match=r"^task\.classes is 4, but models\.a has 3 outputs$"):
            score(project, devices, "task.classes=4")
    assert not project.scores.exists()


def test_a_file_system_of_this_process_alone_is_refused(project):
    with pytest.raises(CorpusError, match=r"memory://.* lives in one process"):
        score(project, TWO, "output=memory://crew/scores")


def _run(recipe: str) -> None:
    run(load_recipe(recipe, [TWO]))


def alive(pids) -> list[int]:
    found = []
    for pid in pids:
        try:
            state = open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0]  # noqa: SIM115
        except FileNotFoundError:
            continue
        if state != "Z":
            found.append(pid)
    return found


def wait_for(condition) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_no_worker_outlives_the_process_that_started_it(project, monkeypatch):
    """Workers start here as they do for everybody."""
    monkeypatch.setattr(processes, "START", "spawn")
    for i in range(20):
        project.write_shard(f"{i:02}.jsonl", make_rows(10, 50 + i))
    odd(monkeypatch, "slow")
    parent = multiprocessing.get_context("fork").Process(target=_run, args=(str(project.path),))
    parent.start()
    wait_for(lambda: len(project.tables()) >= 3)
    pids = [int(path.name) for path in (project.root / "pids").iterdir()]
    assert len(alive(pids)) == 2
    os.kill(parent.pid, signal.SIGKILL)
    parent.join()
    wait_for(lambda: not alive(pids))
    monkeypatch.undo()
    monkeypatch.setattr(processes, "START", "forkserver")
    done = len(project.tables())
    assert score(project, TWO).done_before == done >= 3
    score(project, "output=alone", "run.devices=cpu")
    Store.at(str(project.scores)).sweep(older_than=0)
    assert written(project.scores) == written(project.root / "alone")


def test_an_interrupt_ends_all_workers(project, monkeypatch):
    for i in range(20):
        project.write_shard(f"{i:02}.jsonl", make_rows(10, 50 + i))
    odd(monkeypatch, "slow")

    class Interrupting(Progress):
        def finish_shard(self):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(project, TWO, progress=Interrupting())
    assert alive(int(path.name) for path in (project.root / "pids").iterdir()) == []


class Killer(threading.Thread):
    """Kills a random worker at random moments, until it has done so ``kills`` times or is stopped."""

    def __init__(self, kills, pause):
        super().__init__(daemon=True)
        self.left, self.pause, self.rng, self.stopped = kills, pause, random.Random(0), threading.Event()

    def run(self):
        while self.left and not self.stopped.wait(self.rng.random() * self.pause):
            workers = [p for p in multiprocessing.active_children() if p.name == "assay-worker" and p.pid]
            if workers:
                os.kill(self.rng.choice(workers).pid, signal.SIGKILL)
                self.left -= 1


@pytest.mark.slow
@pytest.mark.parametrize("kills", [4, 20])
def test_kills_at_random_moments_lose_nothing_and_double_nothing(project, small_blocks, monkeypatch, kills):
    for i in range(3 * kills):
        project.write_shard(f"part{i % 3}/{i:03}.jsonl", make_rows(30, 100 + i))
    project.write_shard("large.parquet", make_rows(4 * BLOCK, 99))
    monkeypatch.setattr(shard, "WINDOW_ROWS", odd_workers.SMALL_WINDOW)
    score(project, "output=alone", "run.devices=cpu")
    killer, runs, errors = Killer(kills, 1.0), 0, []
    killer.start()
    while True:
        runs += 1
        try:
            summary = score(project, TWO)
        except EngineError as error:  # two kills of one worker as it starts
            errors.append(str(error))
            continue
        if summary.clean and (not killer.left or runs > 3 * kills):
            break
        if not summary.clean:
            assert all(reason.startswith(DIED_TWICE) for reason in summary.unreadable.values())
        elif killer.left:  # it was over before the kills were
            for path in random.Random(runs).sample(sorted(project.tables()), 2 * len(project.tables()) // 3):
                (project.scores / path).unlink()
    killer.stopped.set()
    killer.join()
    assert killer.left == 0
    assert all("before it could start" in error for error in errors)
    Store.at(str(project.scores)).sweep(older_than=0)
    assert written(project.scores) == written(project.root / "alone")
    ids = [i for path in project.tables() for i in pq.read_table(project.scores / path)["id"].to_pylist()]
    assert len(ids) == len(set(ids)) == 3 * kills * 30 + 4 * BLOCK + 80
