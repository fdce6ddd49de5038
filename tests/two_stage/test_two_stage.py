"""Two stages in one call: a selection that leaves wrong labels out trains a better model than random rows do."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from assay.cli import main
from assay.corpus.errors import CorpusError
from assay.recipe import load_recipe
from assay.recipe.errors import EngineError
from assay.two_stage import Question, Training, laboratory, two_stage
from assay.two_stage.training import _batches
from tests.small_project import CLASSES, SIZE

BRIEF = Training(steps=40, batch_size=8, learning_rate=0.05, seeds=2, evaluations=2)


def question(root: Path, **changes) -> Question:
    own = {"model": "large", "held_out": str(root / "held-out"), "by": "ensemble_nll", "top": 0.5}
    return Question(**(own | changes))


def test_a_good_selection_is_better_than_random(root, recipe, tmp_path) -> None:
    report = two_stage(recipe, question(root), str(tmp_path / "out"), BRIEF)
    selection, chance, everything = (report.of(data) for data in ("selection", "random", "everything"))
    assert [trial.rows for trial in (*selection, *chance, *everything)] == [60, 60, 60, 60, 120, 120]
    assert min(report.gains) > 0.1
    assert "lower (lower with 2 of 2 seeds), and the accuracy is " in report.verdict()
    assert report.verdict().endswith("higher (higher with 2 of 2 seeds)")
    assert min(t.last.accuracy for t in selection) > max(t.last.accuracy for t in chance)
    assert [e.step for e in selection[0].evaluations] == [20, 40]
    written = json.loads((tmp_path / "out/report.json").read_text())
    assert written["gains_over_random"] == report.gains
    assert "| selection | 60 | " in (tmp_path / "out/report.md").read_text()


@pytest.mark.parametrize("name", ["report.md", "report.json", "trials.jsonl"])
def test_somebodys_files_are_not_written_over(root, recipe, tmp_path, name) -> None:
    (tmp_path / name).write_text("mine\n")
    with pytest.raises(CorpusError, match=rf"{name}: is there, and no experiment has written it; choose another"):
        two_stage(recipe, question(root), str(tmp_path), BRIEF)
    assert (tmp_path / name).read_text() == "mine\n"
    assert not (tmp_path / "scores").exists()


def test_a_training_is_that_of_plain_pytorch(root, recipe, tmp_path) -> None:
    training = Training(steps=20, batch_size=200, learning_rate=0.02, seeds=1, evaluations=1)  # all of them each time
    report = two_stage(recipe, question(root), str(tmp_path / "out"), training)
    model = nn.Sequential(nn.Linear(SIZE, 8), nn.ReLU(), nn.Linear(8, CLASSES))
    model.load_state_dict(load_file(root / "models/large.safetensors"))

    def data(*names: str) -> tuple[torch.Tensor, torch.Tensor]:
        from assay.corpus.readers import read
        from assay.corpus.shards import find_shards

        rows = []
        for name in names:
            for shard in find_shards(str(root / name)).shards:
                for chunk in read(shard, ["pixels", "label"]):
                    rows += zip(chunk.columns["pixels"], chunk.columns["label"], strict=True)
        return torch.tensor(np.array([x for x, _ in rows]), dtype=torch.float32), torch.tensor([y for _, y in rows])

    (x, y), (held_x, held_y) = data("data"), data("held-out")
    untrained = F.cross_entropy(model(held_x), held_y)
    assert report.untrained.loss == pytest.approx(float(untrained.detach()), rel=1e-5)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    for step in range(20):
        optimizer.param_groups[0]["lr"] = 0.02 * ((step + 1) / 3 if step < 2 else (20 - step) / 19)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    (trial,) = report.of("everything")
    with torch.no_grad():
        assert trial.last.loss == pytest.approx(float(F.cross_entropy(model(held_x), held_y)), rel=1e-3)
        assert trial.last.accuracy == pytest.approx(float((model(held_x).argmax(1) == held_y).float().mean()))


def test_what_is_done_is_not_done_again(root, recipe, tmp_path, monkeypatch) -> None:
    out, trained = tmp_path / "out", []
    whole = laboratory.train

    def dies_in_the_third(*args):
        trained.append(args)
        if len(trained) == 3:
            raise KeyboardInterrupt
        return whole(*args)

    monkeypatch.setattr(laboratory, "train", dies_in_the_third)
    brief = Training(steps=4, batch_size=8, learning_rate=0.05, seeds=2, evaluations=1)
    with pytest.raises(KeyboardInterrupt):
        two_stage(recipe, question(root), str(out), brief)
    with (out / "trials.jsonl").open("a") as file:
        file.write('{"key": "cut o')  # a line that a kill cut off
    report = two_stage(recipe, question(root), str(out), brief)
    assert len(trained) == 3 + 4
    again = two_stage(recipe, question(root), str(out), brief)
    assert len(trained) == 7
    assert again == report
    fresh = two_stage(recipe, question(root), str(tmp_path / "other"), brief)
    assert fresh == report
    two_stage(recipe, question(root, top=20), str(out), brief)  # everything is what it was
    assert len(trained) == 13 + 4


def test_a_model_of_other_arguments_is_trained_again(root, tmp_path, monkeypatch) -> None:
    """Its weights and its source are the same."""
    (tmp_path / "twostagemodels.py").write_text(
        "from torch.nn import Dropout, Linear, ReLU, Sequential\n"
        f"def make(p): return Sequential(Linear({SIZE}, 8), Sequential(ReLU(), Dropout(p)), Linear(8, {CLASSES}))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    model = {"kind": "python", "factory": "twostagemodels:make", "path": str(root / "models/large.safetensors")}
    brief, found = Training(steps=9, batch_size=8, learning_rate=0.05, seeds=1, evaluations=1), []
    for p in (0.0, 0.9, 0.0):
        keys = [f"models.large={json.dumps(model | {'arguments': {'p': p}})}", f"output={tmp_path / 'scores'}"]
        recipe = load_recipe(root / "recipe.yaml", keys, trust=("twostagemodels",))
        found.append(two_stage(recipe, question(root), str(tmp_path / "out"), brief).trials)
    assert found[0] == found[2]
    assert all(a.last.loss != b.last.loss for a, b in zip(*found[:2], strict=True))


def test_each_sample_comes_once_before_any_comes_again() -> None:
    from assay.recipe.tasks import Encoded

    samples = [Encoded(None, 1, 0, (i % 2,)) for i in range(10)]
    batches = _batches(samples, 2, seed=0)
    for _ in range(2):
        epoch = [next(batches) for _ in range(6)]
        assert sorted(i for batch in epoch for i in batch) == list(range(10))
        assert all(len({samples[i].shape for i in batch}) == 1 for batch in epoch)


def test_mistakes_are_one_line_before_anything_is_trained(root, recipe, tmp_path) -> None:
    out = str(tmp_path / "out")
    with pytest.raises(EngineError, match="train: no model is called 'larg'; the recipe has large, small"):
        two_stage(recipe, question(root, model="larg"), out, BRIEF)
    with pytest.raises(EngineError, match=r"held-out: .*a\.parquet is part of the corpus"):
        two_stage(recipe, question(root, held_out=str(root / "data/*.parquet")), out, BRIEF)
    with pytest.raises(CorpusError, match="must not lie in each other"):
        two_stage(recipe, question(root), str(root / "data/out"), BRIEF)
    for among in (recipe.output, f"{recipe.output}/out"):
        with pytest.raises(CorpusError, match="lies among the scores"):
            two_stage(recipe, question(root), among, BRIEF)
    with pytest.raises(CorpusError, match="has no score 'nll'"):
        two_stage(recipe, question(root, by="nll"), out, BRIEF)
    with pytest.raises(EngineError, match=r"the loss of step .* is nan; take a smaller learning rate"):
        two_stage(recipe, question(root), out, Training(steps=40, learning_rate=1e30, seeds=1))
    with pytest.raises(ValueError, match="steps: expected at least 1, found 0"):
        Training(steps=0)


def test_the_command(root, tmp_path, capsys) -> None:
    arguments = ["two-stage", str(root / "recipe.yaml"), "--train", "large", "--held-out", str(root / "held-out")]
    arguments += ["--by", "ensemble_nll", "--top", "0.5", "--out", str(tmp_path / "out"), "--quiet"]
    arguments += ["--steps", "5", "--seeds", "1", "--set", f"output={tmp_path / 'scores'}"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "| random | 60 |" in shown
    assert "In short: beside random rows, after the selection the held-out loss is" in shown
    assert main([*arguments, "--top", "many"]) == 2
    assert "'many' is no amount" in capsys.readouterr().err
