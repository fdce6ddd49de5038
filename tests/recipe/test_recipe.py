"""Recipes: every mistake is one line that says where and what was meant."""

from __future__ import annotations

import copy

import pytest
import yaml

from assay.recipe import notation
from assay.recipe.errors import RecipeError
from assay.recipe.recipe import Recipe, load_recipe


def changed(recipe: dict, dotted: str, value) -> dict:
    """A copy with one key replaced, added, or (for ...) removed."""
    result = copy.deepcopy(recipe)
    target = result
    *parents, last = (int(key) if key.isdigit() else key for key in dotted.split("."))
    for key in parents:
        target = target[key]
    if value is ...:
        del target[last]
    else:
        target[last] = value
    return result


MISTAKES = [
    ("modles", {}, "modles: unknown key; did you mean 'models'?"),
    ("corpus.pth", "data", "corpus.pth: unknown key; did you mean 'path'?"),
    ("batch.tokns", 5, "batch.tokns: unknown key; did you mean 'tokens'?"),
    ("task.class", 3, "task.class: unknown key; did you mean 'classes'?"),
    ("task.text_column", "x", "task.text_column: is given beside input_column; a sample has one of them"),
    ("task.max_length", 5, "task.max_length: goes with text_column"),
    ("task.text_columns", "x", "task.text_columns: unknown key; did you mean 'text_column'?"),
    ("models.a.dtype", "float16", "models.a.dtype: unknown key; expected one of 'kind', 'path'"),
    ("methods.1.referense", "ref", "methods.1.referense: unknown key; did you mean 'reference'?"),
    ("corpus", ..., "corpus: is missing"),
    ("task.classes", 0, "task.classes: input should be greater than or equal to 1, got 0"),
    ("task.labels", ["a", "a"], "task.labels: name 'a' twice"),
    ("task.labels", ["a", True], "task.labels: are of type bool, str; expected str, int or bool throughout"),
    ("task.labels", [1.5], "task.labels: are of type float; expected"),
    ("task.labels", [], "task.labels: expected a list of labels in the order of their classes, or a mapping"),
    ("task.labels", "a", "task.labels: expected a list of labels in the order of their classes, or a mapping"),
    ("task.labels", {"a": -1}, "task.labels: expected the class of each label, 0 or more, found -1"),
    ("task.kind", "clasification", "task.kind: unknown kind 'clasification'; did you mean 'classification'?"),
    ("task.kind", ..., "task.kind: is missing; expected one of 'causal_lm', 'classification', "),
    ("models.a.kind", "mpl", "models.a.kind: unknown kind 'mpl'; did you mean 'mlp'?"),
    ("methods.0.method", "ensembel", "methods.0.method: unknown method 'ensembel'; did you mean 'ensemble'?"),
    ("methods.0.models.1", "bb", "methods.0.models.1: no model is called 'bb'; did you mean 'b'?"),
    ("methods.1.reference", "reff", "methods.1.reference: no model is called 'reff'; did you mean 'ref'?"),
    ("models.a.path", "models/c.safetensors", "models.a.path: no such file or folder: "),
    ("corpus.path", "dta", "corpus.path: no such file or folder: "),
    ("seed", "0", "seed: input should be a valid integer, got '0'"),
    ("seed", True, "seed: input should be a valid integer, got True"),
    ("seed", -1, "seed: input should be greater than or equal to 0, got -1"),
    ("version", 2, "version: input should be 1, got 2"),
    ("methods", [], "methods: list should have at least 1 item"),
    ("methods.0.weights", [1, "x"], "methods.0.weights.1: input should be a valid number, got 'x'"),
    ("models.a", "a.safetensors", "models.a: should be a mapping"),
    ("batch.samples", 0, "batch.samples: input should be greater than or equal to 1, got 0"),
    ("models.a.trust_remote_code", True, "models.a.trust_remote_code: unknown key"),
]


@pytest.mark.parametrize(("key", "value", "message"), MISTAKES, ids=[f"{k}={v}" for k, v, _ in MISTAKES])
def test_a_mistake_is_one_line_that_says_where(project, key, value, message):
    path = project.write_recipe(**changed(project.recipe, key, value)) if value is not ... else project.path
    if value is ...:
        path.write_text(yaml.safe_dump(changed(project.recipe, key, value)))
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(path))
    assert str(caught.value).startswith(f"{path}: {message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not valid YAML"),
        ("- 1", "expected a mapping"),
        ("", "expected a mapping"),
        ("version: 1\nversion: 1", "the key 'version' appears twice"),
        ("version: !!python/object/apply:os.system ['true']", "not valid YAML"),
        ("\x00", "not valid YAML"),
    ],
)
def test_what_is_no_recipe(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(str(path))
    assert "\n" not in str(caught.value)


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"nowhere\.yaml: cannot be read"):
        load_recipe(str(tmp_path / "nowhere.yaml"))


