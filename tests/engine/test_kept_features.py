"""`keep_features`: a corpus is run through the models once, and scored for other targets without them."""

from __future__ import annotations

import json
import os
import tempfile

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from torch import nn

from assay.cli import main
from assay.corpus.errors import CorpusError
from assay.corpus.features import FeatureSpec, FeatureStore, FeatureWriter, open_features
from assay.corpus.storage import Store
from assay.engine import batches, shard
from assay.engine.local import run
from assay.recipe.errors import ChangedError
from assay.recipe.recipe import load_recipe
from tests.engine import test_text
from tests.small_project import CLASSES, SIZE, make_rows, save_mlp

text_recipe = test_text.text_recipe

SKETCH = {"kind": "kronecker", "rows": 4, "cols": 4}
NAMES = ["trak", "trackstar"]
DTYPES = ["float32", "float16", "bfloat16", "int8"]
# Of the largest score, stored against not stored; measured: 2e-7, 6e-4, 6e-3 and 2e-2.
ROUNDING = {"float32": 1e-6, "float16": 2e-3, "bfloat16": 2e-2, "int8": 6e-2}


@pytest.fixture
def kept(project):
    """Three methods that keep their features, a pool of its own, bad rows, and two sets of targets."""
    for name, rows, seed in (("x", 5, 8), ("y", 6, 9), ("z", 7, 10)):
        project.write_shard(f"../targets/{name}.jsonl", make_rows(rows, seed))
    project.write_shard("../pool.parquet", make_rows(60, 30))
    bad = make_rows(30, 1)
    bad[3]["label"] = CLASSES
    bad[29]["pixels"] = None
    project.write_shard("deep/b.jsonl", bad)
    project.write_shard("none.jsonl", [{"id": "n", "pixels": None, "label": 0}])
    common = {"models": ["a", "b"], "sketch": SKETCH, "keep_features": "float32"}
    project.recipe.update(
        methods=[
            *({"method": name} | common for name in NAMES),
            {"method": "less", "optimizers": None, "weights": [1.0, 3.0]} | common,
        ],
        targets={name: {"path": f"targets/{name}.jsonl"} for name in "xy"},
        fit={"path": "pool.parquet"},
    )
    project.write_recipe()
    return project


OTHER = "targets={x: {path: targets/x.jsonl}, z: {path: targets/z.jsonl}}"


def score(project, *overrides, **options):
    return run(load_recipe(str(project.path), overrides), **options)


def keeping(project, dtype):
    """Overrides: every method keeps its features as ``dtype``; None: none does."""
    return [f"methods.{i}.keep_features={dtype or 'null'}" for i in range(len(project.recipe["methods"]))]


def only(project, **method):
    project.recipe["methods"] = [method]
    project.write_recipe()


def tables(folder):
    return {str(p.relative_to(folder)): pq.read_table(p) for p in sorted(folder.rglob("*.parquet"))}


def features(project) -> dict[str, bytes]:
    folder = project.scores / "features"
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def assert_same_scores(found, wanted, tolerance):
    assert found.keys() == wanted.keys()
    for path, table in wanted.items():
        assert found[path].column_names == table.column_names
        assert found[path].select(["row", "id"]).equals(table.select(["row", "id"]))
        for name in table.column_names[2:]:
            want, got = table[name].to_numpy(), found[path][name].to_numpy()
            np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max(initial=0), err_msg=name)


@pytest.fixture
def inputs_seen():
    """Every input that any model's first layer is given, as bytes."""
    seen: list[bytes] = []

    def hook(module, args):
        if isinstance(module, nn.Linear) and module.in_features == SIZE:
            seen.extend(row.numpy().tobytes() for row in args[0].detach())

    handle = torch.nn.modules.module.register_module_forward_pre_hook(hook)
    yield seen
    handle.remove()


