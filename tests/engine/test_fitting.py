"""Fits in parts: the same bits whoever makes them, and nothing is made again that is there."""

from __future__ import annotations

import pytest
import torch

from assay.corpus.layout import FITS
from assay.corpus.storage import Store
from assay.engine import fitting, pool
from assay.engine.fitting import Together
from assay.engine.local import run
from assay.recipe.recipe import load_recipe
from tests.engine import odd_workers
from tests.engine.test_crew import _forked, odd, written  # noqa: F401
from tests.small_project import make_rows

COUNT, SKETCH = 5, {"kind": "kronecker", "rows": 2, "cols": 2}
METHODS = [
    {"method": "ekfac", "model": "b", "self_influence": True},
    {"method": "trackstar", "models": ["a", "b"], "sketch": SKETCH},
    {"method": "leverage", "model": "b"},
]


class Parts:
    """States to be made, and which were."""

    def __init__(self, size: int = 3) -> None:
        self.made, self.size, self.fails_at = list[int](), size, -1

    def __call__(self, i: int) -> dict:
        if i == self.fails_at:
            raise KeyboardInterrupt
        self.made.append(i)
        return {"sums": {"w": torch.full((self.size,), i / 3)}, "left_out": {"b": "why"}, "count": i, "kind": [i]}


def worker(root, turn=(0, 1), key="k") -> Together:
    together = Together(Store.at(str(root)), key, torch.device("cpu"), turn)
    together.begin("0")
    return together


def told(states) -> list[str]:
    return [str(state) for state in states]


def expected(parts: Parts) -> list[str]:
    return [str(parts(i)) for i in range(COUNT)]


@pytest.mark.parametrize("store", ["", "memory://fits"])
def test_workers_take_what_is_there_and_make_the_rest(tmp_path, store):
    root, parts = store or tmp_path, Parts()
    parts.fails_at = 3
    first = worker(root, (1, 2))
    with pytest.raises(KeyboardInterrupt):
        list(first.states(COUNT, parts, None))
    assert parts.made == [2]
    second, others = Parts(), Parts()
    assert told(worker(root, (0, 2)).states(COUNT, second, None)) == expected(Parts())
    assert second.made == [0, 1, 4, 3]
    assert told(worker(root, (2, 3)).states(COUNT, others, None)) == expected(Parts())
    assert others.made == []


def test_states_of_another_fit_pass_or_basis_are_not_taken(tmp_path):
    one = worker(tmp_path)
    basis = {"w": [torch.eye(2), None]}
    list(one.states(COUNT, Parts(), basis))
    again, turned, later, other = Parts(), Parts(), Parts(), Parts()
    list(worker(tmp_path).states(COUNT, again, {"w": [torch.eye(2), None]}))
    list(worker(tmp_path).states(COUNT, turned, {"w": [-torch.eye(2), None]}))
    list(one.states(COUNT, later, basis))
    list(worker(tmp_path, key="another").states(COUNT, other, basis))
    assert [len(each.made) for each in (again, turned, later, other)] == [0, COUNT, COUNT, COUNT]


def test_a_damaged_state_is_made_again(tmp_path, caplog):
    list(worker(tmp_path).states(COUNT, Parts(), None))
    damaged = sorted((tmp_path / FITS).rglob("*.pt"))[2]
    damaged.write_bytes(damaged.read_bytes()[:100])
    parts = Parts()
    assert told(worker(tmp_path).states(COUNT, parts, None)) == expected(Parts())
    assert parts.made == [2]
    assert "is no part of a fit" in caplog.text


@pytest.mark.parametrize("turn", [(0, 1), (1, 2)])
def test_what_takes_longer_to_read_than_to_make_is_not_left(tmp_path, monkeypatch, turn):
    monkeypatch.setattr(fitting, "_BYTES_PER_SECOND", 0.0)
    parts = Parts(1 << 19)
    assert told(worker(tmp_path, turn).states(COUNT, parts, None)) == expected(Parts(1 << 19))
    assert sorted(parts.made) == list(range(COUNT))
    assert not (tmp_path / FITS).exists()


# -- whole runs


@pytest.fixture
def fitted(project):
    project.write_shard("../targets/x.jsonl", make_rows(30, 8))
    project.write_shard("third.jsonl", make_rows(5, 2))  # as many units as workers
    project.recipe.update(methods=METHODS, targets={"x": {"path": "targets/x.jsonl"}}, fit={"samples": 60})
    project.write_recipe()
    return project


def score(project, output, devices=1, **options):
    overrides = [f"output={output}", f"run.devices='{','.join(['cpu'] * devices)}'"]
    return run(load_recipe(str(project.path), overrides), **options)


@pytest.fixture
def alone(fitted, monkeypatch):
    """What one process writes."""
    monkeypatch.setattr(pool, "PART_SAMPLES", odd_workers.SMALL_PART)
    score(fitted, "alone")
    return written(fitted.root / "alone")


@pytest.mark.parametrize(("workers", "name"), [(2, "dies_once_in_a_fit"), (3, "tells_of_parts")])
def test_several_workers_fit_the_bits_of_one(fitted, alone, monkeypatch, workers, name):
    odd(monkeypatch, name)
    score(fitted, "together", workers)
    assert written(fitted.root / "together") == alone
    made = (fitted.root / "made").read_text().splitlines()
    assert len(made) < workers * len(set(made))
    assert (fitted.root / "died").exists() == (name == "dies_once_in_a_fit")


def test_a_shard_that_cannot_be_read_keeps_nobody_from_clearing(fitted, monkeypatch):
    monkeypatch.setattr(pool, "PART_SAMPLES", odd_workers.SMALL_PART)
    fitted.write_shard("torn.parquet", []).write_bytes(b"PAR1")
    left = [score(fitted, "shared", part=(i, 2)) and (fitted.root / "shared" / FITS).exists() for i in (1, 2)]
    assert left == [True, False]


def test_runners_on_parts_of_a_corpus_fit_together(fitted, alone, monkeypatch):
    made, before = [], Together._made
    monkeypatch.setattr(Together, "_made", lambda self, path, *how: (made.append(path), before(self, path, *how))[1])
    score(fitted, "shared", part=(2, 2))
    assert len(made) == len(set(made)) > 0
    assert list((fitted.root / "shared" / FITS).rglob("*.pt"))
    score(fitted, "shared", part=(1, 2))
    assert len(made) == len(set(made))
    assert written(fitted.root / "shared") == alone  # and what was left of the fits is gone