def test_paths_are_relative_to_the_recipe(project, monkeypatch, tmp_path_factory):
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    recipe = load_recipe(str(project.path))
    assert recipe.corpus.path == str(project.root / "data")
    assert recipe.output == str(project.root / "scores")
    assert recipe.models["a"].path == str(project.root / "models/a.safetensors")
    assert load_recipe(str(project.path), ["output=s3://bucket/scores"]).output == "s3://bucket/scores"


def test_the_resolved_recipe_loads_as_the_same(project, tmp_path):
    recipe = load_recipe(str(project.path))
    copied = tmp_path / "resolved.yaml"
    copied.write_text(recipe.to_yaml())
    assert load_recipe(str(copied)) == recipe


def test_texts_that_look_like_numbers_stay_texts(project):
    """Also those that PyYAML, which keeps to YAML 1.1, would write without quotes."""
    names = ["1e5", "2.0", "-1.5E-3"]
    models = dict.fromkeys(names, project.recipe["models"]["a"])
    project.path.write_text(
        notation.write({**project.recipe, "models": models, "methods": [{"method": "ensemble", "models": names}]})
    )
    recipe = load_recipe(str(project.path))
    assert sorted(recipe.models) == sorted(names)
    project.path.write_text(recipe.to_yaml())
    assert load_recipe(str(project.path)) == recipe


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("batch.tokens=4096", lambda r: r.batch.tokens, 4096),
        ("methods.1.cosine=true", lambda r: r.methods[1].cosine, True),
        ("methods.0.weights=[1, 2.5]", lambda r: r.methods[0].weights, [1, 2.5]),
        ("corpus.id_column=null", lambda r: r.corpus.id_column, None),
        ("seed=7", lambda r: r.seed, 7),
        ("methods.0.weights=[1e-8, 2E+3, -.5e1, 3.e2]", lambda r: r.methods[0].weights, [1e-8, 2e3, -5, 300]),
    ],
)
def test_overrides(project, override, read, value):
    assert read(load_recipe(str(project.path), [override])) == value


def test_overrides_of_names_with_dots(project):
    models = {"llama-3.1": project.recipe["models"]["a"], "llama-3": project.recipe["models"]["a"]}
    methods = [{"method": "ensemble", "models": list(models)}]
    project.path.write_text(notation.write({**project.recipe, "models": models, "methods": methods}))
    assert "*id001" in project.path.read_text()  # both are one mapping, of which an override changes one
    recipe = load_recipe(str(project.path), ["models.llama-3.1.kind=mlp", "models.llama-3.path=models/b.safetensors"])
    assert recipe.models["llama-3.1"].path.endswith("models/a.safetensors")
    assert recipe.models["llama-3"].path.endswith("models/b.safetensors")
    whole = load_recipe(str(project.path), ["models.llama-3.1={kind: mlp, path: models/b.safetensors}"])
    assert whole.models["llama-3.1"].path.endswith("models/b.safetensors")
    assert sorted(whole.models) == sorted(models)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("batch.tokens", "expected dotted.key=value"),
        ("=1", "expected dotted.key=value"),
        ("batch.tokns=1", "batch.tokns: unknown key; did you mean 'tokens'?"),
        ("methods.7.cosine=true", "'7' is no position in a list of 2"),
        ("methods.x=1", "'x' is no position in a list of 2"),
        ("seed.x=1", "seed: input should be a valid integer, got a mapping"),
        ("output.x.y=1", "output.x.y: cannot be set"),
        ("seed=[", "not valid YAML"),
    ],
)
def test_bad_overrides(project, override, message):
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(project.path), [override])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "same"),
    [
        ("output", "elsewhere", True),
        ("batch", {"tokens": 1}, True),
        ("corpus.path", "data/*.parquet", True),
        ("models.unused", {"kind": "mlp", "path": "models/a.safetensors"}, True),
        ("seed", 1, False),
        ("corpus.id_column", None, False),
        ("task.label_column", "y", False),
        ("methods.1.cosine", True, False),
        ("methods.0.weights", [1, 2], False),
    ],
)
def test_only_what_decides_scores_is_in_the_identity(project, key, value, same):
    before = load_recipe(str(project.path))
    after = load_recipe(str(project.write_recipe(**changed(project.recipe, key, value))))
    assert (before.identity() == after.identity()) is same
    assert isinstance(after, Recipe)
