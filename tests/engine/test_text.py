"""Texts: a tiny GPT-2 with a tokenizer of its own, from the recipe to the scores."""

from __future__ import annotations

import json
import math

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from assay.engine.local import run
from assay.recipe.errors import EngineError, RecipeError
from assay.recipe.recipe import load_recipe

WORDS = ["[UNK]", "the", "ore", "holds", "gold", "and", "some", "is", "worth", "digging", "for", "not"]


def save_model(path, seed: int, words=WORDS, positions: int = 32) -> None:
    torch.manual_seed(seed)
    vocabulary = {word: i for i, word in enumerate(words)}
    config = GPT2Config(vocab_size=len(vocabulary), n_positions=positions, n_embd=16, n_layer=2, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(path)
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(path)


def write_text_project(root, lines, batch_tokens: int, **ensemble):
    """Two small models, a shard of these JSON lines and a recipe of both, whose path is returned."""
    save_model(root / "small", 0)
    save_model(root / "ref", 1)
    (root / "data").mkdir()
    (root / "data/a.jsonl").write_text("\n".join(lines))
    recipe = {
        "version": 1,
        "corpus": {"path": "data"},
        "task": {"kind": "causal_lm", "max_length": 16},
        "models": {name: {"kind": "transformers", "path": name} for name in ("small", "ref")},
        "methods": [
            {"method": "ensemble", "models": ["small", "ref"], **ensemble},
            {"method": "grad_mimic", "model": "small", "reference": "ref"},
        ],
        "output": "scores",
        "batch": {"tokens": batch_tokens},
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return root / "recipe.yaml"


@pytest.fixture
def text_recipe(tmp_path):
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS[1:], size)) for size in rng.integers(2, 60, 40)]
    lines = [json.dumps({"text": text}) for text in texts]
    lines[3], lines[5], lines[8] = '{"text": null}', '{"text": "\\ud800 gold"}', '{"text": "gold"}'
    return write_text_project(tmp_path, lines, 100), texts


def test_texts_are_scored_as_the_model_itself_would(text_recipe):
    path, texts = text_recipe
    report = run(load_recipe(str(path)))
    assert (report.rows, report.rows_scored, report.rows_quarantined) == (40, 37, 3)
    table = pq.read_table(path.parent / "scores/a.parquet")
    assert table["id"][0].as_py() == "a.jsonl:0"
    model = AutoModelForCausalLM.from_pretrained(path.parent / "small").eval()
    losses = dict(zip(table["row"].to_pylist(), table["loss"].to_pylist(), strict=True))
    for row in (0, 10, 39):
        ids = torch.tensor([[WORDS.index(word) for word in texts[row].split()][:16]])
        with torch.no_grad():
            expected = model(ids, labels=ids).loss.item()
        assert losses[row] == pytest.approx(expected, rel=1e-4)
    reasons = [json.loads(line)["reason"] for line in (path.parent / "scores/quarantine/a.jsonl").open()]
    assert reasons == [
        "text is null",
        "text has a lone surrogate at character 0",
        "text is 1 token long; nothing in it can be predicted",
    ]


def test_batches_do_not_change_scores(text_recipe):
    path, _ = text_recipe
    run(load_recipe(str(path)))
    run(load_recipe(str(path), ["batch.samples=1", "output=single"]))
    together, single = (pq.read_table(path.parent / f"{name}/a.parquet") for name in ("scores", "single"))
    for name in ("loss", "mimic", "ensemble_nll", "ensemble_entropy"):
        values = together[name].to_numpy()
        assert not np.isnan(values).any()
        np.testing.assert_allclose(values, single[name].to_numpy(), rtol=2e-4, atol=1e-5)
    assert math.isfinite(values.sum())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: save_model(p / "ref", 1, [*WORDS, "silver"]), "different vocabularies"),
        (lambda p: (p / "small/model.safetensors").unlink(), "small: transformers cannot load it"),
        (lambda p: (p / "small/model.safetensors").rename(p / "small/pytorch_model.bin"), "which is never opened"),
    ],
)
def test_models_that_do_not_fit_are_named(text_recipe, change, message):
    path, _ = text_recipe
    change(path.parent)
    with pytest.raises(EngineError, match=message) as caught:
        run(load_recipe(str(path)))
    assert "\n" not in str(caught.value)


def test_too_many_positions_are_refused(text_recipe):
    path, _ = text_recipe
    with pytest.raises(EngineError, match=r"task\.max_length is 64, but models\.ref has 32 positions"):
        run(load_recipe(str(path), ["task.max_length=64"]))


def test_a_checkpoints_own_code_never_runs(text_recipe):
    path, _ = text_recipe
    evil = path.parent / "small"
    (evil / "modeling_evil.py").write_text(f"open({str(path.parent / 'ran')!r}, 'w')")
    config = json.loads((evil / "config.json").read_text())
    auto_map = {"AutoModelForCausalLM": "modeling_evil.Evil", "AutoConfig": "modeling_evil.E"}
    config |= {"model_type": "evil", "auto_map": auto_map}
    (evil / "config.json").write_text(json.dumps(config))
    with pytest.raises(EngineError, match="cannot load it"):
        run(load_recipe(str(path)))
    assert not (path.parent / "ran").exists()
    with pytest.raises(RecipeError, match="trust_remote_code: unknown key"):
        load_recipe(str(path), ["models.small.trust_remote_code=true"])


def test_texts_are_scored_towards_targets(text_recipe):
    path, texts = text_recipe
    (path.parent / "target").mkdir()
    (path.parent / "target/t.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts[20:24]))
    recipe = yaml.safe_load(path.read_text())
    recipe["targets"] = {"gold": {"path": "target"}}
    recipe["fit"] = {"samples": 30}
    sketch = {"kind": "sparse", "dim": 16}
    recipe["methods"] = [
        {"method": "dsdm", "models": ["small", "ref"], "sketch": sketch},
        {"method": "influence_distillation", "model": "small", "landmarks": 20, "embed_layers": "*.h.0.*"},
        {"method": "influence_distillation", "model": "small", "name": "whole", "at": "transformer.h.1"},
    ]
    path.write_text(yaml.safe_dump(recipe))
    report = run(load_recipe(str(path)))
    assert (report.rows_scored, report.nan.total()) == (37, 0)
    table = pq.read_table(path.parent / "scores/a.parquet")
    assert table.column_names == ["row", "id", "dsdm", "influence_distillation", "whole"]
    for name in table.column_names[2:]:
        assert np.std(table[name].to_numpy()) > 0
