"""Rows drawn by score: proportions, epochs, shares of processes, resuming, refusals."""

from __future__ import annotations

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch.distributed as dist
from torch.utils.data import DataLoader

from assay import select
from assay.engine.local import run
from assay.recipe.recipe import load_recipe
from assay.train import WeightedSampler
from tests.small_project import make_rows


def table(scores, rows=None, keep="high") -> pa.Table:
    values = pa.array(np.asarray(scores, np.float32))
    field = pa.field("s", pa.float32(), metadata={"keep": keep})
    rows = list(range(len(values))) if rows is None else rows
    schema = pa.schema([pa.field("row", pa.int64()), pa.field("id", pa.string()), field])
    return pa.Table.from_arrays([pa.array(rows, pa.int64()), pa.array([f"s{r}" for r in rows]), values], schema=schema)


def scores(count: int) -> np.ndarray:
    return np.random.default_rng(0).random(count) + 0.1


@pytest.mark.parametrize("temperature", [None, 0.7])
def test_rows_come_as_often_as_their_scores_say(temperature):
    values = np.array([0.0, 1.0, 2.0, np.nan, 4.0])
    drawn = np.bincount(list(WeightedSampler(table(values), "s", num_samples=50_000, temperature=temperature)))
    worth = np.nan_to_num(values if temperature is None else np.exp(values / temperature), nan=0.0)
    expected = 50_000 * worth / worth.sum()
    assert (drawn[worth == 0] == 0).all()
    assert (np.abs(drawn - expected) <= 5 * np.sqrt(expected)).all()


def test_of_a_score_that_is_better_low_the_low_ones_come():
    drawn = np.bincount(list(WeightedSampler(table([0.0, 1.0], keep="low"), "s", num_samples=1000, temperature=0.2)))
    assert drawn[0] > 950


def test_without_replacement_it_is_the_selections_own_draw_in_an_order_of_no_meaning():
    sampler = WeightedSampler(table(scores(400)), "s", num_samples=0.5, replacement=False, seed=3)
    drawn = list(sampler)
    assert len(set(drawn)) == len(drawn) == 200
    expected = select.sample(table(scores(400)), "s", 0.5, sampler._seed(0)).indices
    assert sorted(drawn) == expected.tolist()
    halves = scores(400)[drawn].reshape(2, 100).mean(1)
    assert abs(halves[0] - halves[1]) < 0.12  # a draw without replacement brings the best first
    assert drawn != sorted(drawn)


def test_epochs_differ_and_follow_from_seed_and_epoch_alone():
    first, other = WeightedSampler(table(scores(50)), "s"), WeightedSampler(table(scores(50)), "s", seed=1)
    epochs = [list(first) for _ in range(3)]
    assert first.epoch == 2
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert list(other) not in epochs
    again = WeightedSampler(table(scores(50)), "s")
    for epoch in (2, 0, 1):
        again.set_epoch(epoch)
        assert list(again) == epochs[epoch]
    again.set_epoch(0)
    next(iter(again))  # an epoch that was left is over
    assert list(again) == epochs[1]


def test_indices_are_the_tables_rows():
    drawn = list(WeightedSampler(table([1, 1, 1], rows=[7, 2, 40]), "s", num_samples=60))
    assert set(drawn) == {7, 2, 40}
    plain = pa.table({"weight": [0.0, 3.0, None]})
    assert set(WeightedSampler(plain, "weight", num_samples=20)) == {1}
    joined = datasets.Dataset.from_dict({"id": ["a", "b", "c"], "s": [0.0, 1.0, 0.0]})
    assert list(WeightedSampler(joined.select([2, 1, 0]), "s", keep="high")) == [1]


def test_processes_share_one_sequence_out():
    whole = list(WeightedSampler(table(scores(50)), "s", num_samples=11, world_size=1))
    parts = [WeightedSampler(table(scores(50)), "s", num_samples=11, rank=r, world_size=3) for r in range(3)]
    assert [len(part) for part in parts] == [3, 3, 3]
    shares = [list(part) for part in parts]
    assert [row for step in zip(*shares, strict=True) for row in step] == whole[:9]
    with pytest.raises(ValueError, match="2 rows for 3 processes"):
        iter(WeightedSampler(table(scores(50)), "s", num_samples=2, rank=0, world_size=3))


def test_who_shares_out_must_be_said_where_several_processes_train(monkeypatch):
    sampler = WeightedSampler(table(scores(50)), "s")
    shared = WeightedSampler(table(scores(50)), "s", world_size=2)
    with pytest.raises(RuntimeError, match="expected rank="):
        len(shared)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)
    monkeypatch.setattr(dist, "get_rank", lambda group=None: 1)
    with pytest.raises(RuntimeError, match="nothing said who shares the rows out: expected world_size=1 where"):
        list(sampler)
    assert len(list(WeightedSampler(table(scores(50)), "s", world_size=1))) == 50
    assert list(shared) == list(WeightedSampler(table(scores(50)), "s", rank=1, world_size=2))