@pytest.mark.parametrize("dtype", DTYPES)
def test_new_targets_need_no_pass_over_the_corpus(kept, dtype, inputs_seen, monkeypatch):
    corpus = {np.float32(row["pixels"]).tobytes() for row in make_rows(50, 0) + make_rows(30, 1)[:3]}
    assert score(kept, *keeping(kept, dtype)).reused == 0
    assert corpus <= set(inputs_seen)
    quarantine = kept.quarantine()
    assert len(quarantine) == 3

    inputs_seen.clear()
    with monkeypatch.context() as patch:
        patch.setattr(shard, "RowReader", lambda *_: pytest.fail("the corpus was read"))
        report = score(kept, *keeping(kept, dtype), OTHER, rescore=True)
    assert inputs_seen  # the targets and the pool
    assert not corpus & set(inputs_seen)
    assert (report.scored, report.rescored, report.reused) == (3, 3, 3)
    assert (report.rows, report.rows_scored, report.rows_quarantined) == (81, 78, 3)
    assert "3 scored (3 of them again, 3 from stored features)" in report.lines()[0]
    assert kept.quarantine() == quarantine

    score(kept, *keeping(kept, dtype), OTHER, "output=fresh")
    found, fresh = tables(kept.scores), tables(kept.root / "fresh")
    assert {"trak_z", "less_z"} < set(found["a.parquet"].column_names)
    assert_same_scores(found, fresh, 1e-6)
    for path, table in fresh.items():
        assert found[path].schema.equals(table.schema, check_metadata=True)  # the footers, too
    assert score(kept, *keeping(kept, dtype), OTHER).done_before == 3


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_are_those_of_features_that_are_not_stored_but_for_rounding(kept, dtype):
    score(kept, *keeping(kept, dtype))
    score(kept, *keeping(kept, None), "output=live")
    live = tables(kept.root / "live")
    assert not (kept.root / "live/features").exists()
    assert_same_scores(tables(kept.scores), live, ROUNDING[dtype])
    if dtype != "float32":
        with pytest.raises(AssertionError):
            assert_same_scores(tables(kept.scores), live, 1e-6)


def test_what_is_stored(kept):
    score(kept)
    shards = ["a.arrow", "deep/b.arrow", "none.arrow"]
    assert list(features(kept)) == sorted(f"{m}/{k}/{s}" for m in [*NAMES, "less"] for k in (0, 1) for s in shards)
    store = FeatureStore(str(kept.scores / "features/trak/1"))
    assert (store.rows, store.dim, store.spec.method, store.spec.extra) == (78, 16, "trak", "doubt")
    assert store.spec.sketch == {"kind": "Kronecker", "rows": 4, "cols": 4, "seed": 1, "name": ""}
    doubts = torch.cat([batch.extra for batch in store.batches()])
    assert bool(((doubts > 0) & (doubts < 1)).all())
    _, indices = store.topk(torch.randn(1, 16), 3)
    assert len(store.locate(indices)) == 3
    footer = store.files[1].metadata
    assert footer["models"].keys() == {"b"}
    assert footer["rows"] == {"scored": 28, "quarantined": 2}
    assert footer["input"]["path"] == "deep/b.jsonl"
    text = json.dumps(footer)
    assert not any(word in text for word in ("targets", "damping", "corpora", str(kept.root)))


def test_features_do_not_depend_on_targets_or_kernel(kept):
    score(kept)
    before = features(kept)
    changes = [
        [OTHER],
        ["methods.0.damping=0.5", "methods.1.target_share=0.5", "methods.2.weights=[3.0, 1.0]"],
        ["fit.samples=50"],
        ["methods.0.targets=[x]"],
    ]
    for overrides in changes:
        assert score(kept, *overrides, rescore=True).reused == 3, overrides
    assert features(kept) == before


def touch(project):
    os.utime(project.root / "data/a.parquet", (1, 1))


def retrain(project):
    save_mlp(project.root / "models/a.safetensors", 5)


def other_optimizer(project):
    path = project.root / "optimizer.pt"
    state = torch.load(path, weights_only=True)
    for moments in state["state"].values():
        moments["exp_avg"] += 1
    torch.save(state, path)


def save_optimizer(project):
    model = nn.Sequential(nn.Linear(SIZE, 8), nn.ReLU(), nn.Linear(8, CLASSES))
    optimizer = torch.optim.Adam(model.named_parameters())
    model(torch.ones(1, SIZE)).sum().backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), project.root / "optimizer.pt")


CHANGES = [
    ("features of another input (input.mtime_ns", touch, [], 2),
    ("features of other models (models.a is sha256", retrain, [], 0),
    ("features from another recipe (recipe.seed is 0", None, ["seed=1"], 0),
    ("features from another recipe (recipe.method.sketch.rows is 4", None, ["methods.0.sketch.rows=5"], 0),
    ("features from another recipe (recipe.method.layers is None", None, ["methods.0.layers='0'"], 0),
    ("features from another recipe (recipe.method.optimizers is sha256", other_optimizer, [], 0),
    ("features from another recipe (recipe.method.eps is outside", None, ["methods.0.eps=inside"], 0),
    ("features from another recipe (recipe.id_column is id", None, ["corpus.id_column=null"], 0),
    ("features of another kind (features.dtype is float32", None, ["methods.0.keep_features=float16"], 0),
]


