"""A score that finds wrong labels is proved, one that knows nothing is refused, and `select --proved` asks."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from assay import select
from assay.cli import main
from assay.cli.experiments import _ends
from assay.corpus.errors import CorpusError
from assay.curate import check_proof, read_whole
from assay.recipe import load_recipe
from assay.recipe.errors import EngineError
from assay.two_stage import Comparison, Question, Trainee, Training, laboratory, prove, two_stage
from assay.two_stage.intervals import paired_interval
from assay.two_stage.proof import _choices, _parts
from tests.two_stage.noisy_labels import make_noisy_labels

BRIEF = Training(steps=40, batch_size=8, learning_rate=0.05, evaluations=1)
METHOD = {"method": "ensemble", "models": ["small"]}
GOOD, NOTHING = "ensemble_nll", "ensemble_vote_entropy"
ENDS = {NOTHING: "low"}
COMPARISON = Comparison([GOOD, NOTHING], pools=6, keep=ENDS)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("two-stage")
    make_noisy_labels(root, 240)
    return root


@pytest.fixture(scope="module")
def proved(root, tmp_path_factory):
    """Of one model the votes never differ: their entropy is 0 everywhere."""
    folder = tmp_path_factory.mktemp("proved")
    recipe = load_recipe(root / "recipe.yaml", [f"output={folder / 'scores'}"])
    costs = []
    comparison = COMPARISON
    trainee = Trainee("large", str(root / "held-out"))
    proof = prove(recipe, trainee, comparison, str(folder / "proof"), BRIEF, on_cost=costs.append)
    return folder, recipe, trainee, proof, costs


def test_a_score_is_proved_that_leaves_wrong_labels_out(proved):
    _, _, _, proof, (cost,) = proved
    good, nothing = proof.claims[GOOD], proof.claims[NOTHING]
    assert good.proved
    assert good.gains["random"].low > 0.05
    assert not nothing.proved
    assert good.beaten == ["random"]
    assert (cost.trainings, cost.done) == (18, 0)
    assert cost.seconds > 0
    assert {len(losses) for losses in proof.losses.values()} == {6}


def test_parts_are_chosen_from_by_the_best_of_each(proved, root):
    folder, _, _, proof, _ = proved
    lines = [json.loads(line) for line in (folder / "proof/trials.jsonl").read_text().splitlines()]
    assert [(line["data"], line["seed"]) for line in lines] == [
        (name, pool) for name in ("random", GOOD, NOTHING) for pool in range(6)
    ]
    assert {line["rows"] for line in lines} == {40}
    assert proof.basis["samples"] == 40


def parts_of(pools: int, copies: int = 1, **scores) -> list[pa.Table]:
    """Of a corpus in which each row is there so many times."""
    rows = copies * len(next(iter(scores.values())))
    table = pa.table({"row": np.arange(rows), **{name: np.repeat(own, copies) for name, own in scores.items()}})
    return _parts(table, (np.arange(rows) // copies).astype(np.uint64), pools)


def test_each_row_is_in_one_part_and_equal_scores_are_chosen_from_at_random():
    parts = parts_of(6, same=np.zeros(600, np.float32))
    assert sorted(row for part in parts for row in part["row"].to_pylist()) == list(range(600))
    for pool, part in enumerate(parts):
        found = _choices(part, {"same": "high"}, Comparison(["same"], pools=6), pool)
        assert {len(rows) for rows in found.values()} == {50}
        assert set(found["same"]) != set(found["random"])
        for rows in found.values():
            assert (np.diff(rows) > 0).all()
            assert 15 < (rows < 300).sum() < 35  # the first 50 of a part's 100 rows would be nearly all of these
    with pytest.raises(EngineError, match="pools: 5 different rows are too few for 6 parts"):
        parts_of(6, copies=9, same=np.zeros(5, np.float32))


@pytest.mark.parametrize("copies", [1, 10])
def test_a_score_that_knows_nothing_is_proved_as_seldom_as_the_interval_says(copies):
    """2.1 % of 12 parts'. From parts that share rows it would be more than 10 %: a score's best rows are the same in
    each, and so is their luck. Copies of a row are no others."""
    rng = np.random.default_rng(1)
    comparison, proved = Comparison(["noise"], pools=12), 0
    for _ in range(300):
        worth = rng.normal(size=360)
        gains = []
        for pool, part in enumerate(parts_of(12, copies, noise=rng.normal(size=360).astype(np.float32))):
            found = _choices(part, {"noise": "high"}, comparison, pool)
            gains.append(worth[found["noise"] // copies].mean() - worth[found["random"] // copies].mean())
        proved += paired_interval(gains).low > 0
    assert proved < 0.05 * 300


def test_what_is_trained_is_not_trained_again(proved, monkeypatch):
    folder, recipe, trainee, proof, _ = proved
    monkeypatch.setattr(laboratory, "train", lambda *_: pytest.fail("it trains"))
    costs = []
    again = prove(recipe, trainee, COMPARISON, str(folder / "proof"), BRIEF, on_cost=costs.append)
    assert again == proof
    assert (costs[0].done, costs[0].seconds) == (18, 0.0)


def test_everybody_trains_on_as_many_samples_where_the_model_cannot_read_some_rows(proved, tmp_path, monkeypatch):
    """The best rows by the score, of which it would have been left with half."""
    _, recipe, trainee, _, _ = proved
    best = select.top(read_whole(recipe.output, [GOOD]).table, GOOD, 120).indices
    whole = laboratory._samples
    monkeypatch.setattr(
        laboratory, "_samples", lambda *of: {row: own for row, own in whole(*of).items() if row not in set(best)}
    )
    brief = Training(steps=2, evaluations=1)
    prove(recipe, trainee, Comparison([GOOD], pools=6), str(tmp_path / "proof"), brief)
    two_stage(recipe, Question("large", trainee.held_out, GOOD, 0.5), str(tmp_path / "report"), replace(brief, seeds=1))
    for name, rows in (("proof", [30] * 12), ("report", [180, 180, 360])):
        lines = (tmp_path / name / "trials.jsonl").read_text().splitlines()
        assert [json.loads(line)["rows"] for line in lines] == rows


def test_controls_are_compared_with(proved, root):
    folder, recipe, trainee, proof, _ = proved
    comparison = Comparison([GOOD], against=[NOTHING], pools=6, keep=ENDS)
    found = prove(recipe, trainee, comparison, str(folder / "proof-beside"), BRIEF)
    assert list(found.claims[GOOD].gains) == ["random", NOTHING]
    assert found.losses[GOOD] == proof.losses[GOOD]
    assert found.claims[GOOD].gains["random"] == proof.claims[GOOD].gains["random"]


def test_select_takes_what_is_proved_and_refuses_what_is_not(proved, tmp_path, capsys):
    folder = proved[0]
    scores, proof = str(folder / "scores"), str(folder / "proof")
    command = ["select", scores, "--top", "9", "--proved", proof, "--out"]
    assert main([*command, str(tmp_path / "a"), "--by", GOOD]) == 0
    assert (
        main(
            [
                "select",
                scores,
                "--by",
                NOTHING,
                "--keep",
                "low",
                "--top",
                "9",
                "--proved",
                proof,
                "--out",
                str(tmp_path / "b"),
            ]
        )
        == 2
    )
    assert not (tmp_path / "b").exists()
    said = capsys.readouterr().err
    assert f"{NOTHING} is not better than random rows (held-out loss lower by " in said


def test_a_proof_is_of_its_own_scores_alone(proved, root, tmp_path):
    folder = proved[0]
    scores, proof = str(folder / "scores"), str(folder / "proof")
    for by, message in (
        (None, "choose by it, with --by and a rule"),
        ("ensemble_margin", f"tells of {GOOD}, {NOTHING}, not of "),
    ):
        with pytest.raises(CorpusError, match=message):
            check_proof(proof, scores, by)
    with pytest.raises(CorpusError, match=r"no proof\.json"):
        check_proof(scores, scores, GOOD)
    with pytest.raises(CorpusError, match=f"tells of {NOTHING}'s low end, not of its high one"):
        check_proof(proof, scores, NOTHING, keep="high")
    with pytest.raises(CorpusError, match=f"{NOTHING}'s low end, and the score names none; add --keep low"):
        check_proof(proof, scores, NOTHING)
    other = load_recipe(root / "recipe.yaml", [f"output={tmp_path / 'other'}", "seed=5"])
    from assay.engine import run

    run(other)
    with pytest.raises(CorpusError, match="is about other scores"):
        check_proof(proof, str(tmp_path / "other"), GOOD)
    with (
        changed(folder / "scores/a.parquet", GOOD, lambda values: -values),
        pytest.raises(CorpusError, match="is about other scores"),
    ):
        check_proof(proof, scores, GOOD)
    check_proof(proof, scores, GOOD)
    (tmp_path / "proof.json").write_text("{}")
    with pytest.raises(CorpusError, match="is not what `assay prove` writes"):
        check_proof(str(tmp_path), scores, GOOD)


def test_the_command_says_cost_gains_and_verdict(proved, root, capsys, tmp_path):
    folder = proved[0]
    command = ["prove", str(root / "recipe.yaml"), "--train", "large", "--held-out", str(root / "held-out"), "--quiet"]
    command += ["--set", f"output={folder / 'scores'}", "--pools", "6", "--steps", "40", "--batch-size", "8"]
    command += ["--learning-rate", "0.05", "--out", str(folder / "proof")]
    assert main([*command, "--by", GOOD]) == 0
    said = capsys.readouterr().out
    assert "12 trainings, 12 of them done before" in said
    assert f"{GOOD}: proved: better than random" in said
    assert main([*command, "--by", f"{NOTHING}=low"]) == 1
    assert f"{NOTHING}: not proved: better than none of its controls" in capsys.readouterr().out
    assert main([*command, "--by", GOOD, "--pools", "5"]) == 2
    assert "expected at least 6" in capsys.readouterr().err


def test_a_rule_that_looks_at_no_score_is_not_of_the_proof(proved, tmp_path, capsys):
    folder = proved[0]
    command = ["select", str(folder / "scores"), "--by", GOOD, "--proved", str(folder / "proof")]
    for rule in (["--random", "9"], ["--where", "ensemble_margin < 0"]):
        assert main([*command, *rule, "--out", str(tmp_path / "out")]) == 2
        assert "choose by it, with --by and a rule such as --top" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_rule_that_takes_both_ends_is_not_of_the_proof(proved, tmp_path, capsys):
    (tmp_path / "mix.yaml").write_text("{bands: [0, 50, 100], rates: [1, 0]}")  # the worst half
    command = ["select", str(proved[0] / "scores"), "--by", GOOD, "--proved", str(proved[0] / "proof")]
    for rule in (["--mix", str(tmp_path / "mix.yaml")], ["--ccs", "9", "--hard", "high"]):
        assert main([*command, *rule, "--out", str(tmp_path / "out")]) == 2
        assert f"is about one end of {GOOD}, and {rule[0]} takes rows of both" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_both_ends_of_a_score_are_not_one(root, tmp_path, capsys):
    command = ["prove", str(root / "recipe.yaml"), "--train", "large", "--held-out", str(root / "held-out"), "--quiet"]
    assert main([*command, "--out", str(tmp_path), "--by", f"{GOOD}=high", "--against", f"{GOOD}=low"]) == 2
    assert f"{GOOD}: both ends of it are named" in capsys.readouterr().err
    assert _ends([f"{GOOD}=low", GOOD]) == {GOOD: "low"}


def test_what_says_nothing_is_refused_before_anything_is_trained(proved, tmp_path, monkeypatch):
    """A choice of fewer rows than the others' would be compared with them; one of all rows chooses nothing."""
    folder, recipe, trainee, _, _ = proved
    monkeypatch.setattr(laboratory, "train", lambda *_: pytest.fail("it trains"))

    def refused(match: str, by: list[str], **details):
        with pytest.raises(EngineError, match=match):
            prove(recipe, trainee, Comparison(by, pools=6, **details), str(tmp_path / "out"), BRIEF)

    refused("top: 1000 takes all of 80 rows, one of 6 parts of the corpus", [GOOD], top=1000)
    refused(f"{GOOD}: chooses none of 80 rows", [GOOD], top=0.0)
    refused(f"{NOTHING}: does not say which end of it is better; expected {NOTHING}=high or", [NOTHING])
    with changed(folder / "scores/a.parquet", GOOD, lambda values: values * np.float32("nan")):
        refused(rf"{GOOD}: chooses \d+ of 80 rows.* where 60 are asked for", [GOOD, NOTHING], top=60, keep=ENDS)
        refused(rf"{GOOD}: chooses \d+ of 80 rows.* where 60 are asked for", [GOOD], top=60)
    with pytest.raises(ValueError, match="random: names the random rows"):
        Comparison([GOOD], against=["random"])


