"""A tag per word."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import ClassLabel, Dataset, Features, List, Value

from assay.engine.local import run
from assay.recipe.errors import EngineError
from assay.recipe.recipe import load_recipe
from assay.recipe.tasks import ShowsTokens
from tests.recipe.tasks.word_models import quarantine, recipe, save, scores, write

WORDS = [["the", "ore", "holds", "gold"], ["gold"], ["not", "much", "of", "it", "is", "worth"]]
TAGS = ["O", "METAL", "ROCK"]
TASK = {"kind": "token_classification"}


def _tags(words: list[str]) -> list[str]:
    return [{"gold": "METAL", "ore": "ROCK"}.get(word, "O") for word in words]


def _model(path: Path, name: str = "bert", **changes: Any) -> tuple[Any, Any]:
    return save(path, name, auto_class="AutoModelForTokenClassification", num_labels=3, **changes)


def _expected(model: Any, tokenizer: Any, words: list[str], tags: list[int], reduction: Any, cut: int = 64) -> float:
    """As transformers' run_ner.py aligns them."""
    batch = tokenizer(words, is_split_into_words=True, truncation=True, max_length=cut, return_tensors="pt")
    ids = batch.word_ids(0)
    labels = [-100 if w is None or (i and ids[i - 1] == w) else tags[w] for i, w in enumerate(ids)]
    with torch.no_grad():
        return float(F.cross_entropy(model(**batch).logits[0], torch.tensor(labels), reduction=reduction))


@pytest.mark.parametrize("name", ["bert", "distilbert", "gpt2", "qwen2"])  # of the last one every letter is a token
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_losses_are_those_of_transformers_examples(tmp_path: Path, name: str, reduction: str) -> None:
    model, tokenizer = _model(tmp_path / "m", name)
    _model(tmp_path / "r", name, seed=1)
    write(tmp_path, [{"tokens": words, "tags": _tags(words)} for words in WORDS])
    methods = [
        {"method": "grad_mimic", "model": "m", "reference": "r"},
        {"method": "ensemble", "models": ["m"]},
    ]
    task = TASK | {"labels": TAGS, "reduction": reduction}
    assert run(recipe(tmp_path, task, {"m": "m", "r": "r"}, methods=methods)).rows_scored == 3
    for i, words in enumerate(WORDS):
        tags = [TAGS.index(tag) for tag in _tags(words)]
        expected = _expected(model, tokenizer, words, tags, reduction)
        assert scores(tmp_path, "loss")[i] == pytest.approx(expected, rel=1e-5, abs=1e-6)
        mean = _expected(model, tokenizer, words, tags, "mean")  # an ensemble's are means whatever the reduction
        assert scores(tmp_path, "ensemble_nll")[i] == pytest.approx(mean, rel=1e-5, abs=1e-6)


def test_scores_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    _model(tmp_path / "m")
    write(tmp_path, [{"tokens": words, "tags": _tags(words)} for words in WORDS])
    run(recipe(tmp_path, TASK | {"labels": TAGS}, {"m": "m"}))
    together = scores(tmp_path, "ensemble_nll")
    run(recipe(tmp_path, TASK | {"labels": TAGS}, {"m": "m"}, batch={"samples": 1}, output="alone"))
    (tmp_path / "scores").rename(tmp_path / "old")
    (tmp_path / "alone").rename(tmp_path / "scores")
    assert scores(tmp_path, "ensemble_nll") == pytest.approx(together, rel=1e-5)


def test_words_beyond_max_length_are_cut(tmp_path: Path) -> None:
    model, tokenizer = _model(tmp_path / "m")
    write(tmp_path, [{"tokens": words, "tags": _tags(words)} for words in WORDS])
    run(recipe(tmp_path, TASK | {"labels": TAGS, "max_length": 5}, {"m": "m"}))
    tags = [TAGS.index(tag) for tag in _tags(WORDS[2])]
    expected = _expected(model, tokenizer, WORDS[2], tags, "mean", cut=5)
    assert scores(tmp_path, "ensemble_nll")[2] == pytest.approx(expected, rel=1e-5)


BAD: list[tuple[Any, Any, str]] = [
    (None, ["O"], "tokens is null"),
    ("gold", ["O"], "tokens is of type str, expected a list of strings"),
    ([], [], "tokens is empty"),
    (["gold", None], ["O", "O"], "tokens[1] is null"),
    (["gold", 3], ["O", "O"], "tokens[1] is of type int, expected a string"),
    (["gold", ""], ["O", "O"], "tokens[1] is empty"),
    (["gold"], None, "tags is null"),
    (["gold"], "O", "tags is of type str, expected a list"),
    (["gold"], ["O", "O"], "tags holds 2 tags for 1 words"),
    (["gold"], [None], "tags is null"),
    (["gold"], ["X"], "tags is 'X', not among the labels 'O', 'METAL', 'ROCK'"),
    (["gold"], [7], "tags is 7, outside the classes 0 to 2"),
    ([" "], ["O"], "tokens has no word of which a token is left; nothing can be predicted"),
]


