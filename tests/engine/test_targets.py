"""Recipes with targets: fitted once, the same in every worker, and bound to the targets' and the pool's files."""

from __future__ import annotations

import json
import os

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

import assay
from assay.cli import main
from assay.corpus.scores_folder import State, open_scores
from assay.corpus.shards import find_shards
from assay.corpus.storage import Store
from assay.engine import drawing, fitting, workshop
from assay.engine.drawing import draw_samples
from assay.engine.fitting import Together
from assay.engine.local import run
from assay.engine.plan import make_plan, refuse_changes
from assay.methods import TRAK, AdamState
from assay.recipe.errors import ChangedError, EngineError, RecipeError
from assay.recipe.recipe import load_recipe
from assay.recipe.tasks.labelled import LabelledEncoder
from assay.recipe.tasks.labels import ClassLabels
from assay.recipe.tasks.numbers import NumberInputs
from assay.tasks import Classification
from tests.small_project import CLASSES, SIZE, make_rows, save_mlp

SKETCH = {"kind": "kronecker", "rows": 4, "cols": 4}
METHODS = [
    *({"method": name, "models": ["a", "b"], "sketch": SKETCH} for name in ("trak", "dsdm", "logra", "trackstar")),
    {"method": "less", "models": ["a"], "optimizers": None, "sketch": SKETCH},
    {"method": "ekfac", "model": "a", "self_influence": True},
    {"method": "influence_distillation", "model": "a", "landmarks": 40, "tangents": 4},
]


@pytest.fixture
def targeted(project):
    project.write_shard("../targets/x.jsonl", make_rows(5, 8))
    project.write_shard("../targets/y.parquet", make_rows(6, 9))
    project.recipe.update(
        methods=METHODS,
        targets={"x": {"path": "targets/x.jsonl"}, "y": {"path": "targets/*.parquet"}},
        fit={"samples": 60},
    )
    project.write_recipe()
    return project


def score(project, *overrides, **options):
    return run(load_recipe(str(project.path), overrides), **options)


def only(project, **method):
    """A recipe with one method."""
    project.recipe["methods"] = [method]
    project.write_recipe()


def test_what_changes_after_the_plan_is_named(targeted):
    plan = make_plan(load_recipe(str(targeted.path), []))
    refuse_changes(plan)
    targeted.write_shard("../targets/x.jsonl", make_rows(6, 8))
    save_mlp(targeted.root / "models/b.safetensors", 7)
    with pytest.raises(EngineError, match=r"^models\.b, targets\.x: has changed since the run began"):
        refuse_changes(plan)


def test_every_method_gives_a_column_per_target_and_one_for_all(targeted):
    report = score(targeted)
    assert (report.rows_scored, report.nan.total()) == (80, 0)
    table = pq.read_table(targeted.scores / "deep/b.parquet")
    names = ["trak", "dsdm", "logra", "trackstar", "less", "ekfac", "influence_distillation"]
    wanted = {f"{name}{target}" for name in names for target in ("", "_x", "_y")}
    assert set(table.column_names) == wanted | {"row", "id", "ekfac_self"}
    for name in wanted:
        assert table.schema.field(name).metadata[b"keep"] == b"high"
        assert np.std(table[name].to_numpy()) > 0
    for name in set(names) - {"less"}:
        mean = (table[f"{name}_x"].to_numpy() + table[f"{name}_y"].to_numpy()) / 2
        np.testing.assert_allclose(table[name].to_numpy(), mean, rtol=1e-4, atol=1e-6)
    assert score(targeted).done_before == 2


def test_scores_are_those_of_python(targeted):
    only(targeted, method="trak", models=["a", "b"], sketch=SKETCH, targets=["x"])
    score(targeted, "fit.samples=1000")
    models = [load(targeted.root / f"models/{name}.safetensors") for name in "ab"]
    rows = [*make_rows(50, 0), *make_rows(30, 1)]
    method = TRAK(models, Classification(), {"x": [batch(make_rows(5, 8))]}, sketch=assay.Kronecker(4, 4))
    method.fit([batch(rows)])
    want = assay.score([batch(rows)], [method])["trak"].to_numpy()
    tables = [pq.read_table(targeted.scores / name)["trak"].to_numpy() for name in ("a.parquet", "deep/b.parquet")]
    np.testing.assert_allclose(np.concatenate(tables), want, rtol=1e-3, atol=1e-3 * np.abs(want).max())


