"""Models that a Python function makes: only of modules that the caller trusts, and nothing of others is imported."""

from __future__ import annotations

import json
import random
import sys
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import nn

from assay import cli
from assay.engine import make_plan, open_workshop, run
from assay.recipe.errors import ChangedError, EngineError, RecipeError
from assay.recipe.factories import is_trusted, tried_out
from assay.recipe.recipe import Recipe, load_recipe
from tests.small_models import byte_tokenizer, edit_json, write_recipe
from tests.small_project import make_project

SOURCE = """
import os
import random
import numpy as np
import torch
from torch import nn
from subprocess import Popen, run
from {package}.more import elsewhere

def make(hidden=8, bias=True):
    return nn.Sequential(nn.Linear(6, hidden, bias=bias), nn.ReLU(), nn.Linear(hidden, 3))

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(self.a(x))[:, :3]

class Sharing(Tied):
    # The same memory under two parameters.

    def __init__(self):
        super().__init__()
        self.b.weight = nn.Parameter(self.a.weight.data)

def drawn():
    made = make()
    with torch.no_grad():
        made[0].bias += random.random() + float(np.random.rand())
    return made

def never_the_same():
    made = make()
    with torch.no_grad():
        made[0].bias += int.from_bytes(os.urandom(2), "big") + 1
    return made

def of_a_file(path):
    made = make()
    with torch.no_grad():
        made[0].bias.fill_(float(open(path).read()))
    return made

def of_this_process():
    made = make()
    with torch.no_grad():
        made[0].bias.fill_(os.getpid())
    return made

class Reader(nn.Module):
    # A language model that sees nothing but the last token.

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(257, 8), nn.Linear(8, 257)

    def forward(self, input_ids):
        return self.head(self.embedding(input_ids))

def number():
    return 5

def raises():
    raise ZeroDivisionError("a\\nb" * 1000)

constant = 3
"""


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A project, and a package beside it whose import leaves a mark."""
    package = f"pack{abs(hash(str(tmp_path))) % 10**9}"
    project = make_project(tmp_path)
    where = tmp_path / "lib" / package
    where.mkdir(parents=True)
    mark = f"open({str(tmp_path / 'mark')!r}, 'a').write(__name__ + ' ')\n"
    (where / "__init__.py").write_text(mark)
    (where / "models.py").write_text(mark + SOURCE.format(package=package))
    (where / "more.py").write_text(mark + "from torch import nn\n\ndef elsewhere():\n    return nn.Linear(6, 3)\n")
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    yield project, package
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        del sys.modules[name]


def write(project, package, function="make", **keys) -> str:
    model = {"kind": "python", "factory": f"{package}.models:{function}", **keys}
    path = project.root / "python.yaml"
    methods = [{"method": "ensemble", "models": ["m"]}]
    path.write_text(yaml.safe_dump(project.recipe | {"models": {"m": model}, "methods": methods}))
    return str(path)


def spec(project, package, *args, trust=None, **keys):
    return load_recipe(write(project, package, *args, **keys), trust=trust or (package,)).models["m"]


def weights(project, model) -> str:
    path = project.root / "w.safetensors"
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, path)
    return str(path)


@pytest.mark.parametrize("trust", [(), ("{0}x",), ("pack",), ("{0}.more",), ("{0}.model",), ("{0}.models.make",)])
def test_untrusted_modules_are_not_imported(root, trust):
    project, package = root
    trust = tuple(name.format(package) for name in trust)
    with pytest.raises(RecipeError, match=rf"models\.m\.factory: runs Python .* --trust {package}\.models$") as caught:
        load_recipe(write(project, package), trust=trust)
    assert "\n" not in str(caught.value)
    assert not (project.root / "mark").exists()
    assert not any(name.split(".")[0] == package for name in sys.modules)


def test_the_command_line_is_what_trusts(root, capfd):
    project, package = root
    path = write(project, package, path=weights(project, nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))))
    for command in (["score", "-q"], ["validate"]):
        assert cli.main([*command, path]) == cli.BAD
        error = capfd.readouterr().err
        assert error.count("\n") == 1
        assert f"--trust {package}" in error
    assert cli.main(["validate", path, "--trust", "os; rm"]) == cli.BAD
    assert "--trust os; rm: expected the name of a module" in capfd.readouterr().err
    assert not (project.root / "mark").exists()
    assert cli.main(["validate", path, "--trust", "other", "--trust", package]) == cli.OK
    assert cli.main(["score", "-q", path, "--trust", f"{package}.models"]) == cli.OK


def test_trust_goes_by_whole_names():
    assert is_trusted("a.b.c", ("a",))
    assert is_trusted("a.b", ("a.b",))
    assert not is_trusted("a.b", ("a.b.c",))
    assert not is_trusted("ab.c", ("a",))
    assert not is_trusted("a", ())


def test_its_weights_and_arguments_decide_its_scores(root):
    project, package = root
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    keys = {"path": weights(project, model), "arguments": {"hidden": 5}}
    path = write(project, package, **keys)
    own = load_recipe(path, trust=(package,)).models["m"].build()
    assert all(torch.equal(a, b) for a, b in zip(own.parameters(), model.parameters(), strict=True))
    assert not own.training
    assert run(load_recipe(path, trust=(package,))).clean
    table = pq.read_table(next(project.scores.rglob("*.parquet")))
    assert table["ensemble_nll"].null_count == 0
    manifest = json.loads((project.scores / "manifest.json").read_text())
    assert manifest["recipe"]["models"]["m"] == {
        "kind": "python",
        "factory": f"{package}.models:make",
        "arguments": {"hidden": 5},
    }
    with pytest.raises(RecipeError, match="only the command line can allow"):
        load_recipe(str(project.scores / "recipe.resolved.yaml"))
    source = project.root / f"lib/{package}/models.py"
    source.write_text(source.read_text() + "# changed\n")
    with pytest.raises(ChangedError, match="m: sha256"):
        run(load_recipe(path, trust=(package,)))


def test_a_function_of_another_module_is_trusted_by_its_own(root):
    project, package = root
    assert isinstance(spec(project, package, "elsewhere").build(), nn.Linear)
    narrow = spec(project, package, "elsewhere", trust=(f"{package}.models",))
    with pytest.raises(EngineError, match=rf"is a function of {package}\.more, which is not trusted"):
        narrow.build()
    for function in ("Popen", "run"):
        with pytest.raises(EngineError, match="is a function of subprocess, which is not trusted"):
            spec(project, package, function, arguments={"args": ["touch", str(project.root / "ran")]}).build()
    assert not (project.root / "ran").exists()


FAULTS = [
    ({"function": "none"}, "its module has no function 'none'"),
    ({"function": "constant"}, "its module has no function 'constant'"),
    ({"function": "number"}, "returned a int; expected a torch.nn.Module"),
    ({"function": "raises"}, r"cannot make the model \(ZeroDivisionError: a ba b"),
    ({"arguments": {"nope": 1}}, r"cannot make the model \(TypeError: .*'nope'"),
    ({"arguments": {"bias": False}, "path": True}, "the model does not, 0.bias"),
    ({"arguments": {"hidden": 9}, "path": True}, "another shape than the model's, 0.weight 8×6 for 9×6"),
    ({"function": "Tied", "path": True}, "lacks a.weight, a.bias, b.weight and 1 more; holds, and the model"),
]


@pytest.mark.parametrize(("keys", "message"), FAULTS, ids=range(len(FAULTS)))
def test_what_is_no_model_is_one_line(root, keys, message):
    project, package = root
    if "path" in keys:
        keys = keys | {"path": weights(project, nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)))}
    with pytest.raises(EngineError, match=message) as caught:
        spec(project, package, **keys).build()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("factory", ["make", "a:b.c", "a.b:", "a b:c", "os.path:join:x", "a/b:c", ".a:b"])
def test_a_factory_is_a_module_and_a_function(root, factory):
    project, package = root
    path = write(project, package)
    with pytest.raises(RecipeError, match=r"models\.m\.factory: expected module:function"):
        load_recipe(path, [f"models.m.factory='{factory}'"], trust=(package, "a", "os"))


def test_a_recipe_keeps_its_trust_on_its_way_to_a_worker(root):
    project, package = root
    recipe = load_recipe(write(project, package), trust=(package,))
    sent = Recipe.model_validate(recipe.model_dump(), context={"base": "/", "trust": recipe.trust})
    assert recipe.trust == (package,)
    assert isinstance(sent.models["m"].build(), nn.Sequential)
    assert sent.models["m"].fingerprint() == recipe.models["m"].fingerprint()


def test_the_size_of_its_inputs_is_found_by_trying(root):
    project, package = root
    made = spec(project, package, arguments={"hidden": 8})
    assert (made.input_size(made.build()), made.output_size(made.build())) == (6, 3)
    model, calls = made.build(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    assert (made.input_size(model), made.output_size(model)) == (6, 3)
    assert len(calls) == 1, "a model is tried out once"
    assert tried_out(nn.Sequential(nn.Flatten(), nn.Linear(6, 3))) == (6, 3)
    for model in (nn.Embedding(6, 3), nn.Linear(6, 3).bfloat16(), nn.ReLU(), nn.LSTM(6, 3), nn.Conv1d(6, 3, 1)):
        assert tried_out(model) == ((6, 3) if isinstance(model, nn.Linear) else None)


def test_a_model_of_texts_names_its_tokenizer(root):
    project, package = root
    place = project.root / "texts"
    byte_tokenizer().save_pretrained(place / "words")
    model = {"kind": "python", "factory": f"{package}.models:Reader", "tokenizer_path": "words"}
    mimic = {"method": "grad_mimic", "model": "m", "reference": "other"}
    path = str(write_recipe(place, {"m": model, "other": model}, methods=[mimic]))
    recipe = load_recipe(path, trust=(package,))
    before = recipe.models["m"].fingerprint()
    assert run(recipe).clean
    assert pq.read_table(place / "scores/a.parquet")["loss"].null_count == 0
    edit_json(place / "words/tokenizer_config.json", model_max_length=7)
    assert recipe.models["m"].fingerprint() != before
    changes = [f"models.{name}.tokenizer_path=data" for name in ("m", "other")]
    with pytest.raises(EngineError, match=r"models\.m: .*data: has no tokenizer; expected tokenizer\.json"):
        run(load_recipe(path, [*changes, "output=more"], trust=(package,)))


def test_arguments_are_plain_json_and_looked_at_last(root):
    project, package = root
    path = write(project, package)
    with pytest.raises(RecipeError, match=r"models\.m\.arguments\.day"):
        load_recipe(path, ["models.m.arguments={day: 2020-01-01}"], trust=(package,))
    with pytest.raises(RecipeError, match=r"models\.m\.factory: expected module:function"):
        load_recipe(path, ["models.m.factory=null"], trust=(package,))
    lists = "".join(f", &b{i} [{', '.join([f'*b{i - 1}'] * 9)}]" for i in range(1, 30))
    started = time.monotonic()
    with pytest.raises(RecipeError, match="only the command line can allow"):
        load_recipe(path, [f"models.m.arguments={{a: [&b0 [1]{lists}]}}"])
    assert time.monotonic() - started < 5


def test_a_module_that_is_not_there_is_one_line(root):
    project, package = root
    recipe = load_recipe(write(project, package), ["models.m.factory=nowhere.x:make"], trust=("nowhere",))
    with pytest.raises(EngineError, match=r"nowhere\.x:make: its module cannot be imported \(ModuleNotFoundError"):
        recipe.models["m"].fingerprint()


def test_tied_weights_may_be_stored_once(root):
    project, package = root
    path = project.root / "w.safetensors"
    tensors = {"a.weight": torch.randn(6, 6), "a.bias": torch.randn(6), "b.bias": torch.randn(6)}
    save_file(tensors, path)
    model = spec(project, package, "Tied", path=str(path)).build()
    assert model.a.weight is model.b.weight
    assert torch.equal(model.b.weight, tensors["a.weight"])
    for function in ("Tied", "Sharing"):
        save_file(tensors | {"b.weight": tensors["a.weight"].clone()}, path)
        spec(project, package, function, path=str(path)).build()
        save_file(tensors | {"b.weight": tensors["a.weight"] + 1}, path)
        with pytest.raises(EngineError, match=r"holds other values for [ab]\.weight than for what is the same tensor"):
            spec(project, package, function, path=str(path)).build()
    save_file(tensors | {"a.weight": torch.zeros(6, 6, dtype=torch.int8)}, path)
    with pytest.raises(EngineError, match=r"holds no floating-point numbers of 16 bits or more in a\.weight"):
        spec(project, package, "Tied", path=str(path)).build()


def test_a_model_without_a_file_is_the_same_each_time(root):
    project, package = root
    made = spec(project, package, "drawn")
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1]
    first = made.build()
    for before, after in zip(states, (torch.get_rng_state(), random.getstate(), np.random.get_state()[1]), strict=True):
        assert np.array_equal(before, after) if not isinstance(before, tuple) else before == after
    torch.rand(3), random.random(), np.random.rand()
    again = made.build()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert made.fingerprint() == made.fingerprint() != spec(project, package).fingerprint()
    path = write(project, package, "drawn")
    keys = yaml.safe_load((project.root / "python.yaml").read_text())
    (project.root / "python.yaml").write_text(
        yaml.safe_dump(keys | {"models": dict.fromkeys("mn", keys["models"]["m"])})
    )
    models = load_recipe(path, trust=(package,)).models
    assert models["m"].fingerprint() == made.fingerprint() != models["n"].fingerprint()


def test_shards_are_not_scored_by_two_models(root):
    project, package = root
    with pytest.raises(EngineError, match=r"models\.m: .*: made another model than the one that this run began with"):
        run(load_recipe(write(project, package, "never_the_same"), trust=(package,)))
    assert not list(project.scores.rglob("*.parquet"))
    number = project.root / "number.txt"
    path = write(project, package, "of_a_file", arguments={"path": str(number)})
    number.write_text("1")
    assert run(load_recipe(path, trust=(package,))).clean
    assert run(load_recipe(path, trust=(package,))).scored == 0
    number.write_text("2")
    with pytest.raises(ChangedError, match="m: sha256"):
        run(load_recipe(path, trust=(package,)))
    plan = make_plan(load_recipe(path, ["output=new"], trust=(package,)))
    number.write_text("3")  # as another worker may find it
    with pytest.raises(EngineError, match="made another model than the one that this run began with"):
        open_workshop(plan)


@pytest.mark.slow
def test_workers_score_with_the_model_that_the_run_began_with(root):
    project, package = root
    task = {**project.recipe["task"], "shape": [6]}
    path = write(project, package, "of_this_process")
    keys = yaml.safe_load((project.root / "python.yaml").read_text()) | {"task": task}
    (project.root / "python.yaml").write_text(yaml.safe_dump(keys))
    with pytest.raises(EngineError, match="made another model than the one that this run began with"):
        run(load_recipe(path, ["run.devices='cpu,cpu'"], trust=(package,)))
    assert run(load_recipe(path, trust=(package,))).clean
