"""Where the time went, in words that name the right part."""

from __future__ import annotations

import time

import pytest

from assay.engine.local import run
from assay.engine.timing import Times
from assay.recipe.recipe import load_recipe


@pytest.mark.parametrize(
    ("times", "bottleneck"),
    [
        (Times(read=9, encode=1, wait=1, model=5), "model"),  # reading took longer, but beside the model
        (Times(read=9, encode=1, wait=6, model=5), "read"),
        (Times(read=1, encode=9, wait=6, model=5), "prepare"),
        (Times(encode=2, wait=1, collate=5, model=5), "prepare"),
        (Times(ops=3, model=2, write=1), "ops"),
        (Times(load=7, model=2, write=1), "load"),
        (Times(model=2, write=3), "write"),
    ],
)
def test_the_bottleneck_is_what_the_run_would_be_faster_without(times, bottleneck):
    assert times.bottleneck == bottleneck


def test_a_part_is_measured_also_when_it_fails():
    times = Times()

    @times.measure("write")
    def fail():
        time.sleep(0.02)
        raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert 0.02 <= times.write < 5


def test_workers_add_up():
    times = Times(model=1, read=2)
    times.add(Times(model=3, total=4))
    assert times == Times(model=4, read=2, total=4)
    assert times.line(2).startswith("time: 4.0 s in 2 workers: load 0.0, read 2.0, ")


def test_a_run_says_where_its_time_went(project):
    summary = run(load_recipe(str(project.path)))
    times = summary.times
    parts = (times.load, times.read, times.encode, times.collate, times.model, times.ops, times.write)
    assert all(part > 0 for part in parts)
    scoring = times.wait + times.collate + times.model + times.ops + times.write
    assert times.load + scoring <= times.total
    assert times.line() in summary.lines()
    assert not any("time:" in line for line in run(load_recipe(str(project.path))).lines())  # nothing was left to do