def load(path) -> nn.Module:
    model = nn.Sequential(nn.Linear(SIZE, 8), nn.ReLU(), nn.Linear(8, CLASSES))
    model.load_state_dict(load_file(path))
    return model.eval()


def batch(rows):
    x = torch.tensor([row["pixels"] for row in rows])
    return x, torch.tensor([row["label"] for row in rows])


def test_fitted_once_per_run_and_the_same_in_every_worker(targeted, monkeypatch):
    fits = []
    original = TRAK.fit
    monkeypatch.setattr(TRAK, "fit", lambda self, batches: (fits.append(self.name), original(self, batches))[1])
    score(targeted)
    assert fits == ["trak", "dsdm"]
    whole = targeted.tables()
    for i in (1, 2):
        score(targeted, "output=parted", part=(i, 2))
    assert {path: (targeted.root / "parted" / path).read_bytes() for path in whole} == whole


@pytest.mark.parametrize("touched", ["targets/x.jsonl", "data/a.parquet"])
def test_changed_targets_and_a_changed_pool_are_errors_until_rescored(targeted, touched):
    score(targeted)
    os.utime(targeted.root / touched, (1, 1))
    key = "targets.x" if "targets" in touched else "fit"
    with pytest.raises(ChangedError, match=rf"files of {key}: sha256:.* → sha256:"):
        score(targeted)
    report = score(targeted, rescore=True)
    assert report.rescored == 2
    assert score(targeted).done_before == 2
    scores = open_scores(str(targeted.scores))
    assert len(scores.of(State.DONE)) == 2


def test_what_is_in_the_identity(targeted):
    def identity(*overrides):
        return load_recipe(str(targeted.path), overrides).identity()

    assert identity() == identity("methods.0.targets=[x, y]")  # all of them, by name
    assert identity() != identity("methods.0.targets=[x]")
    assert identity() != identity("fit.samples=61")
    assert identity() != identity("methods.0.sketch.rows=5")
    assert identity() == identity("targets.z.path=targets/x.jsonl", *(f"methods.{i}.targets=[x,y]" for i in range(7)))
    only(targeted, method="less", models=["a"], optimizers=None)
    assert identity() == identity("fit.samples=61")  # LESS does not look at the pool
    report = score(targeted)
    targeted.write_shard("new.jsonl", make_rows(3, 20))
    assert report.scored == 2
    assert score(targeted).scored == 1  # so that new shards need no other's scores again


def test_a_recipe_without_targets_has_the_identity_it_always_had(project):
    recipe = load_recipe(str(project.path))
    assert recipe.identity().keys() == {"task", "id_column", "models", "methods", "seed"}
    score(project)
    footer = json.loads(pq.read_schema(project.scores / "a.parquet").metadata[b"assay"])
    assert "corpora" not in footer


def test_a_fit_from_a_file_of_its_own_lets_the_corpus_grow(targeted):
    targeted.write_shard("../pool.parquet", make_rows(60, 30))
    score(targeted, "fit.path=pool.parquet")
    targeted.write_shard("new.jsonl", make_rows(3, 20))
    report = score(targeted, "fit.path=pool.parquet")
    assert (report.done_before, report.scored) == (2, 1)


