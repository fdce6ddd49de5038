"""Retrieve by stored features, then score the few with what is exact: by the commands that there are."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from assay.cli import main
from tests.small_project import make_project, make_rows


def columns(folder: Path) -> dict[str, list[float]]:
    """By id, the row's scores."""
    rows = [row for path in sorted(folder.rglob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    return {row["id"]: [row[name] for name in ("ekfac_cg", "source")] for row in rows}


def test_a_shortlist_has_the_scores_that_its_rows_would_have_in_the_whole(tmp_path: Path) -> None:
    """As docs/methods/influence.md says: the fit stays the whole corpus's."""
    project = make_project(tmp_path)
    project.write_shard("../target.jsonl", make_rows(6, 2))
    shared = {"targets": {"t": {"path": "target.jsonl"}}, "fit": {"path": "data", "samples": 64}}
    exact = [
        {"method": "ekfac_cg", "model": "a"},
        {"method": "source", "models": ["a", "ref"], "rates": [0.5, 1.0]},
    ]
    project.write_recipe(**shared, methods=[{"method": "logra", "models": ["a"], "keep_features": "int8"}])
    assert main(["score", str(project.path)]) == 0
    assert main(["select", str(project.scores), "--by", "logra", "--top", "10", "--out", str(tmp_path / "few")]) == 0
    found = {}
    for corpus, name in (("few", "exact-few"), ("data", "exact-all")):
        recipe = {**project.recipe, **shared, "methods": exact, "corpus": {"path": corpus, "id_column": "id"}}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({**recipe, "output": name}))
        assert main(["score", str(tmp_path / f"{name}.yaml")]) == 0
        found[name] = columns(tmp_path / name)
    few, whole = found["exact-few"], found["exact-all"]
    assert len(few) == 10
    assert len(whole) == 80
    for row, values in few.items():
        assert values == pytest.approx(whole[row], rel=1e-3, abs=1e-5)
