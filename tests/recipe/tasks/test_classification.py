"""Classification: of numbers, texts and pairs of texts."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from datasets import ClassLabel, Dataset, Features, Value
from safetensors.torch import save_file
from torch import nn

from assay.engine.local import run
from assay.recipe.errors import EngineError
from assay.recipe.recipe import load_recipe
from assay.recipe.tasks.text_rows import _positions
from tests.recipe.tasks.word_models import TEXTS, quarantine, recipe, save, scores, write

TASK = {"kind": "classification", "text_column": "text"}


@pytest.mark.parametrize(
    ("name", "pairs"),
    [
        *(("bert", False), ("bert", True), ("distilbert", True), ("gpt2", False), ("llama", True)),
        *(("qwen2", True), ("gemma2", False), ("t5", False), ("t5", True)),
    ],
)
def test_losses_are_those_of_transformers_alone(tmp_path: Any, name: str, pairs: bool) -> None:
    model, tokenizer = save(tmp_path / "m", name, num_labels=3)
    save(tmp_path / "ref", name, seed=1, num_labels=3)
    rows = [{"text": text, "other": TEXTS[i - 1], "label": i % 3} for i, text in enumerate(TEXTS)]
    write(tmp_path, rows)
    task = TASK | ({"text_pair_column": "other"} if pairs else {})
    methods = [{"method": "grad_mimic", "model": "m", "reference": "ref"}]
    made = recipe(tmp_path, task, {"m": "m", "ref": "ref"}, methods=methods)
    assert run(made).rows_scored == len(TEXTS)
    for i, loss in enumerate(scores(tmp_path, "loss")):
        batch = tokenizer(TEXTS[i], TEXTS[i - 1] if pairs else None, return_tensors="pt")
        with torch.no_grad():
            expected = F.cross_entropy(model(**batch).logits, torch.tensor([i % 3]))
        assert loss == pytest.approx(float(expected), rel=1e-5, abs=1e-6)


def _bert(path: Path, **changes: Any) -> tuple[Any, Any]:
    return save(path, "bert", **({"num_labels": 2} | changes))


def _rows(labels: list[Any], **more: Any) -> list[dict[str, Any]]:
    return [{"text": text, "label": label} | more for text, label in zip(TEXTS, labels, strict=False)]


def test_a_text_has_the_same_scores_alone_and_in_a_batch(tmp_path: Path) -> None:
    for name in ("bert", "gpt2"):
        save(tmp_path / name, name, num_labels=2)
    write(tmp_path, _rows([0, 1, 0, 1, 0]))
    got = {}
    for name in ("bert", "gpt2"):
        for samples in (1, 5):
            output = f"{name}{samples}"
            run(recipe(tmp_path, TASK, {"m": name}, batch={"samples": samples}, output=output))
            got[output] = pq.read_table(tmp_path / output / "a.parquet")
        for column in got["bert1"].column_names[2:]:
            together, alone = got[f"{name}5"][column].to_numpy(), got[f"{name}1"][column].to_numpy()
            np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-6)


def test_texts_are_cut_to_max_length(tmp_path: Path) -> None:
    model, tokenizer = _bert(tmp_path / "m")
    write(tmp_path, _rows([0, 0, 1]))
    run(recipe(tmp_path, TASK | {"max_length": 5}, {"m": "m"}))
    batch = tokenizer(TEXTS[2], truncation=True, max_length=5, return_tensors="pt")
    with torch.no_grad():
        expected = F.cross_entropy(model(**batch).logits, torch.tensor([1]))
    assert scores(tmp_path, "ensemble_nll")[2] == pytest.approx(float(expected), rel=1e-5)
    with pytest.raises(EngineError, match=r"task\.max_length is 65, but models\.m has 64 positions"):
        run(recipe(tmp_path, TASK | {"max_length": 65}, {"m": "m"}, output="other"))


def test_rows_that_are_no_samples_say_why(tmp_path: Path) -> None:
    _bert(tmp_path / "m", vocab_size=17)  # one word of the tokenizer's is not the model's
    values: list[tuple[Any, Any, str]] = [
        (None, 0, "text is null"),
        ("", 0, "text is empty"),
        (["gold"], 0, "text is of type list, expected a string"),
        ("\ud800", 0, "text has a lone surrogate at character 0"),
        ("not much", 0, "text has the token 'much' (number 17); models.m knows those below 17"),
        ("gold", None, "label is null"),
        ("gold", 2, "label is 2, outside the classes 0 to 1"),
        ("gold", "pos", "label is of type str, expected an integer"),
    ]
    write(tmp_path, [{"text": "gold", "label": 1}, *({"text": t, "label": v} for t, v, _ in values)])
    report = run(recipe(tmp_path, TASK, {"m": "m"}))
    assert (report.rows_scored, report.rows_quarantined) == (1, len(values))
    assert quarantine(tmp_path) == {i: reason for i, (_, _, reason) in enumerate(values, 1)}


def test_a_model_that_looks_for_the_end_of_a_text_wants_one(tmp_path: Path) -> None:
    model, tokenizer = save(tmp_path / "m", "t5", num_labels=2)
    texts = ["gold </s> ore", "the ore", "gold"]
    write(tmp_path, [{"text": text, "label": 0} for text in texts])
    run(recipe(tmp_path, TASK, {"m": "m"}))
    assert quarantine(tmp_path) == {0: "text has the token that ends a text 2 times, expected 1"}
    with torch.no_grad():
        logits = model(**tokenizer(texts[2], return_tensors="pt")).logits
    expected = F.cross_entropy(logits, torch.tensor([0]))
    assert scores(tmp_path, "ensemble_nll")[1] == pytest.approx(float(expected), rel=1e-5)


def test_models_with_different_padding_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "a", "gpt2", num_labels=2)
    save(tmp_path / "b", "gpt2", num_labels=2, pad_token_id=3)
    write(tmp_path, _rows([0, 1]))
    with pytest.raises(EngineError, match=r"models\.a: a text in a batch with a longer one gets other logits"):
        run(recipe(tmp_path, TASK, {"a": "a", "b": "b"}))


def test_different_architectures_of_one_tokenizer_are_an_ensemble(tmp_path: Path) -> None:
    """BERT takes token types, DistilBERT does not."""
    told = [save(tmp_path / name, name, num_labels=2) for name in ("bert", "distilbert")]
    for file in (tmp_path / "bert").glob("tokenizer*"):
        (tmp_path / "distilbert" / file.name).write_bytes(file.read_bytes())
    write(tmp_path, _rows([0, 1], other="not much gold"))
    task = TASK | {"text_pair_column": "other"}
    run(recipe(tmp_path, task, {"a": "bert", "b": "distilbert"}))
    (bert, tokenizer), (distilbert, _) = told
    batch = tokenizer(TEXTS[1], "not much gold", return_tensors="pt")
    assert batch["token_type_ids"].any()
    with torch.no_grad():
        p = bert(**batch).logits.softmax(1) + distilbert(batch["input_ids"], batch["attention_mask"]).logits.softmax(1)
    assert scores(tmp_path, "ensemble_nll")[1] == pytest.approx(-float((p[0, 1] / 2).log()), rel=1e-5)


def test_token_types_do_not_follow_the_order_of_the_models(tmp_path: Path) -> None:
    for name in ("bert", "distilbert"):
        save(tmp_path / name, name, num_labels=2)
    write(tmp_path, _rows([0, 1], other="not much gold"))
    for output, names in (("one", ("bert", "distilbert")), ("two", ("distilbert", "bert"))):
        made = recipe(
            tmp_path, TASK | {"text_pair_column": "other"}, dict(zip("ab", names, strict=True)), output=output
        )
        run(made)
    one, two = (pq.read_table(tmp_path / name / "a.parquet")["ensemble_nll"].to_numpy() for name in ("one", "two"))
    np.testing.assert_allclose(one, two, rtol=1e-6)


def test_positions_of_a_model_without_an_end() -> None:
    for said, expected in ((-1, None), (0, None), (64, 64), ("many", None)):
        for config in ({"max_position_embeddings": said}, SimpleNamespace(max_position_embeddings=said)):
            model = nn.Linear(2, 2)
            model.config = config  # type: ignore[assignment]
            assert _positions(model) == expected


def test_class_labels_mean_their_names_in_every_shard(tmp_path: Path, caplog: Any) -> None:
    model, tokenizer = _bert(tmp_path / "m", id2label={0: "neg", 1: "pos"}, label2id={"neg": 0, "pos": 1})
    (tmp_path / "data").mkdir()
    for name, order in (("a", ["neg", "pos"]), ("b", ["pos", "neg"])):
        features = Features({"text": Value("string"), "label": ClassLabel(names=order)})
        rows = {"text": TEXTS[:2], "label": ["neg", "pos"]}
        Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"data/{name}.parquet")
    dictionary = pa.array(["neg", "pos"]).dictionary_encode()
    write(tmp_path, pa.table({"text": TEXTS[:2], "label": dictionary}), "c.parquet")
    write(tmp_path, _rows(["neg", "pos"]), "d.jsonl")
    with caplog.at_level(logging.INFO, "assay"):
        assert run(recipe(tmp_path, TASK, {"m": "m"})).clean
    with torch.no_grad():
        logits = torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in TEXTS[:2]])
    expected = F.cross_entropy(logits, torch.tensor([0, 1]), reduction="none").tolist()
    for name in "abcd":
        assert scores(tmp_path, "ensemble_nll", name) == pytest.approx(expected, rel=1e-5)
    footer = json.loads(pq.read_schema(tmp_path / "scores/d.parquet").metadata[b"assay"])
    assert footer["recipe"]["task"]["labels"] == ["neg", "pos"]  # whoever told them


def test_a_column_of_other_classes_than_the_models_is_refused(tmp_path: Path) -> None:
    _bert(tmp_path / "m", id2label={0: "NEGATIVE", 1: "POSITIVE"}, label2id={"NEGATIVE": 0, "POSITIVE": 1})
    features = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos"])})
    (tmp_path / "data").mkdir()
    Dataset.from_dict({"text": TEXTS[:2], "label": [0, 1]}, features=features).to_parquet(tmp_path / "data/a.parquet")
    message = r"the labels are 'neg', 'pos', but models\.m has 'NEGATIVE', 'POSITIVE'; give the class of each label"
    with pytest.raises(EngineError, match=message):
        run(recipe(tmp_path, TASK, {"m": "m"}))
    run(recipe(tmp_path, TASK | {"labels": {"neg": 0, "pos": 1}}, {"m": "m"}))
    right = scores(tmp_path, "ensemble_nll")
    run(recipe(tmp_path, TASK | {"labels": {"neg": 1, "pos": 0}}, {"m": "m"}), rescore=True)
    assert scores(tmp_path, "ensemble_nll") != pytest.approx(right, rel=1e-3)


def test_other_kinds_of_classifiers_are_refused(tmp_path: Path) -> None:
    _bert(tmp_path / "m", problem_type="multi_label_classification")
    write(tmp_path, _rows([0, 1]))
    with pytest.raises(EngineError, match=r"models\.m: its config's problem_type is 'multi_label_classification'"):
        run(recipe(tmp_path, TASK, {"m": "m"}))


def _mlp(path: Path, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    save_file(model.state_dict(), path)
    return model


def test_soft_labels(tmp_path: Path) -> None:
    model = _mlp(tmp_path / "m.safetensors")
    _mlp(tmp_path / "r.safetensors", 1)
    x, y = torch.randn(3, 3), torch.tensor([[0.25, 0.75], [1.0, 0.0], [0.5, 0.5]])
    rows = [{"input": a, "label": b} for a, b in zip(x.tolist(), y.tolist(), strict=True)]
    write(tmp_path, [*rows, {"input": [0, 0, 0], "label": [0.5, 0.6]}])
    specs = {n: {"kind": "mlp", "path": f"{n}.safetensors"} for n in "mr"}
    methods = [{"method": "grad_mimic", "model": "m", "reference": "r"}]
    made = recipe(tmp_path, {"kind": "classification"}, specs, methods=methods)
    assert run(made).rows_scored == 3
    assert scores(tmp_path, "loss") == pytest.approx(F.cross_entropy(model(x), y, reduction="none").tolist(), rel=1e-5)
    assert quarantine(tmp_path) == {3: "label has the sum 1.1, expected probabilities of sum 1"}
    footer = json.loads(pq.read_schema(tmp_path / "scores/a.parquet").metadata[b"assay"])
    assert footer["recipe"]["task"]["soft_labels"] is True
    write(tmp_path, [{"input": [0, 0, 0], "label": 1}, *rows])  # a class among them: the recipe must say what is meant
    task = {"kind": "classification", "soft_labels": True}
    assert run(recipe(tmp_path, task, specs, methods=methods), rescore=True).rows_scored == 3
    assert quarantine(tmp_path) == {0: "label is of type int, expected a list of numbers"}
    write(tmp_path, rows)
    with pytest.raises(EngineError, match="one class per sample, and the task's labels are probabilities"):
        run(recipe(tmp_path, {"kind": "classification"}, specs, output="other"))


def test_a_wrong_column_is_one_line_before_a_model_loads(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()  # there is no model in it
    write(tmp_path, _rows([0, 1]))
    for task, message in (
        ({"text_column": "txt"}, "task.text_column: a.jsonl has no column 'txt', only 'text', 'label'; did you mean"),
        ({"text_column": "text", "label_column": "y"}, "task.label_column: a.jsonl has no column 'y', only"),
        ({}, "task.input_column: a.jsonl has no column 'input', only 'text', 'label'"),
    ):
        with pytest.raises(EngineError) as caught:
            run(recipe(tmp_path, {"kind": "classification"} | task, {"m": "m"}))
        assert str(caught.value).startswith(message)


def test_a_recipe_comes_back_from_its_yaml(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    write(tmp_path, _rows([0, 1]))
    for labels in (["a", "b"], [True, False], [1, 2], {"a": 1, "b": 0}, {True: 1}, None):
        made = recipe(tmp_path, TASK | {"labels": labels, "text_pair_column": "other", "classes": 2}, {"m": "m"})
        (tmp_path / "again.yaml").write_text(made.to_yaml())
        assert load_recipe(str(tmp_path / "again.yaml")) == made


def test_a_regressor_is_no_classifier(tmp_path: Path) -> None:
    _bert(tmp_path / "m", num_labels=1)
    write(tmp_path, _rows([0, 1]))
    with pytest.raises(EngineError, match=r"models\.m: has one output, and this task compares classes"):
        run(recipe(tmp_path, TASK, {"m": "m"}))


@pytest.mark.parametrize(("pairs", "least"), [(False, 3), (True, 5)])
def test_a_length_that_leaves_nothing_of_a_text_is_refused(tmp_path: Path, pairs: bool, least: int) -> None:
    """With less than it adds itself, a tokenizer does not cut at all."""
    _bert(tmp_path / "m")
    write(tmp_path, _rows([0, 1], other="not much gold"))
    task = TASK | ({"text_pair_column": "other"} if pairs else {})
    with pytest.raises(EngineError, match=rf"task\.max_length is {least - 1}; .* a text has {least} tokens or more"):
        run(recipe(tmp_path, task | {"max_length": least - 1}, {"m": "m"}))
    assert run(recipe(tmp_path, task | {"max_length": least}, {"m": "m"})).rows_scored == 2
