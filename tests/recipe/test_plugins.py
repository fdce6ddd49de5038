"""Models and methods from outside: registered in Python, or found by name among the entry points."""

from __future__ import annotations

from typing import Literal

import pyarrow.parquet as pq
import pytest
from torch import nn

from assay.engine.local import run
from assay.methods import Column, Method, Need
from assay.recipe import parts
from assay.recipe.errors import RecipeError
from assay.recipe.methods import METHODS, MethodSpec, register_method
from assay.recipe.models import MODELS, ModelSpec, register_model
from assay.recipe.recipe import load_recipe
from assay.tasks import Classification, Task
from tests.small_project import CLASSES, SIZE


class Doubled(Method):
    """The least that a method can be: one model's loss, twice."""

    name = "doubled"
    columns = (Column("doubled_loss", "low", "twice the loss"),)

    def __init__(self, model: nn.Module, task: Task, fatal: float | None = None):
        self._need = Need(model, task)
        self._fatal = fatal

    def needs(self):
        return {"model": self._need}

    def score(self, signals):
        losses = signals["model"].losses
        if self._fatal is not None and ((losses - self._fatal).abs() < 1e-6).any():
            raise MemoryError
        return {"doubled_loss": 2 * losses}

    def metadata(self):
        return {"factor": "2"}


class DoubledSpec(MethodSpec):
    method: Literal["doubled"]
    model: str
    fatal: float | None = None

    def models_used(self):
        return {("model",): self.model}

    def build(self, given):
        return Doubled(given.models[self.model], given.task, self.fatal)


class ConvSpec(ModelSpec):
    """A model that wants images and tells neither its inputs nor its outputs."""

    kind: Literal["conv"]

    def build(self):
        return nn.Sequential(nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 4, 2), nn.Flatten(), nn.Linear(8, CLASSES))


@pytest.fixture
def kinds():
    """Registrations that end with the test."""
    saved = [(registry, dict(registry._specs), dict(registry._classes)) for registry in (METHODS, MODELS)]
    yield
    for registry, specs, classes in saved:
        registry._specs, registry._classes = specs, classes


def test_the_fake_is_a_method():
    assert isinstance(Doubled(nn.Identity(), Classification()), Method)


@pytest.mark.parametrize("registered", [DoubledSpec, Doubled], ids=["by its keys", "by its constructor"])
def test_a_registered_method_scores_beside_the_others(project, kinds, registered):
    register_method("doubled", registered)
    recipe = project.write_recipe(methods=[*project.recipe["methods"], {"method": "doubled", "model": "a"}])
    run(load_recipe(str(recipe)))
    table = pq.read_table(project.scores / "a.parquet")
    assert table["doubled_loss"].to_pylist() == [2 * loss for loss in table["loss"].to_pylist()]
    assert b'"doubled.factor":"2"' in table.schema.metadata[b"assay"]


def test_a_row_that_exhausts_memory_is_quarantined(project, kinds):
    register_method("doubled", DoubledSpec)
    methods = [{"method": "doubled", "model": "a"}]
    run(load_recipe(str(project.write_recipe(methods=methods))))
    fatal = pq.read_table(project.scores / "a.parquet")["doubled_loss"][7].as_py() / 2
    methods[0]["fatal"] = fatal
    report = run(load_recipe(str(project.write_recipe(methods=methods, output="again"))))
    assert (report.rows_scored, report.rows_quarantined) == (79, 1)
    table = pq.read_table(project.root / "again/a.parquet")
    assert table["row"].to_pylist() == [i for i in range(50) if i != 7]


def test_a_registered_model_needs_the_shape_it_does_not_tell(project, kinds):
    register_model("conv", ConvSpec)
    changes = {
        "models": {"c": {"kind": "conv", "path": "models/a.safetensors"}},
        "methods": [{"method": "ensemble", "models": ["c"]}],
    }
    project.write_recipe(**changes)
    assert run(load_recipe(str(project.path), [f"task.shape=[{SIZE}]"])).clean


@pytest.mark.parametrize("loaded", [DoubledSpec, Doubled], ids=["by its keys", "by its constructor"])
def test_entry_points_are_loaded_by_name_only(project, kinds, monkeypatch, loaded):
    asked = []

    class Point:
        def load(self):
            return loaded

    def entry_points(group, name):
        asked.append((group, name))
        return [Point()] if name == "doubled" else []

    monkeypatch.setattr(parts, "entry_points", entry_points)
    load_recipe(str(project.path))
    assert asked == []
    load_recipe(str(project.write_recipe(methods=[{"method": "doubled", "model": "a"}])))
    assert asked == [("assay.methods", "doubled")]
    with pytest.raises(RecipeError, match=r"methods\.0\.method: unknown method 'doublet'; did you mean 'doubled'"):
        load_recipe(str(project.write_recipe(methods=[{"method": "doublet", "model": "a"}])))


def test_a_kind_has_one_meaning(kinds):
    register_method("doubled", DoubledSpec)
    register_method("doubled", DoubledSpec)
    with pytest.raises(ValueError, match="already registered"):
        register_method("ensemble", DoubledSpec)


class Nameless(Doubled):
    def __init__(self, *models: nn.Module) -> None:
        pass


class Undecided(Doubled):
    def __init__(self, model: nn.Module, task: Task, damping: float | None = 0.1) -> None:
        pass


@pytest.mark.parametrize(
    ("method", "message"), [(Nameless, r"models can be no key"), (Undecided, r"null and the default 0\.1")]
)
def test_constructors_that_give_no_keys_are_refused(project, kinds, monkeypatch, method, message):
    with pytest.raises(TypeError, match=message):
        register_method("odd", method)

    class Point:
        def load(self):
            return method

    monkeypatch.setattr(parts, "entry_points", lambda group, name: [Point()] if name == "odd" else [])
    with pytest.raises(
        RecipeError, match=rf"methods\.0\.method: the plugin of method 'odd' cannot be used .*{message}"
    ):
        load_recipe(str(project.write_recipe(methods=[{"method": "odd", "model": "a"}])))


def test_a_method_without_a_constructor_has_no_keys_of_its_own(kinds):
    class Bare(Method):
        name = "bare"
        columns = ()

    register_method("bare", Bare)
    assert set(METHODS._specs["bare"].model_fields) == {"method", "shortlist"}