def test_a_score_of_a_shortlist_is_proved_as_far_as_the_shortlist_goes(root, tmp_path):
    """The best by it are the best by what it is made by, where both are the same score."""
    methods = [METHOD, {**METHOD, "name": "again", "shortlist": {"by": GOOD, "top": 0.4}}]
    recipe = load_recipe(root / "recipe.yaml", [f"output={tmp_path / 'scores'}", f"methods={json.dumps(methods)}"])
    trainee, out = Trainee("large", str(root / "held-out")), str(tmp_path / "proof")
    brief, by = Training(steps=3, evaluations=1), [GOOD, "again_nll"]
    proof = prove(recipe, trainee, Comparison(by, pools=6, top=0.2), out, brief)
    assert proof.losses["again_nll"] == proof.losses[GOOD] != proof.losses["random"]
    with pytest.raises(
        EngineError, match=r"again_nll: chooses \d+ of 80 rows.* where 40 are asked for: .* smaller top"
    ):
        prove(recipe, trainee, Comparison(["again_nll"], pools=6), out, brief)


@contextmanager
def changed(path, name: str, change):
    """One score of a table, by hand."""
    kept, table = path.read_bytes(), pq.read_table(path)
    place = table.schema.get_field_index(name)
    try:
        pq.write_table(table.set_column(place, table.field(name), [change(table[name].to_numpy())]), path)
        yield
    finally:
        path.write_bytes(kept)