def test_rows_that_are_no_samples_say_why(tmp_path: Path) -> None:
    _model(tmp_path / "m")
    write(tmp_path, [{"tokens": ["gold"], "tags": ["METAL"]}, *({"tokens": t, "tags": g} for t, g, _ in BAD)])
    report = run(recipe(tmp_path, TASK | {"labels": TAGS}, {"m": "m"}))
    assert (report.rows_scored, report.rows_quarantined) == (1, len(BAD))
    assert quarantine(tmp_path) == {i: reason for i, (_, _, reason) in enumerate(BAD, 1)}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": "the ore", "tags": ["O"]}, "column 'tokens' holds string; expected lists of words"),
        ({"tokens": [1, 2], "tags": ["O"]}, "column 'tokens' holds list<int64>; expected lists of words"),
        ({"tokens": ["gold"], "tags": "O"}, "column 'tags' holds string; expected lists of tags"),
        (
            {"tokens": ["gold"], "tags": [[1]]},
            "column 'tags' holds list<int64>; expected integers, booleans or strings",
        ),
        (
            {"words": ["gold"], "tags": ["O"]},
            "task.tokens_column: a.jsonl has no column 'tokens', only 'words', 'tags'",
        ),
    ],
)
def test_columns_that_hold_no_tags_are_refused_before_a_model_loads(
    tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    (tmp_path / "m").mkdir()  # there is no model in it
    write(tmp_path, [row])
    with pytest.raises(EngineError) as caught:
        run(recipe(tmp_path, TASK | {"labels": TAGS}, {"m": "m"}))
    assert str(caught.value) == message


def test_tags_are_the_classes_of_a_list_column(tmp_path: Path) -> None:
    """Integers whose names the column's own type has, in the order of the labels or another."""
    model, tokenizer = _model(tmp_path / "m", id2label=dict(enumerate(TAGS)), label2id={})
    for name, order in (("a", TAGS), ("b", TAGS[::-1])):
        features = Features({"tokens": List(Value("string")), "tags": List(ClassLabel(names=order))})
        rows = {"tokens": WORDS, "tags": [_tags(words) for words in WORDS]}
        Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"data-{name}.parquet")
    (tmp_path / "data").mkdir()
    for name in "ab":
        (tmp_path / f"data-{name}.parquet").rename(tmp_path / f"data/{name}.parquet")
    run(recipe(tmp_path, TASK, {"m": "m"}))
    expected = _expected(model, tokenizer, WORDS[0], [TAGS.index(tag) for tag in _tags(WORDS[0])], "mean")
    for name in "ab":  # the second shard's integers are others, and mean the same
        assert scores(tmp_path, "ensemble_nll", name)[0] == pytest.approx(expected, rel=1e-5)


def test_scores_by_token_stand_at_the_first_tokens_of_words(tmp_path: Path) -> None:
    model, tokenizer = _model(tmp_path / "m", "qwen2")  # every letter is a token
    write(tmp_path, [{"tokens": words, "tags": _tags(words)} for words in WORDS])
    methods = [{"method": "ensemble", "models": ["m"], "tokens": True}]
    run(recipe(tmp_path, TASK | {"labels": TAGS}, {"m": "m"}, methods=methods))
    batch = tokenizer(WORDS[0], is_split_into_words=True, return_tensors="pt")
    with torch.no_grad():
        log_p = model(**batch).logits[0].log_softmax(1)
    ids = batch.word_ids(0)
    tags = [TAGS.index(tag) for tag in _tags(WORDS[0])]
    (row, *_) = scores(tmp_path, "ensemble_mean_nll_tokens")
    assert len(row) == len(ids)
    for i, word in enumerate(ids):
        if i and ids[i - 1] == word:
            assert math.isnan(row[i])
        else:
            assert row[i] == pytest.approx(-float(log_p[i, tags[word]]), rel=1e-4)
    shown = load_recipe(str(tmp_path / "recipe.yaml")).task.encoder(
        {"m": (load_recipe(str(tmp_path / "recipe.yaml")).models["m"], model)}
    )
    assert isinstance(shown, ShowsTokens)
    (sample,) = shown.encode([(["ore", "it"], ["ROCK", "O"])])
    assert [counts for _, counts in shown.tokens(sample.data)] == [True, False, False, True, False]


def test_strings_without_an_order_are_refused(tmp_path: Path) -> None:
    _model(tmp_path / "m")
    write(tmp_path, [{"tokens": ["gold"], "tags": ["O"]}])
    with pytest.raises(EngineError, match="column 'tags' holds strings, and nothing says which class each is"):
        run(recipe(tmp_path, TASK, {"m": "m"}))


def test_a_recipe_comes_back_from_its_yaml(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    write(tmp_path, [{"tokens": ["gold"], "tags": ["O"]}])
    made = recipe(tmp_path, TASK | {"labels": {"O": 1, "B": 0}, "max_length": 9, "reduction": "sum"}, {"m": "m"})
    (tmp_path / "again.yaml").write_text(made.to_yaml())
    assert load_recipe(str(tmp_path / "again.yaml")) == made
