"""A selection as indices, as weights, and as a folder that `datasets` loads."""

from __future__ import annotations

import hashlib
import json

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from assay.corpus.errors import CorpusError
from assay.curate import RuleOptions, curate, read_whole
from assay.engine.local import run
from assay.recipe.recipe import load_recipe
from assay.train import WeightedSampler, join
from tests.small_project import make_project, make_rows


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A corpus of three shards with a bad row, and its scores."""
    made = make_project(tmp_path_factory.mktemp("forms"))
    rows = make_rows(20, 5)
    rows[3]["label"] = None
    made.write_shard("bad.jsonl", rows)
    run(load_recipe(str(made.path)))
    return made


def best(amount="0.5", **options):
    return RuleOptions(by="mimic", top=amount, **options).rule()


def files(folder) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def check_manifest(out, form) -> dict:
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["output"] == form
    for shard in manifest["shards"]:
        assert shard["written_sha256"] == hashlib.sha256((out / shard["written"]).read_bytes()).hexdigest()
        assert pq.read_metadata(out / shard["written"]).num_rows == shard["kept"]
    return manifest


def test_indices_are_rows_of_shards_and_of_all_of_them(project, tmp_path):
    curated = curate(str(project.scores), "mimic", best(), str(tmp_path), form="indices")
    shards = {"a": "a.parquet", "bad": "bad.jsonl", "deep/b": "deep/b.jsonl"}
    written = {f"indices/{stem}.parquet" for stem in shards}
    assert files(tmp_path) == written | {f"_selection/{stem}.parquet" for stem in shards} | {"manifest.json"}
    check_manifest(tmp_path, "indices")
    tables = [pq.read_table(tmp_path / f"indices/{stem}.parquet") for stem in shards]
    assert [set(t["shard"].to_pylist()) for t in tables] == [{path} for path in shards.values()]
    for table, first in zip(tables, (0, 50, 70), strict=True):
        assert [row + first for row in table["row"].to_pylist()] == table["index"].to_pylist()
    whole = read_whole(str(project.scores), ["mimic"]).table
    order = np.argsort(-whole["mimic"].to_numpy(), kind="stable")[: curated.kept]
    assert pa.concat_tables(tables)["index"].to_pylist() == sorted(whole["row"].to_numpy()[order].tolist())


def test_an_index_over_all_shards_ends_before_one_that_could_not_be_read(tmp_path):
    made = make_project(tmp_path)
    (made.root / "data/b.parquet").write_bytes(b"PAR1")
    run(load_recipe(str(made.path)))
    curate(str(made.scores), "mimic", best("1.0"), str(tmp_path / "out"), form="indices")
    assert pq.read_table(tmp_path / "out/indices/a.parquet")["index"].to_pylist() == list(range(50))
    assert pq.read_table(tmp_path / "out/indices/deep/b.parquet")["index"].null_count == 30


def test_weights_have_mean_one_over_what_is_kept_and_go_into_a_trainer(project, tmp_path):
    rule = best("0.5", temperature=0.5, weigh=True)
    curated = curate(str(project.scores), "mimic", rule, str(tmp_path), form="weights")
    check_manifest(tmp_path, "weights")
    table = pa.concat_tables([pq.read_table(path) for path in sorted((tmp_path / "weights").rglob("*.parquet"))])
    assert table.schema.names == ["id", "weight"]
    assert table.num_rows == curated.kept == 50
    whole = read_whole(str(project.scores), ["mimic"]).table
    score = dict(zip(whole["id"].to_pylist(), whole["mimic"].to_pylist(), strict=True))
    worth = np.exp(np.array([score[name] for name in table["id"].to_pylist()]) / 0.5)
    np.testing.assert_allclose(table["weight"].to_numpy(), worth / worth.mean(), rtol=1e-5)
    data = datasets.Dataset.from_list([*make_rows(50, 0), *make_rows(20, 5), *make_rows(30, 1)])
    joined = join(data, table, missing="null")
    assert len(set(WeightedSampler(joined, "weight", num_samples=2000))) <= 50
    assert np.isnan(joined.with_format("numpy")["weight"]).sum() == 50


def test_two_gaussians_weigh_by_themselves(project, tmp_path):
    rule = RuleOptions(by="loss", gmm=True, keep="low", weigh=True).rule()
    curate(str(project.scores), "loss", rule, str(tmp_path), form="weights")
    weights = np.concatenate([pq.read_table(p)["weight"].to_numpy() for p in (tmp_path / "weights").rglob("*.parquet")])
    assert weights.mean() == pytest.approx(1, abs=1e-5)
    fates = pq.read_table(tmp_path / "_selection/a.parquet")
    assert fates["weight"].to_numpy().max() <= 1  # there they are the probabilities


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_a_folder_that_datasets_loads(suffix, tmp_path):
    made = make_project(tmp_path)
    (made.root / "data/a.parquet").unlink()
    (made.root / "data/deep/b.jsonl").unlink()
    rows = [make_rows(20, seed) for seed in range(3)]
    for name, own in zip(("a", "deep/b", "deep/er/c"), rows, strict=True):
        made.write_shard(name + suffix, own)
    run(load_recipe(str(made.path)))
    out = tmp_path / "out"
    curate(str(made.scores), "mimic", best("1.0"), str(out), form="datasets")
    curated = curate(str(made.scores), "mimic", best("2"), str(out), form="datasets")  # over the former
    loaded = datasets.load_dataset(str(out), cache_dir=str(tmp_path / "cache"), split="train")
    assert len(loaded) == curated.kept == 2
    known = {row["id"]: row["label"] for own in rows for row in own}
    assert all(known[row["id"]] == row["label"] for row in loaded)
    shards = json.loads((out / "manifest.json").read_text())["shards"]
    assert {f"data/{s['path']}" for s in shards if s["kept"]} == {f for f in files(out) if f.startswith("data/")}
    with pytest.raises(CorpusError, match="files that this selection would not write"):
        curate(str(made.scores), "mimic", best("2"), str(out), form="shards")


@pytest.mark.parametrize(
    ("form", "options", "message"),
    [
        ("datasets", {"top": "0.5"}, "a.parquet is loaded as parquet and bad.jsonl as json"),
        ("datasets", {"threshold": 1e9, "keep": "high"}, "no row is kept"),
        ("indexes", {"top": "0.5"}, "--format indexes: expected shards, indices, weights, datasets"),
        ("weights", {"top": "0.5"}, "--top weighs all rows that it keeps alike; add --temperature"),
        ("weights", {"sample": "0.5", "temperature": 1.0}, "--sample draws by the score already"),
        ("weights", {"gmm": True, "temperature": 1.0}, "--gmm has weights of its own"),
        ("weights", {"random": "0.5", "by": None, "temperature": 1.0}, "--by is missing"),
        ("weights", {"top": "0.5", "temperature": 0.0}, "temperature=0.0: expected a positive number"),
    ],
)
def test_what_cannot_be_written_so_is_refused(project, tmp_path, form, options, message):
    def attempt():
        rule = RuleOptions(**{"by": "mimic", **options}, weigh=form == "weights").rule()
        curate(str(project.scores), "mimic", rule, str(tmp_path), form=form)

    with pytest.raises(ValueError) as error:
        attempt()
    assert message in str(error.value)
    assert files(tmp_path) == set()


def test_a_rule_in_python_without_weights_has_none_to_write(project, tmp_path):
    with pytest.raises(CorpusError, match="the rule weighs all rows that it keeps alike"):
        curate(str(project.scores), "mimic", best(), str(tmp_path), form="weights")
