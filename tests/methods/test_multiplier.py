"""Does DsDm's selection save training steps? The small version of ``python -m benchmarks.quality.multiplier``."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
from benchmarks.quality.multiplier import corpus, selections
from benchmarks.quality.multiplier.bank import Bank
from benchmarks.quality.multiplier.experiment import QUICK, prepare, retrain, steps_to, summary
from benchmarks.quality.multiplier.packages import PACKAGES, STUB
from benchmarks.quality.multiplier.reselection import Reselection, descended


@pytest.mark.slow
def test_the_sets_have_nothing_in_common() -> None:
    data = corpus.build(pool=600, target=40, validation=20, test=40, seed=3)
    sets = [{bytes(row.tolist()) for row in part} for part in (data.pool, data.target, data.validation, data.test)]
    assert [len(s) for s in sets] == [600, 40, 20, 40], "a piece occurs twice"
    assert len(set.union(*sets)) == 700
    assert 0.05 <= float(np.mean(data.of_domain)) <= 0.1
    again = corpus.build(pool=600, target=40, validation=20, test=40, seed=3)
    assert bool((data.pool == again.pool).all())


def test_sources_are_without_their_docstrings() -> None:
    docstrings, rest = corpus.apart('"""One."""\n\ndef f():\n    """Two\n    lines."""\n    return 1\n')
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
        return {
            "steps": [10, 20, 30, 40],
            "losses": list(losses),
            "domain_share": 0.1,
            "domain_auroc": 0.5,
            "scoring_seconds": 1,
        }

    runs = {"random": [run(4, 3, 2.5, 2)] * 3, "x": [run(3, 2, 1, 1), run(3, 3, 3, 3), run(2, 2, 1, 1)]}
    assert steps_to(runs["x"][1], 2.0) is None
    random, x = summary(runs)
    assert (random["median_steps"], random["multiplier"]) == (40, 1.0)
    assert (x["steps"], x["median_steps"], x["multiplier"], x["range"]) == ([20, None, 10], 20, 2.0, None)


def small_corpus(seed: int) -> corpus.Corpus:
    pieces = torch.randint(97, 123, (40, 8), generator=torch.Generator().manual_seed(seed))
    kinds = np.array(["docstring"] * 3 + ["other"] * 17)
    return corpus.Corpus(pieces[:20], kinds, "docstring", pieces[20:26], pieces[26:30], pieces[30:])


def test_a_selection_draws_the_same_whichever_others_are_measured() -> None:
    data = small_corpus(0)
    alone, second = (
        selections.score(data, None, 1, names)  # type: ignore[arg-type]
        for names in (["n-grams (DSIR)"], ["random", "n-grams (DSIR)"])
    )
    np.testing.assert_array_equal(alone["n-grams (DSIR)"].scores, second["n-grams (DSIR)"].scores)
    assert (second["random"].scores != second["n-grams (DSIR)"].scores).all()


def test_a_bank_adds_seeds_and_selections_of_the_same_pools_alone(tmp_path: Path) -> None:
    pools = [small_corpus(seed).digest for seed in range(2)]
    bank = Bank(tmp_path, QUICK, pools)
    bank.put(0, "random", {"losses": [1.5]})
    assert bank.whole(["random", "RHO"]) == {}, "half of the seeds"
    bank.put(1, "random", {"losses": [2.5]})
    again = Bank(tmp_path, QUICK, [small_corpus(seed).digest for seed in range(2)])
    assert again.whole(["random", "RHO"]) == {"random": [{"losses": [1.5]}, {"losses": [2.5]}]}
    others = dataclasses.replace(QUICK, steps=7), dataclasses.replace(QUICK, mixture="packages")
    for other in (*(Bank(tmp_path, sizes, pools) for sizes in others), Bank(tmp_path, QUICK, pools[::-1])):
        assert other.whole(["random"]) == {}


def test_reselection_counts_by_signs_and_orders_the_equal_by_their_derivatives() -> None:
    gradient = np.array([3.0, 2.0, 1.0, -1.0, -2.0, -3.0])
    asked: list[np.ndarray] = []

    def at(counts: np.ndarray) -> np.ndarray:
        asked.append(counts.copy())
        return gradient

    scores = descended(at, 6, np.random.default_rng(0))
    assert (asked[0] == 1).all()
    assert min(counts.min() for counts in asked) == 0  # the harmful ones left, and none owes anything
    assert (np.abs(np.diff(asked, axis=0)) <= 1).all()
    assert set(np.argsort(-scores)[:3]) == {0, 1, 2}
    counts = np.floor(scores)
    for equal in (np.flatnonzero(counts == count) for count in np.unique(counts)):
        assert (np.diff(scores[equal]) < 0).all()


class Bigrams(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(256, 256)
        nn.init.zeros_(self.rows.weight)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.rows(input_ids)


def test_a_metagradient_is_what_more_of_a_piece_takes_off_the_targets_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    pool, target = (torch.randint(97, 103, (n, 8), generator=generator) for n in (12, 6))
    pool[:6] = target  # these would be trained on what is asked
    chosen, counts = Reselection(Bigrams(), pool, target), np.linspace(0.5, 1.5, 12)
    scores = chosen.gradient(counts)

    def loss(counts: np.ndarray) -> float:
        logits = chosen.run.train(counts)["rows.weight"].double()[target[:, :-1]]
        return float(nn.functional.cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten()))

    assert scores[:6].mean() > scores[6:].mean()
    for piece in (0, 7):
        h = np.eye(12)[piece] * 0.2
        np.testing.assert_allclose(scores[piece], (loss(counts - h) - loss(counts + h)) / 0.4, rtol=0.05, atol=1e-7)


@pytest.mark.slow
def test_the_packages_are_another_pool_with_another_domain() -> None:
    data = corpus.build(600, 40, 20, 40, 3, PACKAGES)
    assert data.domain == STUB
    assert 0.05 <= float(np.mean(data.of_domain)) <= 0.1
    assert len(set(data.kinds)) >= 5
    library = corpus.build(600, 40, 20, 40, 3)
    assert not {bytes(row.tolist()) for row in data.pool} & {bytes(row.tolist()) for row in library.pool}


@pytest.mark.slow
def test_dsdm_needs_fewer_steps_than_random() -> None:
    prepared = prepare(QUICK, 0, ("random", "n-grams (DSIR)", "DsDm"))
    runs = {
        name: [{**retrain(QUICK, 0, scored.scores), "scoring_seconds": scored.seconds}]
        for name, scored in prepared.scored.items()
    }
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
