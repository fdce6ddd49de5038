"""Scores per token: in a recipe's tables, in the row's order, whatever the batches."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from assay.corpus.errors import CorpusError
from assay.curate import curate
from assay.curate.rules import RuleOptions
from assay.engine import make_plan, open_workshop, run
from assay.recipe.errors import EngineError
from assay.recipe.recipe import load_recipe
from tests.small_models import TEXTS, byte_tokenizer, llama_config, save_model, write_recipe

PAIRS = [(text[:8], text[8:20]) for text in TEXTS if len(text) > 12]
TASK = {"kind": "causal_lm", "prompt_column": "ask", "completion_column": "answer", "max_length": 64}
METHODS = [
    {"method": "ensemble", "models": ["a", "b"], "tokens": True},
    {"method": "grad_mimic", "model": "a", "reference": "b", "tokens": True},
]


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokens")
    config = llama_config(num_hidden_layers=1)
    models = {name: save_model(root / name, seed, config) for seed, name in enumerate("ab")}
    path = write_recipe(root, models, task=TASK, methods=METHODS)
    rows = [{"ask": ask, "answer": answer} for ask, answer in PAIRS]
    rows.insert(2, {"ask": "no answer", "answer": None})
    (root / "data/a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(load_recipe(str(path))).rows_scored == len(PAIRS)
    return root


def half(by):
    return RuleOptions(top="0.5", by=by).rule()


def table_of(root, output="scores"):
    return pq.read_table(root / output / "a.parquet")


def ids_of(pair) -> list[int]:
    return [*byte_tokenizer()("".join(pair))["input_ids"], 256]


def test_every_token_has_its_number(scored):
    table = table_of(scored)
    models = [AutoModelForCausalLM.from_pretrained(scored / name).eval() for name in "ab"]
    for i, pair in enumerate(PAIRS):
        ids = torch.tensor([ids_of(pair)])
        with torch.no_grad():
            logs = torch.stack([model(ids).logits[0].log_softmax(-1) for model in models])
        expected = {
            "ensemble_mean_nll_tokens": -logs[:, :-1].gather(2, ids[:, 1:, None].expand(2, -1, 1)).mean(0)[:, 0],
            "ensemble_entropy_tokens": torch.distributions.Categorical(logs[:, :-1].exp().mean(0)).entropy(),
        }
        start = len(pair[0])
        for name, values in expected.items():
            got = np.array(table[name][i].as_py())
            assert len(got) == ids.shape[1]
            assert np.isnan(got[:start]).all()
            np.testing.assert_allclose(got[start:], values[start - 1 :], rtol=1e-5)
            whole = table[name.removesuffix("_tokens")][i].as_py()
            assert whole == pytest.approx(got[start:].mean(), rel=1e-5)
        shares = np.array(table["mimic_tokens"][i].as_py())
        assert len(shares) == ids.shape[1]
        assert shares.sum() == pytest.approx(table["mimic"][i].as_py(), rel=1e-4)
        assert np.abs(shares[:start]).max() > 0  # the prompt is read, and taught, too


def test_any_batches_give_the_same_numbers(scored):
    recipe = load_recipe(str(scored / "recipe.yaml"), ["batch.samples=1", "output=single"])
    run(recipe)
    together, single = table_of(scored), table_of(scored, "single")
    for name in ("ensemble_mean_nll_tokens", "ensemble_entropy_tokens", "mimic_tokens"):
        for one, other in zip(together[name].to_pylist(), single[name].to_pylist(), strict=True):
            np.testing.assert_allclose(one, other, rtol=2e-4, atol=1e-6)


def test_the_footer_counts_rows_and_the_schema_says_what_they_are(scored):
    table = table_of(scored)
    field = table.schema.field("mimic_tokens")
    assert field.type == pa.list_(pa.float32())
    assert field.metadata[b"keep"] == b"high"
    footer = json.loads(table.schema.metadata[b"assay"])
    assert footer["rows"] == {"scored": len(PAIRS), "quarantined": 1}
    assert footer["nan"]["mimic_tokens"] == footer["nan"]["ensemble_mean_nll_tokens"] == 0


def test_nothing_is_selected_by_them(scored, tmp_path):
    with pytest.raises(CorpusError, match=r"--by mimic_tokens: holds list<.*> per row; expected one number") as caught:
        curate(str(scored / "scores"), "mimic_tokens", half("mimic_tokens"), str(tmp_path / "out"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert curate(str(scored / "scores"), "mimic", half("mimic"), str(tmp_path / "out")).kept == round(len(PAIRS) / 2)


def test_tokens_of_the_encoder_and_of_the_table_go_together(scored):
    workshop = open_workshop(make_plan(load_recipe(str(scored / "recipe.yaml"))), fit=False)
    (sample,) = workshop.encoder.encode([PAIRS[0]])
    shown = workshop.encoder.tokens(sample.data)
    values = table_of(scored)["ensemble_mean_nll_tokens"][0].as_py()
    assert [counts for _, counts in shown] == [not np.isnan(value) for value in values]
    text = "".join(word for word, counts in shown if counts)
    assert text.replace("Ġ", " ") == PAIRS[0][1] + "<eos>"


def test_samples_without_tokens_are_one_line(project):
    methods = [{"method": "ensemble", "models": ["a", "b"], "tokens": True}]
    with pytest.raises(EngineError, match="tokens: Classification's samples are no tokens"):
        open_workshop(make_plan(load_recipe(str(project.write_recipe(methods=methods)))))