@pytest.mark.parametrize(("words", "change", "overrides", "reused"), CHANGES, ids=[c[0][:50] for c in CHANGES])
def test_features_of_something_else_are_not_used_but_made_again(kept, caplog, words, change, overrides, reused):
    save_optimizer(kept)
    only(kept, method="less", models=["a"], optimizers=["optimizer.pt"], sketch=dict(SKETCH), keep_features="float32")
    score(kept)
    before = features(kept)
    if change:
        change(kept)
    with caplog.at_level("INFO", logger="assay"):
        report = score(kept, *overrides, OTHER, rescore=True)
    assert (report.scored, report.reused) == (3, reused)
    assert f"less/0/a.arrow: not used, but made again: {words}" in caplog.text
    after = features(kept)
    assert after.keys() == before.keys()
    assert sum(after[path] != before[path] for path in after) == 3 - reused
    score(kept, *overrides, OTHER, "output=fresh")
    assert_same_scores(tables(kept.scores), tables(kept.root / "fresh"), 1e-6)
    assert score(kept, *overrides, rescore=True).reused == 3  # what was made again is used


def test_without_rescore_a_change_is_an_error_and_nothing_is_written(kept):
    score(kept)
    before = features(kept)
    for overrides in ([OTHER], ["methods.0.keep_features=float16"], ["methods.0.sketch.rows=5"]):
        with pytest.raises(ChangedError):
            score(kept, *overrides)
    assert features(kept) == before


def test_a_recipe_that_keeps_nothing_has_the_identity_it_always_had(kept):
    recipe = load_recipe(str(kept.path), keeping(kept, None))
    assert all("keep_features" not in method for method in recipe.identity()["methods"])


def test_one_missing_file_is_one_shard_scored_anew(kept):
    score(kept)
    before = features(kept)
    (kept.scores / "features/trackstar/1/a.arrow").unlink()
    report = score(kept, OTHER, rescore=True)
    assert (report.scored, report.reused) == (3, 2)
    assert features(kept) == before


def test_a_list_of_quarantined_rows_that_is_not_theirs_is_made_again(kept):
    score(kept)
    quarantine = kept.quarantine()
    (kept.scores / "quarantine/deep/b.jsonl").unlink()
    report = score(kept, OTHER, rescore=True)
    assert (report.scored, report.reused) == (3, 2)
    assert kept.quarantine() == quarantine


def test_a_row_that_did_not_fit_into_memory_has_no_features(kept, monkeypatch):
    original = batches.unless_out_of_memory

    def cramped(scorer, collate, samples, times):
        return None if any(sample.id == "s0-7" for sample in samples) else original(scorer, collate, samples, times)

    monkeypatch.setattr(batches, "unless_out_of_memory", cramped)
    monkeypatch.setattr(batches.gc, "collect", lambda *_: None)
    assert score(kept).rows_quarantined == 4
    quarantine = kept.quarantine()
    report = score(kept, OTHER, rescore=True)
    assert (report.reused, report.rows_scored, report.rows_quarantined) == (3, 77, 4)
    assert kept.quarantine() == quarantine
    assert 7 not in pq.read_table(kept.scores / "a.parquet")["row"].to_pylist()


def test_beside_a_method_that_keeps_nothing_the_models_run(kept):
    score(kept, *keeping(kept, None), "output=live")
    kept.recipe["methods"].insert(1, {"method": "grad_mimic", "model": "a", "reference": "ref"})
    kept.write_recipe()
    score(kept)
    report = score(kept, OTHER, rescore=True)
    assert (report.scored, report.reused) == (3, 0)
    report = score(kept, rescore=True)
    with_mimic = tables(kept.scores)
    assert with_mimic["a.parquet"].column_names[:6] == ["row", "id", "trak", "trak_x", "trak_y", "mimic"]
    live = tables(kept.root / "live")
    without = {path: table.select(live[path].column_names) for path, table in with_mimic.items()}
    assert_same_scores(without, live, 1e-6)
    del kept.recipe["methods"][1]
    kept.write_recipe()
    assert score(kept, OTHER, rescore=True).reused == 3  # without it, the same features will do


