"""A score that finds wrong labels is proved, one that knows nothing is refused, and `select --proved` asks."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest

from assay.cli import main
from assay.corpus.errors import CorpusError
from assay.curate import check_proof
from assay.recipe import load_recipe
from assay.recipe.errors import EngineError
from assay.two_stage import Comparison, Trainee, Training, laboratory, prove

BRIEF = Training(steps=40, batch_size=8, learning_rate=0.05, evaluations=1)
GOOD, NOTHING = "ensemble_nll", "ensemble_vote_entropy"
ENDS = {NOTHING: "low"}
COMPARISON = Comparison([GOOD, NOTHING], pools=6, keep=ENDS)


@pytest.fixture(scope="module")
def proved(root, tmp_path_factory):
    """Of one model the votes never differ: their entropy is 0 everywhere, and the first rows are chosen."""
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


def test_halves_are_chosen_from_by_the_best_of_each(proved, root):
    folder, _, _, proof, _ = proved
    lines = [json.loads(line) for line in (folder / "proof/trials.jsonl").read_text().splitlines()]
    assert [(line["data"], line["seed"]) for line in lines] == [
        (name, pool) for name in ("random", GOOD, NOTHING) for pool in range(6)
    ]
    assert {line["rows"] for line in lines} == {30}
    assert proof.basis["samples"] == 30


def test_what_is_trained_is_not_trained_again(proved, monkeypatch):
    folder, recipe, trainee, proof, _ = proved
    monkeypatch.setattr(laboratory, "train", lambda *_: pytest.fail("it trains"))
    costs = []
    again = prove(recipe, trainee, COMPARISON, str(folder / "proof"), BRIEF, on_cost=costs.append)
    assert again == proof
    assert (costs[0].done, costs[0].seconds) == (18, 0.0)


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
    for by, message in ((None, "choose it with --by"), ("ensemble_margin", f"tells of {GOOD}, {NOTHING}, not of ")):
        with pytest.raises(CorpusError, match=message):
            check_proof(proof, scores, by)
    with pytest.raises(CorpusError, match=r"no proof\.json"):
        check_proof(scores, scores, GOOD)
    with pytest.raises(CorpusError, match=f"tells of {NOTHING}'s low end, not of its high one"):
        check_proof(proof, scores, NOTHING, keep="high")
    other = load_recipe(root / "recipe.yaml", [f"output={tmp_path / 'other'}", "seed=5"])
    from assay.engine import run

    run(other)
    with pytest.raises(CorpusError, match="is about other scores"):
        check_proof(proof, str(tmp_path / "other"), GOOD)
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


def test_a_score_that_has_too_few_numbers_is_refused(proved, root, monkeypatch):
    """A choice of fewer rows than the others' would be compared with them."""
    folder, recipe, trainee, _, _ = proved
    path = folder / "scores/a.parquet"
    table = pq.read_table(path)
    kept = path.read_bytes()
    values = table[GOOD].to_numpy().copy()
    values[:] = float("nan")
    try:
        pq.write_table(table.set_column(table.schema.get_field_index(GOOD), table.field(GOOD), [values]), path)
        with pytest.raises(EngineError, match=f"{NOTHING}: chooses 30 rows where another score has only"):
            prove(recipe, trainee, Comparison([GOOD, NOTHING], top=30, pools=6, keep=ENDS), str(folder / "nan"), BRIEF)
    finally:
        path.write_bytes(kept)