def test_less_with_optimizers_and_ekfac_without_targets(targeted):
    model = load(targeted.root / "models/a.safetensors")
    optimizer = torch.optim.Adam(model.named_parameters())
    x, y = batch(make_rows(50, 0))
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), targeted.root / "optimizer.pt")
    targeted.recipe["methods"] = [
        {"method": "less", "models": ["a"], "optimizers": ["optimizer.pt"]},
        {"method": "less", "models": ["a"], "optimizers": None, "name": "plain"},
        {"method": "ekfac", "model": "a", "self_influence": True, "targets": []},
    ]
    targeted.write_recipe()
    score(targeted)
    table = pq.read_table(targeted.scores / "a.parquet")
    assert not np.allclose(table["less"].to_numpy(), table["plain"].to_numpy(), atol=1e-2)
    assert {"ekfac_self"} == {name for name in table.column_names if name.startswith("ekfac")}
    moved = targeted.root / "elsewhere.pt"
    (targeted.root / "optimizer.pt").rename(moved)
    assert score(targeted, "methods.0.optimizers=[elsewhere.pt]").done_before == 2
    moved.write_bytes(moved.read_bytes() + b"x")
    with pytest.raises(ChangedError, match=r"methods\.0\.optimizers\.0: sha256"):
        score(targeted, "methods.0.optimizers=[elsewhere.pt]")


def test_every_file_of_one_adam_gives_one_score(targeted):
    """Named, numbered as transformers' Trainer does (the decayed first), and as safetensors."""
    model = load(targeted.root / "models/a.safetensors")
    named = dict(model.named_parameters())
    groups = [[(n, p) for n, p in named.items() if ("bias" in n) == plain] for plain in (False, True)]
    x, y = batch(make_rows(50, 0))
    F.cross_entropy(model(x), y).backward()
    for name, parameters in (("named", groups), ("numbered", [[p for _, p in group] for group in groups])):
        optimizer = torch.optim.AdamW([{"params": p} for p in parameters], lr=0.0, betas=(0.9, 0.95))
        optimizer.step()
        torch.save(optimizer.state_dict(), targeted.root / f"{name}.pt")
    AdamState.of(optimizer, model).save(targeted.root / "saved.safetensors")
    files = ["named.pt", "numbered.pt", "saved.safetensors"]
    targeted.recipe["methods"] = [
        {"method": "less", "models": ["a"], "optimizers": [file], "name": file.partition(".")[0]} for file in files
    ]
    targeted.write_recipe()
    score(targeted)
    table = pq.read_table(targeted.scores / "a.parquet")
    for name in ("numbered", "saved"):
        np.testing.assert_array_equal(table[name].to_numpy(), table["named"].to_numpy())


def test_grass_from_a_recipe(targeted):
    then = {"kind": "sparse", "dim": 16}
    only(targeted, method="logra", models=["a"], sketch={"kind": "mask", "rows": 6, "cols": 5, "then": then})
    assert score(targeted).clean
    footer = json.loads(pq.read_schema(targeted.scores / "a.parquet").metadata[b"assay"])
    assert "Mask(rows=6, cols=5, then=Sparse(dim=16" in footer["methods"]["logra.sketch"]


def encoder():
    return LabelledEncoder(NumberInputs("pixels", (SIZE,)), ClassLabels("label", CLASSES))


def test_the_fit_sample_is_uniform_seeded_and_of_good_rows(project):
    rows = make_rows(300, 40)
    for i in range(0, 300, 3):
        rows[i]["label"] = None
    project.write_shard("more.jsonl", rows)
    (project.root / "data/torn.parquet").write_bytes(b"PAR1")
    corpus = find_shards(str(project.root / "data"))
    key = [tuple(row["pixels"]) for row in [*make_rows(50, 0), *make_rows(30, 1), *rows]]

    def drawn(count, seed):
        return [key.index(tuple(sample.data[0].tolist())) for sample in draw_samples(corpus, encoder(), count, seed)]

    assert drawn(40, 0) == drawn(40, 0)
    assert set(drawn(40, 0)) != set(drawn(40, 1))
    assert set(drawn(40, 0)) <= set(drawn(80, 0))
    assert len(set(drawn(1000, 0))) == 280  # every good row, once
    counts = np.zeros(len(key))
    for seed in range(200):
        for i in drawn(28, seed):
            counts[i] += 1
    assert counts[80::3].sum() == 0
    good = np.delete(counts, np.arange(80, 380, 3))
    for part in (good[:50], good[50:80], good[80:]):  # by shard: 20 draws expected per row, 200 · 0.1
        assert abs(part.mean() - 20) < 4 * np.sqrt(200 * 0.1 * 0.9 / len(part))
    assert good.min() > 0


