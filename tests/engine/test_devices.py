"""Devices by name: what is not there is one line before anything loads."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from assay.cli import main
from assay.engine import local, make_plan, open_workshop, workshop
from assay.engine.devices import find_devices, limit_threads, place, threads_each
from assay.engine.local import run
from assay.recipe.errors import EngineError, RecipeError
from assay.recipe.recipe import load_recipe
from assay.tasks.base import to_device


@pytest.fixture
def gpus(monkeypatch):
    """As many GPUs as one likes; torch itself uses none of them."""

    def set_count(count):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return set_count


@pytest.mark.parametrize(
    ("count", "wanted", "found"),
    [
        (0, "auto", ["cpu"]),
        (1, "auto", ["cuda:0"]),
        (3, "auto", ["cuda:0", "cuda:1", "cuda:2"]),
        (3, "cpu", ["cpu"]),
        (0, "cpu, cpu", ["cpu", "cpu"]),
        (2, "cuda", ["cuda:0"]),
        (2, "cuda:1,cuda:0", ["cuda:1", "cuda:0"]),
        (2, ["cuda:0", "cuda:1"], ["cuda:0", "cuda:1"]),
    ],
)
def test_devices_are_found_by_name(gpus, count, wanted, found):
    gpus(count)
    assert [str(device) for device in find_devices(wanted)] == found


@pytest.mark.parametrize(
    ("count", "wanted", "message"),
    [
        (0, "cuda:0", r"run\.devices: cuda:0 is not there; torch sees no GPU"),
        (1, "cuda:0,cuda:1", r"cuda:1 is not there; torch sees cuda:0 \("),
        (2, "cuda:2", r"cuda:2 is not there; torch sees cuda:0 to cuda:1"),
        (2, "cuda:0,cuda:0", "cuda:0 is named twice"),
        (2, "cuda,cuda:0", "cuda:0 is named twice"),
        (2, "cpu,cuda:0", "round differently"),
        (2, "tpu", "'tpu' is no device; expected auto, cpu, or GPUs such as cuda:0,cuda:1"),
        (2, "cuda:-1", "'cuda:-1' is no device"),
        (2, "cuda:", "'cuda:' is no device"),
        (2, "cuda:²", "'cuda:²' is no device"),
        (2, "cpu,", "'' is no device"),
        (2, "auto,cpu", "'auto' is no device"),
    ],
)
def test_what_is_no_device_or_not_there_is_named(gpus, count, wanted, message):
    gpus(count)
    with pytest.raises(EngineError, match=message):
        find_devices(wanted)


def test_a_run_on_a_device_that_is_not_there_loads_nothing(project, gpus, monkeypatch):
    gpus(1)
    monkeypatch.setattr(local, "find_corpora", None)
    with pytest.raises(EngineError, match="cuda:7 is not there"):
        run(load_recipe(str(project.path), ["run.devices=cuda:7"]))
    assert not project.scores.exists()


def test_the_command_line_names_devices(project, capsys):
    assert main(["score", str(project.path), "--devices", "cpu,cpu", "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("devices: cpu, cpu\n")
    assert main(["score", str(project.path), "--devices", "cuda:99"]) == 2
    err = capsys.readouterr().err
    assert "cuda:99 is not there" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("value", ["[]", "3", "{cpu: 2}"])
def test_devices_in_a_recipe_are_text_or_a_list(project, value):
    with pytest.raises(RecipeError, match=r"run\.devices"):
        load_recipe(str(project.path), [f"run.devices={value}"])


def test_where_it_runs_is_no_part_of_the_identity(project):
    plain, told = (load_recipe(str(project.path), o) for o in ([], ["run.devices='cpu,cpu'"]))
    assert plain.identity() == told.identity()
    assert plain.run.devices == "auto"
    assert "run:\n  devices: cpu,cpu\n" in told.to_yaml()


def test_threads_are_shared_out(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setenv("RAYON_NUM_THREADS", "7")
    try:
        torch.set_num_threads(5)
        assert [threads_each(n) for n in (1, 2, 5, 9)] == [5, 2, 1, 1]
        limit_threads(2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_model_too_large_for_its_device_is_named(monkeypatch):
    def fail(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    model = nn.Linear(2, 2)
    assert place("small", model, torch.device("cpu")) is model
    monkeypatch.setattr(nn.Module, "to", fail)
    with pytest.raises(EngineError, match=r"models\.small: does not fit into the memory of cuda:1 \(CUDA out of mem"):
        place("small", model, torch.device("cuda", 1))


def test_models_are_on_their_device_before_anybody_looks_at_them(project, monkeypatch):
    """No GPU here: that they are asked to go there, and when, is all that can be seen."""
    seen, device = [], torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda d: seen.append(("set_device", d)))
    monkeypatch.setattr(nn.Module, "to", lambda model, d: (seen.append(("model", d)), model)[1])
    given = workshop.Given
    monkeypatch.setattr(workshop, "Given", lambda *arguments: (seen.append(("methods", None)), given(*arguments))[1])
    open_workshop(make_plan(load_recipe(str(project.path))), device=device)
    assert seen == [("set_device", device), *[("model", device)] * 3, ("methods", None)]


def test_batches_go_to_a_gpu_from_pinned_memory_while_the_host_goes_on(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: (calls.append("pinned"), t)[1])
    monkeypatch.setattr(torch.Tensor, "to", lambda t, *a, **k: (calls.append((*a, k)), t)[1])
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 1)
    to_device({"ids": torch.zeros(2), "name": "x"}, gpu)
    assert calls == ["pinned", (gpu, {"non_blocking": True})]
    calls.clear()
    to_device((torch.zeros(2),), cpu)
    assert calls == [(cpu, {})]
