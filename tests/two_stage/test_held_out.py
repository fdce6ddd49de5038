"""What a training is judged on, nobody has trained on or fitted a score to."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from assay.corpus.errors import CorpusError
from assay.corpus.storage import Store
from assay.curate import read_whole
from assay.recipe import load_recipe
from assay.recipe.errors import EngineError
from assay.recipe.recipe import BatchSpec
from assay.recipe.tasks import Encoded
from assay.tasks.base import Outputs
from assay.two_stage import Comparison, Trainee, Training, laboratory, prove
from assay.two_stage.proof import _parts
from assay.two_stage.training import Learner, evaluate, with_a_loss
from tests.small_project import make_rows


def test_held_out_samples_are_nobodys(root, tmp_path, caplog):
    """Neither in files of other names nor as a score's target."""
    recipe = load_recipe(root / "recipe.yaml", [f"output={tmp_path / 'scores'}"])
    copied = tmp_path / "copied"
    copied.mkdir()
    (copied / "b.jsonl").write_bytes((root / "data/deep/b.jsonl").read_bytes())

    def judged() -> int:
        trainee, out = Trainee("large", str(copied)), Store.at(str(tmp_path / "o"))
        with laboratory.laboratory(recipe, trainee, out, Training()) as lab:
            return len(lab.held_out)

    with pytest.raises(EngineError, match="held-out: all of its 60 samples are in the corpus too"):
        judged()
    (copied / "c.jsonl").write_bytes((root / "held-out/test.jsonl").read_bytes())
    assert judged() == 50
    assert "60 of 110 samples are in the corpus too" in caplog.text
    towards, trainee = _towards(root, tmp_path / "towards", root / "held-out"), Trainee("large", str(root / "held-out"))
    with pytest.raises(EngineError, match=r"test\.jsonl is part of targets\.mine; expected samples that no score is"):
        prove(towards, trainee, Comparison(["gradient_cosine"]), str(tmp_path / "o"))


def test_copies_of_what_a_score_is_fitted_to_are_not_judged_on(root, tmp_path, caplog):
    """What was judged on, another call's trainings are not taken for."""
    target, copied = tmp_path / "target", tmp_path / "copied"
    target.mkdir()
    copied.mkdir()
    lines = (root / "held-out/test.jsonl").read_text().splitlines(keepends=True)
    (target / "t.jsonl").write_text("".join(lines))

    def judged(scores: str = "scores") -> tuple[int, str]:
        recipe = _towards(root, tmp_path / scores, target)
        trainee, out = Trainee("large", str(copied)), Store.at(str(tmp_path / "o"))
        with laboratory.laboratory(recipe, trainee, out, Training()) as lab:
            return len(lab.held_out), lab.known.key(np.arange(3), 0, Training())

    (copied / "a.jsonl").write_text("".join(lines[20:]))
    with pytest.raises(EngineError, match=r"all of its 30 samples are in targets\.mine too"):
        judged()
    own = [json.dumps(row) + "\n" for row in make_rows(9, 77)]
    (copied / "b.jsonl").write_text("".join(own))
    found, key = judged()
    assert found == 9
    assert "held-out: 30 of 39 samples are in targets.mine too; nothing is judged on them" in caplog.text
    (target / "t.jsonl").write_text("".join([*lines, own[0]]))
    found, other = judged("others")
    assert found == 8
    assert other != key


def _towards(root, output, target):
    own = yaml.safe_load((root / "recipe.yaml").read_text())
    own |= {"targets": {"mine": {"path": str(target)}}, "output": str(output)}
    own["methods"] = [{"method": "gradient_cosine", "model": "small", "targets": ["mine"]}]
    (root / "towards.yaml").write_text(yaml.safe_dump(own))
    return load_recipe(root / "towards.yaml")


def test_copies_of_a_row_are_in_one_part_whatever_their_files(root, tmp_path):
    shutil.copytree(root / "data", tmp_path / "data")
    shutil.copy(root / "data/deep/b.jsonl", tmp_path / "data/c.jsonl")
    recipe = load_recipe(root / "recipe.yaml", [f"output={tmp_path / 'scores'}", f"corpus.path={tmp_path / 'data'}"])
    trainee, out = Trainee("large", str(root / "held-out")), Store.at(str(tmp_path / "o"))
    with laboratory.laboratory(recipe, trainee, out, Training()) as lab:
        table = lab.trainable(read_whole(recipe.output).table)
        contents = lab.contents(table)
    assert len(set(contents.tolist())) == 120
    parts = [set(contents[part["row"].to_numpy()].tolist()) for part in _parts(table, contents, 6)]
    assert sum(map(len, parts)) == 120
    assert {len(part) for part in parts} == {20}


@pytest.mark.parametrize(("step", "advice"), [(0, "of the untrained model"), (7, "take a smaller learning rate")])
def test_a_loss_without_end_says_what_to_do(step, advice):
    found = Outputs(torch.tensor([torch.inf]), None, None)
    task = SimpleNamespace(to=lambda batch, device: batch, forward=lambda *_: found)
    encoder = SimpleNamespace(collate=lambda samples: samples)
    learner = Learner(torch.nn.Linear(1, 1), task, encoder, BatchSpec())
    with pytest.raises(EngineError, match=f"the loss after step {step} is inf; .*{advice}"):
        evaluate(learner, learner.model, [Encoded(None, 1, 0)], step)


def test_samples_without_a_loss_are_left_out_aloud(caplog):
    task = SimpleNamespace(
        to=lambda batch, device: batch, forward=lambda model, batch: Outputs(torch.tensor(batch), None, None)
    )
    encoder = SimpleNamespace(collate=list)
    learner = Learner(torch.nn.Linear(1, 1), task, encoder, BatchSpec())
    samples = {row: Encoded(loss, 1, 0) for row, loss in {3: 0.5, 4: torch.nan, 7: torch.inf, 9: 2.0}.items()}
    assert list(with_a_loss(learner, samples, "corpus")) == [3, 9]
    assert "corpus: 2 of its 4 samples have no finite loss" in caplog.text
    assert list(with_a_loss(learner, {3: samples[3]}, "held-out")) == [3]
    assert "held-out" not in caplog.text


def test_what_is_found_is_not_written_among_targets(project):
    project.write_shard("../target/a.jsonl", make_rows(9, 9))
    project.write_shard("../held/h.jsonl", make_rows(9, 8))
    sketch = {"kind": "kronecker", "rows": 2, "cols": 2}
    methods = [{"method": "trak", "models": ["a"], "sketch": sketch}]
    project.write_recipe(methods=methods, targets={"t": {"path": "target"}})
    recipe = load_recipe(str(project.path))
    for out in ("target", "target/in", "held"):
        opened = laboratory.laboratory(
            recipe, Trainee("a", str(project.root / "held")), Store.at(str(project.root / out)), Training()
        )
        with pytest.raises(CorpusError, match="must not lie in each other"), opened:
            pass
    assert not project.scores.exists()