@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_an_epoch_goes_on_where_it_was(before, after):
    def make(rank=0, world_size=1):
        return WeightedSampler(table(scores(40)), "s", num_samples=24, rank=rank, world_size=world_size)

    whole = make()
    whole.set_epoch(5)
    expected = list(whole)
    sampler = make(0, before)
    sampler.set_epoch(5)
    walk = iter(sampler)
    for _ in range(6):
        next(walk)
    state = sampler.state_dict()
    resumed = [make(rank, after) for rank in range(after)]
    for one in resumed:
        one.load_state_dict(state)
    shares = [list(one) for one in resumed]
    assert [row for step in zip(*shares, strict=True) for row in step] == expected[6 * before :]
    for one in resumed:  # at its end, the next epoch comes first
        one.load_state_dict(resumed[0].state_dict())
    whole.set_epoch(6)
    assert [row for step in zip(*resumed, strict=True) for row in step] == list(whole)
    fetched = sampler.state_dict(position=4)  # workers had fetched more than was trained on
    resumed[0].load_state_dict(fetched)
    assert next(iter(resumed[0])) == expected[4]
    with pytest.raises(ValueError, match="that of other draws"):
        WeightedSampler(table(scores(40)), "s", num_samples=24, seed=1).load_state_dict(state)


def test_a_curriculum_draws_from_more_rows_each_epoch():
    values = scores(40)
    best = np.argsort(-values)
    sampler = WeightedSampler(table(values), "s", replacement=False, curriculum=[0.25, 0.5, 1.0])
    for epoch, count in enumerate((10, 20, 40, 40)):
        sampler.set_epoch(epoch)
        assert len(sampler) == count
        drawn = list(sampler)
        assert sorted(drawn) == sorted(best[:count])
        assert drawn != sorted(drawn)
    constant = WeightedSampler(table(values), "s", num_samples=64, curriculum=[0.25, 1.0])
    epochs = [list(constant), list(constant)]
    assert [len(epoch) for epoch in epochs] == [64, 64]
    assert set(epochs[0]) <= set(best[:10])
    assert set(epochs[1]) - set(best[:10])


def test_a_folder_of_scores_counts_rows_over_shards(project):
    rows = make_rows(20, 5)
    rows[3]["label"] = None
    project.write_shard("bad.jsonl", rows)
    (project.root / "data/torn.parquet").write_bytes(b"PAR1")
    run(load_recipe(str(project.path)))
    with pytest.raises(ValueError, match=r"torn\.parquet could not be read"):
        WeightedSampler(str(project.scores), "mimic", temperature=1.0)
    (project.root / "data/torn.parquet").unlink()
    sampler = WeightedSampler(project.scores, "mimic", temperature=1.0, num_samples=3000)
    drawn = set(sampler)
    assert len(sampler) == 3000
    assert max(drawn) == 99
    assert 53 not in drawn  # a.parquet has 50 rows, and the fourth of bad.jsonl is in quarantine
    assert len(drawn) > 70


def test_a_loader_takes_it():
    data = datasets.Dataset.from_dict({"x": list(range(30))})
    sampler = WeightedSampler(table(scores(30)), "s", num_samples=12)
    loader = DataLoader(data, batch_size=4, sampler=sampler)
    found = [[x for batch in loader for x in batch["x"].tolist()] for _ in range(2)]
    again = WeightedSampler(table(scores(30)), "s", num_samples=12)
    assert found == [list(again), list(again)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WeightedSampler(table([1, 2]), "t"), "by='t': there is no such column; there are s"),
        (lambda: WeightedSampler([1.0], "s"), "scores of type list"),
        (lambda: WeightedSampler(table([1, np.inf]), "s"), "row 1 of the table is infinite"),
        (lambda: WeightedSampler(table([1, -1]), "s"), "goes down to -1, no proportion; pass a temperature"),
        (lambda: WeightedSampler(table([np.nan, 0]), "s"), "no row can be drawn"),
        (lambda: WeightedSampler(table([1, 1], rows=[3, 3]), "s"), "row 3 occurs 2 times in the table"),
        (lambda: WeightedSampler(table([1, 1], rows=[3, -3]), "s"), "row -3 in the table"),
        (lambda: WeightedSampler(table([1, 1]).drop_columns("row"), "s"), "assay.train.join"),
        (lambda: WeightedSampler(pa.table({"s": [1.0]}), "s"), "say high or low: keep='high'"),
        (lambda: WeightedSampler(pa.table({"s": [[1.0]]}), "s"), "holds list<item: double> per row"),
        (lambda: WeightedSampler(table([1, 0]), "s", num_samples=2, replacement=False), "leaves 1; lower it"),
        (lambda: WeightedSampler(table([1, 1]), "s", replacement=False), "every row would come once"),
        (lambda: WeightedSampler(table([1, 1]), "s", num_samples=0), "num_samples=0: expected a whole number"),
        (lambda: WeightedSampler(table([1, 1]), "s", curriculum=[0.5, 2]), "shares in (0, 1], one per epoch"),
        (lambda: WeightedSampler(table([1, 1]), "s", seed=-1), "seed=-1"),
        (lambda: WeightedSampler(table([1, 1]), "s", rank=1), "rank=1 without world_size"),
        (lambda: WeightedSampler(table([1, 1]), "s", rank=2, world_size=2), "expected 0 to 1"),
        (lambda: WeightedSampler(table([1, 1]), "s", corpus_path="data"), "goes with the path of a scores folder"),
    ],
)
def test_what_cannot_be_drawn_is_refused(make, message):
    with pytest.raises((ValueError, TypeError)) as error:
        make()
    assert message in str(error.value)
