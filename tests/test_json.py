"""Whatever we write as JSON, a strict parser reads."""

from __future__ import annotations

import ast
import json
import math
from pathlib import Path

import numpy as np
import pytest
from pydantic import BaseModel

import assay
from assay._json import dumps
from assay.corpus.layout import MANIFEST
from assay.corpus.storage import Store
from assay.curate import RuleOptions, curate
from assay.curate.manifests import read_selection
from tests.small_scores import make_scores

ROOT = Path(assay.__file__).parent
WRITERS = sorted([*ROOT.rglob("*.py"), *(ROOT.parents[1] / "benchmarks").rglob("*.py")])
# The one writer; and a private copy of a configuration, for which transformers has a dialect of its own.
FREE = [ROOT / "_json.py", ROOT / "recipe/checkpoints.py"]


def strict(text: str) -> object:
    def refuse(name: str) -> float:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


class Facts(BaseModel):
    threshold: float | None
    found: dict[str, list[float]]


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan, 1e308, -0.0])
def test_every_number_comes_back(number):
    value = {"threshold": number, "found": {"a": (0.5, np.float64(number))}}
    text = dumps(value, indent=1)
    plain = strict(text)
    np.testing.assert_array_equal([float(plain["threshold"]), *map(float, plain["found"]["a"])], [number, 0.5, number])
    back = Facts.model_validate_json(text)
    np.testing.assert_array_equal([back.threshold, *back.found["a"]], [number, 0.5, number])


def test_keys_and_what_default_makes_are_spelt_out_too():
    assert strict(dumps({math.inf: {1}}, default=lambda found: [*found, math.nan])) == {"Infinity": [1, "NaN"]}
    assert dumps({"b": "é", "a": 1}, sort_keys=True, ensure_ascii=False) == '{"a": 1, "b": "é"}'
    with pytest.raises(TypeError, match="set is not JSON"):
        dumps({1})


def test_a_manifest_with_an_infinite_threshold_is_json_and_read_again(tmp_path):
    scores = make_scores(tmp_path, {"a": {"s": np.array([math.inf, 1, math.nan, 2], np.float32)}})
    curate(scores, "s", RuleOptions(by="s", top="1").rule(), str(tmp_path / "out"))
    assert strict((tmp_path / "out" / MANIFEST).read_text())["threshold"] == "Infinity"
    assert read_selection(Store.at(str(tmp_path / "out")), "--selection").threshold == math.inf


def test_there_is_one_writer():
    found = [
        f"{path}:{node.lineno}"
        for path in WRITERS
        if path not in FREE
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
        and node.attr in ("dump", "dumps", "JSONEncoder")
        and ast.unparse(node.value) == "json"
    ]
    assert not found, "write JSON with assay._json.dumps"