def test_long_shards_are_scored_in_parts(kept, monkeypatch):
    monkeypatch.setattr("assay.engine.kept_features.ROWS", 7)
    monkeypatch.setattr("assay.corpus.features.MAX_BATCH_ROWS", 16)
    score(kept)
    assert score(kept, OTHER, rescore=True).reused == 3
    score(kept, OTHER, "output=fresh")
    assert_same_scores(tables(kept.scores), tables(kept.root / "fresh"), 1e-6)


@pytest.mark.parametrize("at", [1, 4, 8, 18])
def test_an_interrupt_leaves_whole_files_and_the_next_run_goes_on(kept, monkeypatch, at):
    score(kept, "output=undisturbed")
    original, saves = FeatureWriter.save, []

    def save(self, store, path, metadata):
        saves.append(path)
        if len(saves) == at:
            with store.write(path) as file:  # in the middle of a file
                file.write(b"ARROW1")
                raise KeyboardInterrupt
        original(self, store, path, metadata)

    with monkeypatch.context() as patch:
        patch.setattr(FeatureWriter, "save", save)
        with pytest.raises(KeyboardInterrupt):
            score(kept)
    found = features(kept)
    assert len(found) == at - 1
    assert all(open_features(Store.at(str(kept.scores / "features")), path) for path in found)
    report = score(kept)
    assert (report.done_before, report.reused) == ((at - 1) // 6, 0)
    folder = kept.root / "undisturbed"
    assert features(kept) == {
        str(p.relative_to(folder / "features")): p.read_bytes() for p in sorted(folder.rglob("*.arrow"))
    }
    assert kept.tables() == {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.parquet")}


def test_an_interrupt_between_features_and_table(kept, monkeypatch):
    """The features are there and are used: the run that they come from got as far as that."""

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shard.ScoreWriter, "save", interrupt)
        with pytest.raises(KeyboardInterrupt):
            score(kept)
    assert len(features(kept)) == 6
    report = score(kept)
    assert (report.scored, report.reused) == (3, 1)
    score(kept, "output=fresh")
    assert_same_scores(tables(kept.scores), tables(kept.root / "fresh"), 1e-6)


def test_every_worker_uses_them(kept):
    score(kept)
    for i in (1, 2):
        report = score(kept, OTHER, rescore=True, part=(i, 2))
        assert report.scored == report.reused > 0


ERRORS = [
    (
        {"keep_features": "float15"},
        "methods.0.keep_features: input should be 'float32', 'float16', 'bfloat16' or 'int8', got 'float15'",
    ),
    (
        {"keep_features": "float16", "name": "../up"},
        "methods: keep_features: the name '../up' cannot name a folder; use letters, digits, '_', '-' and '.'",
    ),
    (
        {"method": "ekfac", "model": "a", "keep_features": "float16"},
        "methods.0.keep_features: unknown key",
    ),
]


@pytest.mark.parametrize(("method", "message"), ERRORS, ids=[message[:60] for _, message in ERRORS])
def test_mistakes_are_one_line_on_the_command_line(kept, capsys, method, message):
    only(kept, **({"method": "trak", "models": ["a"]} if "model" not in method else {}) | method)
    assert main(["validate", str(kept.path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_overflow_names_the_remedy(kept, capsys):
    save_mlp(kept.root / "models/a.safetensors", 0, scale=1e6)
    only(kept, method="less", models=["a"], optimizers=None, sketch=SKETCH, keep_features="float16")
    assert main(["score", "-q", str(kept.path)]) == 2
    error = capsys.readouterr().err
    assert "a.parquet: less: keep_features: features: values up to" in error
    assert "overflow float16; store them as bfloat16 or float32" in error
    assert error.count("\n") == 1
    assert not kept.tables()
    assert not features(kept)
    assert main(["score", "-q", str(kept.path), "--set", "methods.0.keep_features=bfloat16"]) == 1  # bad rows


def test_somebody_elses_file_is_not_overwritten(kept):
    path = kept.scores / "features/trak/0/a.arrow"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"mine")
    with pytest.raises(CorpusError, match=r"a\.arrow: not a readable feature file"):
        score(kept)
    assert path.read_bytes() == b"mine"
    assert not kept.tables()


def test_an_extra_number_per_row(tmp_path):
    spec = FeatureSpec("trak", 2, "float16", extra="doubt")
    with tempfile.TemporaryFile() as spool:
        writer = FeatureWriter(spec, spool)
        stored = writer.add([3, 4], ["a", "b"], torch.tensor([[0.1, 2.0], [3.0, 4.0]]), torch.tensor([0.1, torch.nan]))
        assert stored.values()[0, 0] == torch.tensor(0.1).half()
        for extra in (None, torch.zeros(3)):
            with pytest.raises(ValueError, match=r"features: expected \(2,\) extra numbers, got (none|\(3,\))"):
                writer.add([5, 6], ["c", "d"], torch.zeros(2, 2), extra)
        writer.save(Store.at(str(tmp_path)), "a.arrow", {})
    (batch,) = open_features(Store.at(str(tmp_path)), "a.arrow").batches()
    assert torch.equal(batch.features, stored.features)
    assert batch.extra[0] == torch.tensor(0.1)  # float32, whatever the features are
    assert bool(batch.extra[1].isnan())
    last = batch[1:]
    assert (last.rows.tolist(), last.ids.to_pylist(), last.values().tolist()) == ([4], ["b"], [[3.0, 4.0]])
    with pytest.raises(ValueError, match="the extra column cannot be called 'scale'"):
        FeatureSpec("trak", 2, extra="scale")
    with tempfile.TemporaryFile() as spool, pytest.raises(ValueError, match="expected no extra numbers, got"):
        FeatureWriter(FeatureSpec("less", 2), spool).add([0], ["a"], torch.zeros(1, 2), torch.zeros(1))


def test_texts(text_recipe, monkeypatch):
    """Token-level doubts, a tokenizer, and a mask as the sketch."""
    path, texts = text_recipe
    for name, part in (("x", texts[:5]), ("y", texts[5:12])):
        lines = [json.dumps({"text": text + " gold"}) for text in part]
        (path.parent / f"{name}.jsonl").write_text("\n".join(lines))
    recipe = yaml.safe_load(path.read_text())
    grass = {"kind": "mask", "rows": 6, "cols": 5, "then": {"kind": "sparse", "dim": 16}}
    recipe["batch"], recipe["fit"] = {"tokens": 400}, {"samples": 20}
    common = {"models": ["small"], "layers": "*.mlp.*", "keep_features": "float32"}
    recipe["methods"] = [{"method": "trak", "sketch": SKETCH} | common, {"method": "logra", "sketch": grass} | common]
    recipe["targets"] = {"x": {"path": "x.jsonl"}}
    path.write_text(yaml.safe_dump(recipe))
    run(load_recipe(str(path)))
    retarget = ["targets={y: {path: y.jsonl}}"]
    with monkeypatch.context() as patch:
        patch.setattr(shard, "RowReader", lambda *_: pytest.fail("the corpus was read"))
        assert run(load_recipe(str(path), retarget), rescore=True).reused == 1
    assert FeatureStore(str(path.parent / "scores/features/logra/0")).spec.sketch["then"]["kind"] == "Sparse"
    run(load_recipe(str(path), [*retarget, "output=fresh"]))
    found, fresh = tables(path.parent / "scores"), tables(path.parent / "fresh")
    assert found["a.parquet"].num_rows == 37
    assert_same_scores(found, fresh, 1e-6)


def test_embeddings_are_kept_with_their_classes(kept):
    common = {"model": "a", "keep_features": "float32"}
    kept.recipe["methods"] = [{"method": "embedding_similarity"} | common, {"method": "rds_plus"} | common]
    kept.write_recipe()
    score(kept)
    store = FeatureStore(str(kept.scores / "features/embedding_similarity/0"))
    assert store.spec.extra == "label"
    assert all(np.allclose(batch.values().norm(dim=1), 1) for batch in store.batches())
    labels = torch.cat([batch.extra for batch in store.batches()])
    shards = {path: [json.loads(line) for line in (kept.root / "data" / path).open()] for path in ["deep/b.jsonl"]}
    places = [(i, place) for i, place in enumerate(store.locate(range(store.rows))) if place.shard in shards]
    assert len(places) == 28
    assert all(labels[i] == shards[place.shard][place.row]["label"] for i, place in places)
    changes = (OTHER, "methods.0.within=max")
    assert score(kept, *changes, rescore=True).reused == 3
    score(kept, *changes, *keeping(kept, None), "output=live")
    assert_same_scores(tables(kept.scores), tables(kept.root / "live"), 1e-6)
