"""Models by a glob: members in their natural order, names without paths, and methods that name them all."""

from __future__ import annotations

import json
import os

import pyarrow.parquet as pq
import pytest
import yaml

from assay.engine import run
from assay.recipe.errors import RecipeError
from assay.recipe.recipe import Recipe, load_recipe
from tests.small_project import make_project, save_mlp


@pytest.fixture
def root(tmp_path):
    project = make_project(tmp_path)
    (project.root / "runs").mkdir()
    for seed in (10, 2, 1):
        save_mlp(project.root / f"runs/seed-{seed}.safetensors", seed)
    return project.root


def write(root, models, methods) -> str:
    recipe = yaml.safe_load((root / "recipe.yaml").read_text())
    (root / "globs.yaml").write_text(yaml.safe_dump(recipe | {"models": models, "methods": methods}, sort_keys=False))
    return str(root / "globs.yaml")


def seeds(**more):
    return {"seeds": {"kind": "mlp", "path": "runs/seed-*.safetensors"}} | more


def used(path) -> list[str]:
    return list(load_recipe(path).methods[0].models_used().values())


@pytest.mark.parametrize("named", ["seeds", ["seeds"], "seeds-*", ["seeds-*"], ["seeds-1", "seeds-2", "seeds-last"]])
def test_members_are_numbered_in_natural_order(root, named):
    path = write(root, seeds(), [{"method": "ensemble", "models": named}])
    recipe = load_recipe(path)
    assert {name: os.path.basename(spec.path) for name, spec in recipe.models.items()} == {
        "seeds-1": "seed-1.safetensors",
        "seeds-2": "seed-2.safetensors",
        "seeds-3": "seed-10.safetensors",
    }
    assert used(path) == ["seeds-1", "seeds-2", "seeds-3"]
    assert str(root) not in json.dumps(recipe.identity())
    (root / "resolved.yaml").write_text(recipe.to_yaml())
    assert load_recipe(str(root / "resolved.yaml")) == recipe


def test_a_method_may_name_the_glob_itself(root):
    path = write(root, {}, [{"method": "ensemble", "models": "runs/seed-*.safetensors"}])
    assert used(path) == ["seed-1", "seed-2", "seed-3"]
    assert run(load_recipe(path)).clean
    same = write(root, seeds(), [{"method": "ensemble", "models": ["seeds"]}])
    assert run(load_recipe(same, ["output=other"])).clean
    one, other = (pq.read_table(next((root / name).rglob("*.parquet"))) for name in ("scores", "other"))
    assert one["ensemble_nll"].to_pylist() == other["ensemble_nll"].to_pylist()


def test_the_ends_of_a_run_are_model_and_reference(root):
    methods = [{"method": "grad_mimic", "model": "seeds-first", "reference": "seeds-last"}]
    path = write(root, seeds(), methods)
    assert used(path) == ["seeds-1", "seeds-3"]
    with pytest.raises(
        RecipeError, match=r"methods\.0\.model: 'seeds' is 3 models; name one of them, such as 'seeds-3'"
    ):
        load_recipe(write(root, seeds(), [{**methods[0], "model": "seeds"}]))


def test_globs_and_single_models_stand_beside_one_another(root):
    alone = {"kind": "mlp", "path": "runs/seed-2.safetensors"}
    path = write(root, {"alone": alone} | seeds(), [{"method": "ensemble", "models": ["alone", "seeds-[12]"]}])
    assert used(path) == ["alone", "seeds-1", "seeds-2"]
    (root / "runs/[x]").mkdir()
    save_mlp(root / "runs/[x]/m-*.safetensors", 0)
    literal = {"m": {"kind": "mlp", "path": "runs/[x]/m-*.safetensors"}}
    assert used(write(root, literal, [{"method": "ensemble", "models": ["m"]}])) == ["m"]


def test_folders_and_adapters_may_be_several_too(root):
    for name in ("lora-a", "lora-b", "seed-1", "seed-12", "seed-3"):
        (root / "models" / name).mkdir()
    base = {"kind": "transformers", "path": "models/seed-1", "adapter": "models/lora-*"}
    recipe = load_recipe(write(root, {"lora": base}, [{"method": "ensemble", "models": ["lora", "models/seed-*/"]}]))
    adapters = [os.path.basename(spec.adapter) for name, spec in recipe.models.items() if name.startswith("lora")]
    seeds = [os.path.basename(spec.path) for name, spec in recipe.models.items() if name.startswith("seed")]
    assert (adapters, seeds) == (["lora-a", "lora-b"], ["seed-1", "seed-3", "seed-12"])
    assert used(root / "globs.yaml") == ["lora-1", "lora-2", "seed-1", "seed-2", "seed-3"]
    with pytest.raises(RecipeError, match=r"models\.lora: path and adapter are globs both"):
        load_recipe(str(root / "globs.yaml"), ["models.lora.path=models/seed-*"])


FAULTS = [
    ({"s": {"kind": "mlp", "path": "runs/none-*"}}, ["s"], r"models\.s\.path: nothing matches runs/none-\*"),
    (seeds(), ["sedes-*"], r"methods\.0\.models: no model's name matches 'sedes-\*'; did you mean 'seeds-.'"),
    (seeds(), ["seed"], r"methods\.0\.models\.0: no model is called 'seed'; did you mean 'seeds-.'"),
    (
        seeds(**{"seeds-2": {"kind": "mlp", "path": "runs/seed-1.safetensors"}}),
        ["seeds"],
        r"models\.seeds: several models are called 'seeds-2'",
    ),
    (seeds(), ["runs/none-*/"], r"models\.none\.path: nothing matches runs/none-\*/"),
    (
        {"seed": {"kind": "mlp", "path": "runs/seed-1.safetensors"}},
        "runs/seed-*.safetensors",
        r"methods\.0\.models: runs/seed-\*\.safetensors would be called 'seed', as another model is",
    ),
]


@pytest.mark.parametrize(("models", "named", "message"), FAULTS, ids=range(len(FAULTS)))
def test_what_is_not_there_is_one_line(root, models, named, message):
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(write(root, models, [{"method": "ensemble", "models": named}]))
    assert "\n" not in str(caught.value)


def test_a_recipe_in_python_may_have_globs_too(root):
    data = yaml.safe_load((root / "recipe.yaml").read_text()) | {"corpus": {"path": str(root)}, "output": str(root)}
    models = {"seeds": {"kind": "mlp", "path": str(root / "runs/seed-*.safetensors")}}
    recipe = Recipe.model_validate(data | {"models": models, "methods": [{"method": "ensemble", "models": "seeds"}]})
    assert list(recipe.models) == ["seeds-1", "seeds-2", "seeds-3"]