def test_workers_draw_the_sample_of_one_and_read_each_shard_once(project, monkeypatch):
    monkeypatch.setattr(fitting, "_ALWAYS_BYTES", 0)  # rows that one has at hand take the others a shard to read
    monkeypatch.setattr(fitting, "_BYTES_PER_SECOND", 0.0)
    for i in range(4):
        project.write_shard(f"more/{i}.{'jsonl' if i % 2 else 'parquet'}", make_rows(20, i + 2))
    corpus = find_shards(str(project.root / "data"))
    expected = [sample.data[0].tolist() for sample in draw_samples(corpus, encoder(), 30, 0)]
    read, before = [], drawing.read
    monkeypatch.setattr(drawing, "read", lambda shard, *rest: (read.append(shard.path), before(shard, *rest))[1])
    first = draw_samples(corpus, encoder(), 30, 0, together(project, (0, 2)))
    assert len(read) == len(corpus.shards)
    again = draw_samples(corpus, encoder(), 30, 0, together(project, (1, 2)))
    assert len(read) == len(corpus.shards)  # what was drawn lies in the output
    assert [sample.data[0].tolist() for sample in first] == [sample.data[0].tolist() for sample in again] == expected
    for state in (project.root / "shared").rglob("draw-2-*.pt"):
        state.unlink()
    lost = draw_samples(corpus, encoder(), 30, 0, together(project, (1, 2)))
    assert [sample.data[0].tolist() for sample in lost] == expected


def test_a_sample_is_the_same_though_what_workers_leave_vanishes(project, monkeypatch):
    """As when another runner is done with all shards, and clears: what is made again is read once."""
    corpus = find_shards(str(project.root / "data"))
    expected = [sample.data[0].tolist() for sample in draw_samples(corpus, encoder(), 30, 0)]
    monkeypatch.setattr(Together, "_found", lambda self, path: None)
    again = draw_samples(corpus, encoder(), 30, 0, together(project, (0, 2)))
    assert [sample.data[0].tolist() for sample in again] == expected


def together(project, turn) -> Together:
    return Together(Store.at(str(project.root / "shared")), "k", torch.device("cpu"), turn)


ERRORS = [
    ({"method": "trak", "models": ["a"], "targets": ["z"]}, "methods.0.targets.0: no target is called 'z'"),
    ({"method": "trak", "models": ["a"], "targets": []}, "methods.0.targets: needs a target; define one under targets"),
    ({"method": "trak", "models": ["q"]}, "methods.0.models.0: no model is called 'q'"),
    ({"method": "trak", "models": ["a"], "sketch": {"kind": "kroneker"}}, "did you mean 'kronecker'?"),
    ({"method": "less", "models": ["a"]}, "methods.0.optimizers: is missing"),
    (
        {"method": "less", "models": ["a"], "optimizers": ["bare.safetensors"]},
        "bare.safetensors: does not say the optimiser's betas",
    ),
    (
        {"method": "less", "models": ["a"], "optimizers": [{"path": "bare.safetensors", "betas": [0.9, 0.95]}]},
        "bare.safetensors: does not say the optimiser's eps",
    ),
    ({"method": "less", "models": ["a"], "optimizers": ["no.pt"]}, "methods.0.optimizers.0: no such file or folder"),
    (
        {"method": "less", "models": ["a", "b"], "optimizers": ["optimizer.safetensors"]},
        "methods.0 (less): less: expected one optimiser state per checkpoint, 2, got 1",
    ),
    (
        {"method": "less", "models": ["a"], "optimizers": ["optimizer.safetensors"]},
        "methods.0 (less): the optimiser's state has no exp_avg for parameter '2.weight'",
    ),
    (
        {"method": "trak", "models": ["a", "wide"]},
        "methods.0 (trak): trak: checkpoint 1 differs from checkpoint 0 in parameter '0.weight'",
    ),
    (
        {"method": "trak", "models": ["a"], "sketch": {"kind": "sparse", "dim": 1_000_000}},
        "features of 1,000,000 numbers, whose second moments take 7,451 GiB, more than 8 GiB; take a smaller sketch",
    ),
    ({"method": "logra", "models": ["a"], "layers": "nothing*"}, "'nothing*' matches no layer and no parameter"),
    (
        {"method": "dsdm", "models": ["a"], "targets": ["empty"]},
        "targets.empty: no samples in",
    ),
    (
        {"method": "trak", "models": ["a"], "damping": 0.0},
        "methods.0 (trak): the second moment of 256 numbers is singular with damping 0.0",
    ),
    (
        {"method": "influence_distillation", "model": "a", "at": "nowhere"},
        "methods.0 (influence_distillation): 'nowhere' matches no layer",
    ),
]


