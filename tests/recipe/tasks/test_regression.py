"""Numbers as targets, of numbers and of texts."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from safetensors.torch import save_file
from torch import nn

from assay.engine.local import run
from assay.recipe.errors import EngineError
from assay.recipe.models import MlpSpec
from assay.recipe.recipe import load_recipe
from assay.recipe.tasks.labelled import LabelledEncoder
from assay.recipe.tasks.numbers import NumberInputs
from assay.recipe.tasks.regression import RegressionSpec
from tests.recipe.tasks.word_models import TEXTS, quarantine, recipe, save, scores, write

TASK = {"kind": "regression"}


def _mlp(path: Path, outputs: int, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, outputs))
    save_file(model.state_dict(), path)
    return model


@pytest.mark.parametrize("outputs", [1, 2])
def test_an_ensemble_of_regressors_gives_mean_variance_and_residual(tmp_path: Path, outputs: int) -> None:
    models = [_mlp(tmp_path / f"{seed}.safetensors", outputs, seed) for seed in (0, 1)]
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(5, 3)), rng.normal(size=(5, outputs))
    targets: list[Any] = [own.tolist() if outputs > 1 or i % 2 else float(own[0]) for i, own in enumerate(y)]
    write(tmp_path, [{"input": a.tolist(), "target": b} for a, b in zip(x, targets, strict=True)])
    specs = {name: {"kind": "mlp", "path": f"{i}.safetensors"} for i, name in enumerate("ab")}
    methods = [
        {"method": "ensemble", "models": ["a", "b"], "weights": [3.0, 1.0]},
        {"method": "grad_mimic", "model": "a", "reference": "b"},
    ]
    assert run(recipe(tmp_path, TASK, specs, methods=methods)).clean
    with torch.no_grad():
        f = np.stack([model(torch.tensor(x, dtype=torch.float32)).numpy() for model in models])
    mean = np.average(f, axis=0, weights=[3, 1])
    expected = {
        "ensemble_mean": mean.mean(1),
        "ensemble_variance": np.average((f - mean) ** 2, axis=0, weights=[3, 1]).mean(1),
        "ensemble_residual": ((mean - y) ** 2).mean(1),
        "loss": ((f[0] - y) ** 2).mean(1),
    }
    for name, values in expected.items():
        np.testing.assert_allclose(scores(tmp_path, name), values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_texts_have_the_losses_of_transformers(tmp_path: Path, name: str) -> None:
    model, tokenizer = save(tmp_path / "m", name, num_labels=1)
    save(tmp_path / "r", name, seed=1, num_labels=1)
    write(tmp_path, [{"text": text, "target": i / 2} for i, text in enumerate(TEXTS)])
    methods = [{"method": "grad_mimic", "model": "m", "reference": "r"}]
    run(recipe(tmp_path, TASK | {"text_column": "text"}, {"m": "m", "r": "r"}, methods=methods))
    for i, loss in enumerate(scores(tmp_path, "loss")):
        batch = tokenizer(TEXTS[i], return_tensors="pt")
        with torch.no_grad():
            expected = model(**batch, labels=torch.tensor([[i / 2]])).loss  # mean squared error, by the config
        assert loss == pytest.approx(float(expected), rel=1e-5, abs=1e-6)


BAD: list[tuple[Any, str]] = [
    (None, "target is null"),
    (float("nan"), "target is null or NaN"),
    (float("inf"), "target holds a NaN, an infinity or a null"),
    (1e300, "target holds a NaN, an infinity or a null"),
    (10**400, "target holds a NaN, an infinity or a null"),
    ("3", "target is of type str, expected a number"),
    (True, "target is of type bool, expected a number"),
    ([1.0, 2.0], "target holds 2 numbers, expected 1"),
    ([], "target holds 0 numbers, expected 1"),
    ([None], "target holds something that is not a number"),
    ({"a": 1}, "target is of type dict, expected a number"),
]


def test_rows_that_are_no_samples_say_why(tmp_path: Path) -> None:
    _mlp(tmp_path / "m.safetensors", 1)
    targets = [0, 1.5, [2.0], *(value for value, _ in BAD)]
    write(tmp_path, [{"input": [1, 2, 3], "target": value} for value in targets])
    report = run(recipe(tmp_path, TASK, {"m": {"kind": "mlp", "path": "m.safetensors"}}))
    assert (report.rows_scored, report.rows_quarantined) == (3, len(BAD))
    assert quarantine(tmp_path) == {i: reason for i, (_, reason) in enumerate(BAD, 3)}


def test_decimals_are_numbers(tmp_path: Path) -> None:
    model = _mlp(tmp_path / "m.safetensors", 1)
    table = pa.table({"input": [[1.0, 2.0, 3.0]], "target": pa.array([Decimal("1.25")])})
    write(tmp_path, table, "a.parquet")
    run(recipe(tmp_path, TASK, {"m": {"kind": "mlp", "path": "m.safetensors"}}))
    expected = (float(model(torch.tensor([1.0, 2.0, 3.0]))) - 1.25) ** 2
    assert scores(tmp_path, "ensemble_residual") == pytest.approx([expected], rel=1e-5)


def test_columns_without_quantities_are_refused_before_a_model_loads(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    write(tmp_path, [{"text": "gold", "target": "high"}])
    with pytest.raises(EngineError, match=r"^column 'target' holds string; expected numbers$"):
        run(recipe(tmp_path, TASK | {"text_column": "text"}, {"m": "m"}))
    features = Features({"text": Value("string"), "target": ClassLabel(names=["low", "high"])})
    (tmp_path / "data/a.jsonl").unlink()
    Dataset.from_dict({"text": ["gold"], "target": [1]}, features=features).to_parquet(tmp_path / "data/a.parquet")
    with pytest.raises(EngineError, match=r"holds classes \(low, high\), not quantities; kind: classification"):
        run(recipe(tmp_path, TASK | {"text_column": "text"}, {"m": "m"}))


def test_a_classifier_is_no_regressor(tmp_path: Path) -> None:
    save(tmp_path / "m", "bert", num_labels=2, problem_type="single_label_classification")
    write(tmp_path, [{"text": "gold", "target": 1.0}])
    with pytest.raises(EngineError, match="problem_type is 'single_label_classification', and this task is regression"):
        run(recipe(tmp_path, TASK | {"text_column": "text"}, {"m": "m"}))


def test_models_with_different_outputs_are_refused(tmp_path: Path) -> None:
    for outputs in (1, 2):
        _mlp(tmp_path / f"{outputs}.safetensors", outputs)
    write(tmp_path, [{"input": [1, 2, 3], "target": 1.0}])
    specs = {f"m{n}": {"kind": "mlp", "path": f"{n}.safetensors"} for n in (1, 2)}
    with pytest.raises(EngineError, match=r"models\.m1 predicts \(1,\), models\.m2 \(2,\)"):
        run(recipe(tmp_path, TASK, specs))


def test_a_model_of_ones_own_may_give_one_number_without_a_dimension(tmp_path: Path) -> None:
    _mlp(tmp_path / "m.safetensors", 1)
    spec = MlpSpec(kind="mlp", path=str(tmp_path / "m.safetensors"))
    model = nn.Sequential(*spec.build(), nn.Flatten(0))
    encoder = RegressionSpec(kind="regression").encoder({"m": (spec, model)})
    assert isinstance(encoder, LabelledEncoder)
    (row,) = encoder.encode([([1.0, 2.0, 3.0], 4.0)])
    x, y = encoder.collate([row.data, row.data])  # type: ignore[union-attr]
    assert (x.shape, y.shape) == ((2, 3), (2,))
    assert isinstance(NumberInputs("input", (3,)).examples(2), list)


def test_a_recipe_comes_back_from_its_yaml(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    write(tmp_path, [{"text": "gold", "y": 1.0}])
    task = TASK | {"text_column": "text", "target_column": "y", "text_pair_column": "other", "max_length": 7}
    made = recipe(tmp_path, task, {"m": "m"})
    (tmp_path / "again.yaml").write_text(made.to_yaml())
    assert load_recipe(str(tmp_path / "again.yaml")) == made
