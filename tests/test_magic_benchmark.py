"""The experiment on derivatives through training, at its smallest."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.quality.magic import QUICK, one


@pytest.mark.slow
def test_one_setting() -> None:
    case = one(replace(QUICK, steps=20, queries=3))
    assert case["loop_against_magics"] < 1e-5  # the truth's own loop trains the same model
    assert min(case["metasmoothness"]) > 0.95
    values = {label: row["lds_0.1"]["value"] for label, row in case["methods"].items()}
    assert values["MAGIC"] > 0.95
    assert values["MAGIC"] > values["EK-FAC"] > values["random"]
    assert values["EK-FAC + CG"] > values["random"]
    assert case["methods"]["MAGIC"]["qld"]["value"] > case["methods"]["random"]["qld"]["value"]