@pytest.mark.parametrize(("method", "message"), ERRORS, ids=[message[:40] for _, message in ERRORS])
def test_mistakes_are_one_line_on_the_command_line(targeted, capsys, method, message):
    targeted.write_shard("../empty/e.jsonl", [{"pixels": None, "label": 0}])
    targeted.recipe["targets"]["empty"] = {"path": "empty"}
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(SIZE, 9), nn.ReLU(), nn.Linear(9, CLASSES))
    save_file(wide.state_dict(), targeted.root / "models/wide.safetensors")
    targeted.recipe["models"]["wide"] = {"kind": "mlp", "path": "models/wide.safetensors"}
    moments = {f"0.{kind}.{m}": p for kind, p in (("weight", torch.ones(8, SIZE)), ("bias", torch.ones(8)))
               for m in ("exp_avg", "exp_avg_sq")}  # fmt: skip
    constants = {"betas": "[0.9, 0.95]", "eps": "1e-8"}
    save_file({n: t.clone() for n, t in moments.items()}, targeted.root / "optimizer.safetensors", constants)
    save_file({n: t.clone() for n, t in moments.items()}, targeted.root / "bare.safetensors")
    only(targeted, **({"targets": ["x"]} | method))
    assert main(["score", "-q", str(targeted.path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not targeted.tables()


def test_bad_rows_of_a_target_are_left_out_aloud_and_bad_shards_are_errors(targeted, caplog):
    rows = make_rows(5, 8)
    rows[3]["label"] = 7
    targeted.write_shard("../targets/x.jsonl", rows)
    only(targeted, method="less", models=["a"], optimizers=None)
    with caplog.at_level("WARNING", logger="assay"):
        score(targeted)
    assert "targets.x: 4 samples; 1 rows are none, the first: x.jsonl, row 3: label is 7" in caplog.text
    (targeted.root / "targets/y.parquet").write_bytes(b"PAR1")
    with pytest.raises(EngineError, match=r"targets\.y: y\.parquet: "):
        score(targeted, rescore=True)
    with pytest.raises(RecipeError, match=r"targets\.x\.path: no such file"):
        score(targeted, "targets.x.path=targets/none.jsonl")


def test_validate_says_what_fits_without_fitting(targeted, capsys, monkeypatch):
    monkeypatch.setattr(workshop, "_fit", lambda *_: pytest.fail("fitted"))
    assert main(["validate", str(targeted.path)]) == 0
    assert "ekfac_y (keep high)" in capsys.readouterr().out
    save_mlp(targeted.root / "models/b.safetensors", 3)
    assert main(["validate", str(targeted.path), "--set", "methods.0.layers=zzz"]) == 2


def test_memory_that_runs_out_while_fitting_is_said(targeted, monkeypatch):
    def fail(*_):
        raise MemoryError("no more")

    monkeypatch.setattr(TRAK, "fit", fail)
    with pytest.raises(EngineError, match=r"methods\.0 \(trak\): ran out of memory; take a smaller sketch or batch"):
        score(targeted)
