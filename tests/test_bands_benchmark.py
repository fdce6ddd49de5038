"""The experiment on perplexity bands: what is spoilt, and which rows a condition keeps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

pytest.importorskip("transformers")
pytest.importorskip("duckdb")
from benchmarks.quality.bands import BANDS, SCORE, SPOIL, banded, chosen, make_model, spoilt
from tests.small_models import TEXTS, byte_tokenizer


def test_junk_is_as_long_as_what_it_stands_for() -> None:
    texts = [(text * 4)[:128] for text in TEXTS] * 30
    new, kinds = spoilt(texts, 1 / 3, seed=0)
    assert [len(text) for text in new] == [len(text) for text in texts]
    assert set(kinds) == {"clean", *SPOIL}
    assert [a for a, kind in zip(new, kinds, strict=True) if kind == "clean"] == [
        b for b, kind in zip(texts, kinds, strict=True) if kind == "clean"
    ]
    assert 0.25 < float((kinds != "clean").mean()) < 0.42
    assert spoilt(texts, 0.0, seed=0)[0] == texts
    assert {len(text) for text in spoilt([" " * 128] * 30, 1.0, seed=0)[0]} == {128}


def test_bands_are_the_sorted_losses_parts(tmp_path: Path) -> None:
    texts = [f"{text} {i}" for i in range(5) for text in TEXTS]
    bands = banded(texts, make_model(0).eval(), byte_tokenizer(), tmp_path)
    order = np.argsort(pq.read_table(tmp_path / "scores/a.parquet")[SCORE].to_numpy(), kind="stable")
    half, quarter = len(texts) // 2, len(texts) // 4
    assert set(bands["low half"]) == set(order[:half])
    assert set(bands["high half"]) == set(order[half:])
    assert set(bands["middle half"]) == set(order[quarter : 3 * quarter])
    rows = chosen(texts, np.array(["clean", "random"] * half), bands, seed=0)
    assert set(rows) > set(BANDS)
    assert (rows["random half of the clean (control)"] % 2 == 0).all()
    assert len(rows["random half (control)"]) == half
