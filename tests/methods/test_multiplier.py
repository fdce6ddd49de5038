"""Does DsDm's selection save training steps? The small version of ``python -m benchmarks.quality.multiplier``."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers")
from benchmarks.quality.multiplier import corpus
from benchmarks.quality.multiplier.experiment import QUICK, prepare, retrain, steps_to, summary


@pytest.mark.slow
def test_the_sets_have_nothing_in_common() -> None:
    data = corpus.build(pool=600, target=40, validation=20, test=40, seed=3)
    sets = [{bytes(row.tolist()) for row in part} for part in (data.pool, data.target, data.validation, data.test)]
    assert [len(s) for s in sets] == [600, 40, 20, 40], "a piece occurs twice"
    assert len(set.union(*sets)) == 700
    assert 0.05 <= float(np.mean(data.kinds == corpus.TARGET)) <= 0.1
    again = corpus.build(pool=600, target=40, validation=20, test=40, seed=3)
    assert bool((data.pool == again.pool).all())


def test_sources_are_without_their_docstrings() -> None:
    docstrings, rest = corpus._apart('"""One."""\n\ndef f():\n    """Two\n    lines."""\n    return 1\n')
    assert docstrings == "One.\n\nTwo\nlines."
    assert rest == "def f():\n    return 1"


def test_what_a_path_adds_for_a_while_is_not_in_the_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = [d.metadata["Name"] for d in corpus._installed()]
    (tmp_path / "guest-1.0.dist-info").mkdir()
    (tmp_path / "guest-1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: guest\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert importlib.metadata.version("guest") == "1.0"
    assert [d.metadata["Name"] for d in corpus._installed()] == before
    assert "torch" in before
    assert "assay" not in before


@pytest.mark.slow
def test_too_little_text_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"test set: expected 100000 pieces of 128 bytes, this machine has \d+"):
        corpus.build(pool=100, target=10, validation=10, test=100_000, seed=0)


def test_steps_to_a_loss_and_their_summary() -> None:
    def run(*losses: float) -> dict[str, object]:
        return {"steps": [10, 20, 30, 40], "losses": list(losses), "kinds": {}, "domain_auroc": 0.5}

    runs = {"random": [run(4, 3, 2.5, 2)] * 3, "x": [run(3, 2, 1, 1), run(3, 3, 3, 3), run(2, 2, 1, 1)]}
    assert steps_to(runs["x"][1], 2.0) is None
    random, x = summary(runs)
    assert (random["median_steps"], random["multiplier"]) == (40, 1.0)
    assert (x["steps"], x["median_steps"], x["multiplier"], x["range"]) == ([20, None, 10], 20, 2.0, None)


@pytest.mark.slow
def test_dsdm_needs_fewer_steps_than_random() -> None:
    prepared = prepare(QUICK, 0, ("random", "n-grams (DSIR)", "DsDm"))
    runs = {name: [retrain(QUICK, 0, scored.scores)] for name, scored in prepared.scored.items()}
    steps = {row["selection"]: row["median_steps"] for row in summary(runs)}
    assert steps["random"] == QUICK.steps
    assert steps["DsDm"] is not None
    assert steps["DsDm"] < steps["random"]
    assert runs["DsDm"][0]["domain_auroc"] > 0.6, "DsDm's scores do not tell the domain"


@pytest.mark.slow
def test_a_seed_repeats() -> None:
    small = dataclasses.replace(QUICK, pool=400, target=32, validation=16, test=16, steps=10, warm_up=10)
    first, second = (prepare(small, 1, ("classifier", "DsDm")).scored for _ in range(2))
    for name in first:
        np.testing.assert_allclose(first[name].scores, second[name].scores, rtol=1e-4, atol=1e-6)
